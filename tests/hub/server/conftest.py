"""Hubs: on SQLite and a folder, and on PostgreSQL and S3. A test that takes `make_hub` runs on both."""

import itertools
import shutil
from contextlib import ExitStack

import httpx
import pytest
from starlette.testclient import TestClient

from elmwood.hub.app import create_app
from elmwood.hub.database import Database
from elmwood.hub.migrations import upgrade
from tests.hub.server import services
from tests.hub.server.world import open_run

_number = itertools.count()


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """A database with all tables and nothing in them: those of tests are copies of it."""
    path = tmp_path_factory.mktemp("empty") / "hub.sqlite"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def database(empty, tmp_path):
    opened = Database(f"sqlite:///{shutil.copy(empty, tmp_path)}")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def s3():
    with services.s3() as environment:
        yield environment


@pytest.fixture(params=["embedded", "postgres and s3"])
def make_hub(request, empty, tmp_path, monkeypatch):
    """A function that opens a published run, on each kind of database and blobs."""
    made = []

    def make(domains: int = 3, **settings):
        places, folder = {}, tmp_path / f"store{len(made)}"
        if request.param == "embedded":
            home = folder / "hub" / "test"
            home.mkdir(parents=True)
            shutil.copy(empty, home)
        else:
            for name, value in request.getfixturevalue("s3").items():
                monkeypatch.setenv(name, value)
            places = {"database": request.getfixturevalue("new_database"), "blobs": f"s3://hub/{next(_number)}"}
        made.append(open_run(folder, domains, **places, **settings))
        return made[-1]

    yield make
    for hub in made:
        hub.close()


@pytest.fixture
def hub(make_hub):
    return make_hub()


@pytest.fixture
def started():
    """A function that gives a plain client of a hub's app. The hub's own clock does not tick by itself."""
    with ExitStack() as stack:

        def start(hub):
            hub.start = lambda: None
            return stack.enter_context(TestClient(create_app(hub), raise_server_exceptions=False))

        yield start


@pytest.fixture
def client(hub, started):
    return started(hub)


def asynchronous(hub) -> httpx.AsyncClient:
    """A client whose requests run side by side in one event loop."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(hub)), base_url="http://hub", timeout=120)
