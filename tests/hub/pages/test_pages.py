"""The pages in a real browser: nothing for axe to find in either colour scheme, keyboard alone, no request to elsewhere, no script of a
stranger."""

import re
from pathlib import Path

import pytest

from tests.hub.pages.community import EVIL

AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def paths(cast):
    """All pages, by name."""
    return {
        "overview": "/", "domains": "/domains", "domain": "/domains/2", "expert": f"/experts/{cast.accepted[0]}",
        "retired": f"/experts/{cast.accepted[-1]}", "members": "/members", "member": f"/members/{cast.callers[2].account}",
        "queue": "/queue", "attacks": "/attacks", "join": "/join", "missing": "/domains/77",
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(browser, address):
    """One tab for all tests, which notes what it fetched and what it complained of."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    opened = context.new_page()
    opened.fetched, opened.complaints = [], []
    opened.on("request", lambda request: opened.fetched.append(request.url))
    opened.on("console", lambda message: opened.complaints.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("dialog", lambda dialog: (opened.complaints.append(dialog.message), dialog.dismiss()))
    yield opened
    context.close()


def test_no_page_has_a_fault_that_axe_finds_in_light_or_dark(page, paths, address):
    page.complaints.clear()
    for name, path in paths.items():
        reply = page.goto(address + path)
        assert reply.status == (404 if name == "missing" else 200), name
        page.evaluate(AXE)
        for scheme, rules in (("light", ""), ("dark", ", runOnly: ['color-contrast']")):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            found = page.evaluate(
                f"axe.run({{resultTypes: ['violations']{rules}}}).then(r => r.violations.map(v => [v.id, v.nodes[0].html]))"
            )
            assert not found, f"{name}, {scheme}: {found}"
        assert page.locator("h1").count() == 1
        assert page.evaluate("document.querySelectorAll('main svg[role=img]:not([aria-label])').length") == 0
    assert [line for line in page.complaints if "404" not in line] == []


def test_nothing_is_fetched_from_elsewhere_and_no_policy_is_broken(page, address):
    """After all pages were visited. The policy allows files of the hub alone, so an inline script or style would have complained."""
    assert page.fetched
    assert all(url.startswith(address + "/") for url in page.fetched)
    assert {url.rpartition("/")[2] for url in page.fetched if "/static/" in url} >= {"style.css", "htmx.min.js", "hub.js"}


def test_pages_fit_narrow_screens_and_200_per_cent(page, paths, address):
    """640 pixels are 1280 at 200 %; 320 are what WCAG's reflow asks for. Wide tables scroll inside their own box."""
    for name in ("overview", "domains", "expert", "queue"):
        page.goto(address + paths[name])
        for width in (640, 320):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} at {width} pixels"
    page.set_viewport_size({"width": 1280, "height": 900})


def test_the_keyboard_reaches_everything(page, address):
    """Skip link, pages, then a table that unfolds."""
    page.goto(address + "/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash + document.activeElement.id") == "#mainmain"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.locator("details table").is_visible()
    page.locator("nav a", has_text="Domains").focus()
    page.keyboard.press("Enter")
    page.wait_for_url(address + "/domains")
    assert page.locator("nav a[aria-current=page]").inner_text() == "Domains"
    assert page.evaluate("getComputedStyle(document.querySelector('.map .dots g')).transitionDuration") == "0s"


def test_pages_poll_only_while_they_are_wanted(page, address):
    """A tab in the background asks nothing, nor does one whose reader switched it off."""
    page.goto("about:blank")
    page.clock.install()
    page.goto(address + "/queue")
    with page.expect_response(address + "/queue"):
        page.clock.fast_forward(3500)
    from playwright.sync_api import expect

    page.locator("#now").wait_for()
    expect(page.locator(".htmx-request")).to_have_count(0)
    page.locator("#live").uncheck()
    page.fetched.clear()
    page.clock.fast_forward(10_000)
    page.locator("#live").check()
    page.evaluate("Object.defineProperty(document, 'hidden', {get: () => true, configurable: true})")
    page.clock.fast_forward(10_000)
    page.evaluate("delete document.hidden")
    assert page.fetched == []
    with page.expect_response(address + "/queue"):
        page.clock.fast_forward(3500)


def test_a_stranger_s_name_is_text(page, paths, address):
    """Names, clients, machines and documents that hold a script are shown as they are written."""
    page.complaints.clear()
    for name in ("overview", "domains", "members", "expert", "queue"):
        page.goto(address + paths[name])
        assert page.locator("script:not([src])").count() == 0
        assert page.locator("img").count() == 0
    assert page.complaints == []
    assert page.goto(address + paths["member"])
    assert page.locator("h1").inner_text() == EVIL
    for hostile in ("/experts/%3Cscript%3E", "/members/'%22%3E%3Cimg%20src=x%3E", "/static/..%2f..%2fapp.py", "/static/hub.css"):
        body = page.request.get(address + hostile).text()
        assert "<script>" not in re.sub(r'<script src="/static/[a-z.]+" defer></script>', "", body)
        assert "<img" not in body


def test_pages_show_what_the_hub_knows(page, paths, address):
    """The numbers are those of the actions."""
    page.goto(address + paths["overview"])
    text = page.locator("main").inner_text()
    for part in ("2 of 6", "2.077", "+0.0213", "± 0.0011", "+0.0032", "a copy of an earlier expert", "retired"):
        assert part in text, part
    page.goto(address + paths["members"])
    ledger = page.locator("section[aria-labelledby=ledger] tbody").inner_text()
    assert "−0.0042" in ledger
    assert "+0.0123" in ledger
    assert "0.0123" in page.locator("section[aria-labelledby=members] tbody tr").first.inner_text()
    page.goto(address + paths["expert"])
    verdict = page.locator("section[aria-labelledby=verdict]").inner_text()
    assert "at least 0.002" in verdict
    assert "0.0121" not in verdict, "what was measured on secret text has one digit"
    page.goto(address + paths["queue"])
    assert "1.2e-05" in page.locator("#health + dl").inner_text()
    assert page.locator("section[aria-labelledby=leases] tbody tr").count() == 2
    assert page.locator("section[aria-labelledby=waiting] tbody tr").count() == 1
