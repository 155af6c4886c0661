"""The page at / in a real browser: a stock flow with the keyboard, in light and dark; nothing from elsewhere, nothing inline."""

import os
import shutil
from pathlib import Path

import pytest

from elmwood.serve.pages import HEADERS, asset

AXE = (Path(__file__).parents[1] / "hub" / "pages" / "vendor" / "axe.min.js").read_text(encoding="utf-8")
PICTURES = os.environ.get("ELMWOOD_PICTURES")  # a folder for screenshots, for whoever wants to look


@pytest.fixture(scope="module")
def page(address):
    """A tab that notes what it fetched and what it complained of, in Chromium without a window: Debian's, or whichever is on the path."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and not os.environ.get("CI"):
        pytest.skip("no Chromium here: `make browser` installs one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce").new_page()
        opened.set_default_timeout(120_000)  # of a machine with much else to do
        opened.fetched, opened.complaints = [], []
        opened.on("request", lambda request: opened.fetched.append(request.url))
        opened.on("console", lambda message: opened.complaints.append(message.text) if message.type in ("error", "warning") else None)
        opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
        yield opened
        browser.close()


def look(page, name):
    """Nothing for axe to find, in light and dark."""
    page.evaluate(AXE)
    for scheme, rules in (("light", ""), ("dark", ", runOnly: ['color-contrast']")):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        wish = f"{{resultTypes: ['violations']{rules}}}"
        found = page.evaluate(f"axe.run({wish}).then(r => r.violations.map(v => [v.id, v.nodes[0].html]))")
        assert not found, f"{name}, {scheme}: {found}"
        if PICTURES:
            page.screenshot(path=f"{PICTURES}/{name}-{scheme}.png", full_page=True)
    page.emulate_media(color_scheme="light", reduced_motion="reduce")


def test_a_person_continues_a_text_and_sees_who_spoke(page, address, served):
    page.goto(address + "/")
    page.locator("input[value=text]").check()
    page.locator("#tokens").fill("100")
    page.locator("#seed").fill("1")
    page.locator("#prompt").fill("the captain sailed. def path(open): return read. le jardin, la pomme,")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("body[data-answers='1']")
    page.wait_for_selector("#map-part:not([hidden]) polyline")
    assert page.locator(".word").count() > 2
    assert page.locator("#trouble").is_hidden()
    assert "tokens" in page.locator("#state").inner_text()
    names = {card.name for card in served.cards.values()} | {"seed"}
    rows = page.locator("#weights tbody tr")
    assert {rows.nth(n).locator("button").inner_text() for n in range(rows.count())} <= names
    total = sum(float(rows.nth(n).locator("td").first.inner_text().removesuffix(" %")) for n in range(rows.count()))
    assert total == pytest.approx(100, abs=0.5)
    assert page.locator("#map circle").count() == 3 + 2
    page.locator("#text").focus()
    page.keyboard.press("ArrowRight")
    first = page.locator(".word.here").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator(".word.here").get_attribute("data-place") == "1"
    page.keyboard.press("Home")
    assert page.locator(".word.here").inner_text() == first
    assert page.locator("#word-weights tbody tr").count() >= 1
    page.locator(".word").nth(2).hover()
    assert page.locator(".word.here").get_attribute("data-place") == "2"
    look(page, "text")


def test_text_on_the_page_is_the_server_s(page, http, address):
    page.goto(address + "/")
    page.locator("input[value=text]").check()
    page.locator("#temperature").fill("0")
    page.locator("#tokens").fill("25")
    page.locator("#model").fill("seed")
    page.locator("#prompt").fill("naïve café, 海 and 猫")
    page.locator("#go").click()
    page.wait_for_selector("body[data-answers='1']")
    wish = {"model": "seed", "prompt": "naïve café, 海 and 猫", "max_tokens": 25, "temperature": 0}
    made = http.post("/v1/completions", json=wish).json()["choices"][0]["text"]
    assert page.evaluate("document.getElementById('text').textContent") == wish["prompt"] + made
    assert page.locator("#weights tbody tr").count() == 1
    page.locator("#clear").click()
    assert page.evaluate("document.getElementById('text').textContent") == ""


def test_a_chat_goes_on_and_trouble_is_said(page, address):
    page.goto(address + "/")
    page.locator("#tokens").fill("6")
    for turn in (1, 2):
        page.locator("#prompt").fill("the sea <b>and</b>")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(f"body[data-answers='{turn}']")
        assert page.locator(".who").count() == 2 * turn
    assert page.locator("#text b").count() == 0, "what is typed stays text"
    page.locator("#model").fill("nobody")
    page.locator("#prompt").fill("and now")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#trouble:not([hidden])")
    assert "does not exist" in page.locator("#trouble").inner_text()
    assert page.locator("#prompt").input_value() == "and now"
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/chat.png", full_page=True)
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 1200, "height": 900})


def test_nothing_is_fetched_from_elsewhere_and_no_policy_is_broken(page, address):
    """After the flows above. The policy allows files of the server alone, so an inline script or style would have complained."""
    assert all(url.startswith(address + "/") for url in page.fetched)
    assert {url.rpartition("/")[2] for url in page.fetched if "/static/" in url} >= {"page.css", "page.js"}
    assert [line for line in page.complaints if "404" not in line] == []
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_static_files_are_known_by_name(http):
    reply = http.get("/static/page.js")
    assert reply.headers["content-security-policy"] == HEADERS["content-security-policy"]
    assert http.get("/static/page.js", headers={"if-none-match": reply.headers["etag"]}).status_code == 304
    for name in ("../__init__.py", "page.jinja", "..%2f__init__.py"):
        assert http.get(f"/static/{name}").status_code == 404
    assert asset("page.py") is None
    route = http.post("/v1/route", json={"prompt": "the captain sailed", "map": True}).json()["map"]
    assert len(route["experts"]) == 3
    assert all(0 <= value <= 1 for point in route["path"] for value in point)
