"""The documentation site: every page is in its navigation, links lead somewhere, and pages request nothing from other hosts."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from markdown.extensions.toc import slugify

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
REQUESTED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}  # what a browser fetches by itself


class Page(HTMLParser):
    """Ids, links, and the addresses that a browser requests."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.requests = set[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attributes if value is not None}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if REQUESTED.get(tag) in found and found.get("rel") not in ("canonical", "edit"):
            self.requests.append(found[REQUESTED[tag]])


def pages(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages(part)


def test_every_page_is_in_the_navigation_once():
    there = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(pages(CONFIG["nav"])) == there


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    copytree(ROOT / "docs", folder / "docs")
    (folder / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text())
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "mkdocs.yml"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert not built.returncode, built.stdout + built.stderr
    return {path: Page(path.read_text()) for path in (folder / "site").rglob("*.html")}


def test_pages_request_nothing_from_other_hosts(site):
    for path, page in site.items():
        for address in page.requests:
            assert not urlsplit(address).netloc, f"{path.name} requests {address}"
    for path in next(iter(site)).parent.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(https?:)?//", path.read_text()), f"{path.name} requests a file of another host"


def test_every_link_of_the_site_leads_somewhere(site):
    for path, page in site.items():
        for link in page.links if path.name != "404.html" else ():
            where = urlsplit(link)
            target = (path.parent / unquote(where.path)).resolve() if where.path else path
            if where.scheme or not target.suffix:
                continue
            assert target.exists(), f"{path.name} links to {link}"
            if where.fragment and target in site:
                assert unquote(where.fragment) in site[target].ids, f"{path.name} links to {link}, which has no such anchor"


def anchors(path: Path) -> set[str]:
    """Of the headings of a document, as the site has them."""
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in re.findall(r"^#+ (.*)$", path.read_text(), re.M)}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benches/README.md", "examples/README.md"])
def test_every_link_of_the_other_documents_leads_somewhere(name):
    path = ROOT / name
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        where = urlsplit(link)
        target = (path.parent / where.path) if where.path else path
        assert where.scheme or target.exists(), f"{name} links to {link}"
        assert where.scheme or not where.fragment or where.fragment in anchors(target), f"{name} links to {link}: no such heading"
