"""A hub with a run that has something on every page, and its pages in a real browser."""

import os
import shutil

import pytest

from elmwood.hub.home import Home, Hub
from elmwood.hub.manifest import publish
from elmwood.store import Store
from tests.hub.pages.community import atlas, populate
from tests.hub.served import serve
from tests.hub.server.world import make_run

DOMAINS = 6


@pytest.fixture(scope="package")
def hub(tmp_path_factory):
    home = Home("test", Store(tmp_path_factory.mktemp("pages") / "store"))
    home.make_keys()
    opened = Hub(home)
    publish(make_run(home.store, DOMAINS), opened, atlas=atlas(DOMAINS))
    yield opened
    opened.close()


@pytest.fixture(scope="package")
def cast(hub):
    return populate(hub)


@pytest.fixture(scope="package")
def address(hub, cast):
    """Where the hub is served, on a free port of this machine."""
    with serve(hub) as url:
        yield url


@pytest.fixture(scope="module")  # while it is open, this thread has an event loop, and other tests want their own
def browser():
    """Chromium without a window: Debian's, or whichever is on the path. CI has one: `make browser`."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and not os.environ.get("CI"):
        pytest.skip("no Chromium here: `make browser` installs one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()
