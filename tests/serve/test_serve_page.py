"""The page at / in a real browser: a stock flow with the keyboard, in light and dark; nothing from elsewhere, nothing inline."""

import os
import shutil
from pathlib import Path

import pytest

from elmwood.serve.app import create_app
from elmwood.serve.model import open_served
from elmwood.serve.pages import HEADERS, asset
from tests.serve.conftest import serving

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


def test_an_answer_is_made_again_in_its_place_and_copied(page, address):
    page.goto(address + "/")
    page.locator("input[value=text]").check()
    page.locator("#tokens").fill("5")
    page.locator("#temperature").fill("0")
    assert page.locator("#again").is_hidden()
    said = []
    for turn, act in enumerate(("#go", "#again", "#go", "#again"), 1):
        if act == "#go":
            page.locator("#prompt").fill("the sea ")
        page.locator(act).click()
        page.wait_for_selector(f"body[data-answers='{turn}']")
        said.append(page.evaluate("document.getElementById('text').textContent"))
    assert said[0] == said[1]
    assert said[2] == said[3]
    assert said[2].startswith(said[0] + "the sea ")
    words = page.locator(".word").count()
    assert [page.locator(".word").nth(n).get_attribute("data-place") for n in range(words)] == [str(n) for n in range(words)]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#copy").click()
    page.locator("#state", has_text="copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").split() == said[2].split()
    page.locator("input[value=chat]").check()
    page.locator("#prompt").fill("one line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-answers='5']")
    page.locator("#again").click()
    page.wait_for_selector("body[data-answers='6']")
    assert page.locator(".who").count() == 2
    assert page.locator(".given").inner_text() == "one line\nand another"


MAP = """(names) => {
  const at = (n) => ({ x: 0.5 + 0.012 * (n % 7), y: 0.5 + 0.02 * Math.floor(n / 7) })
  const experts = names.map((name, n) => ({ id: String(n).padStart(64, "0"), name, ...at(n) }))
  return { map: { experts, path: [[0.5, 0.5], [0.52, 0.55]] }, candidates: experts }
}"""
OVERLAPS = """() => {
  const boxes = [...document.querySelectorAll("#map text, #map circle:not(.start):not(.end)")].map((one) => one.getBoundingClientRect())
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1
  const frame = document.getElementById("map").getBoundingClientRect()
  const texts = boxes.filter((one) => one.width > 20)
  const out = texts.filter((one) => one.left < frame.left || one.right > frame.right || one.top < frame.top || one.bottom > frame.bottom)
  return [texts.length, texts.filter((one) => boxes.some((other) => other !== one && meet(one, other))).length, out.length]
}"""


def test_names_on_the_map_do_not_cover_one_another(page, address):
    """Forty domains in one spot, by what the server says of such a map, at three widths."""
    names = [f"{'domain of ships and weather'[: 6 + n % 22]} {n}" for n in range(40)]
    page.goto(address + "/")
    route = page.evaluate(MAP, names)
    page.route("**/v1/route", lambda asked: asked.fulfill(json=route))
    page.locator("#tokens").fill("3")
    for turn, width in enumerate((400, 900, 1400), 1):
        page.set_viewport_size({"width": width, "height": 900})
        page.locator("#prompt").fill("the sea")
        page.locator("#go").click()
        page.wait_for_selector(f"body[data-answers='{turn}']")
        named, covered, outside = page.evaluate(OVERLAPS)
        assert (covered, outside) == (0, 0)
        assert named >= 2
        if PICTURES:
            page.screenshot(path=f"{PICTURES}/map-{width}.png", full_page=True)
    page.unroute("**/v1/route")
    page.set_viewport_size({"width": 1200, "height": 900})


def test_a_newer_model_is_shown_without_a_reload(page, world):
    first = open_served(world.ensemble, world.store, name="forest")
    app = create_app(first)
    with serving(app) as address:
        page.goto(address + "/")
        fewer = world.store.load(world.ensemble.forest).model_copy(
            update={"experts": tuple(sorted(one.digest for one in world.experts)[:2])}
        )
        world.store.add(fewer)
        second = world.ensemble.model_copy(update={"forest": fewer.digest})
        app.state.live.adopt(open_served(second, world.store, like=first, name="forest"))
        assert page.locator("#newer").inner_text() == ""
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.locator("#newer", has_text="of 2 experts").wait_for()
        assert page.locator("#count").inner_text() == "2 experts"
        if PICTURES:
            page.screenshot(path=f"{PICTURES}/newer.png", full_page=True)
        page.goto("about:blank")


def test_nothing_is_fetched_from_elsewhere_and_no_policy_is_broken(page, address):
    """After the flows above. The policy allows files of the server alone, so an inline script or style would have complained."""
    assert all(url.startswith(("http://127.0.0.1:", "about:blank")) for url in page.fetched)
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
