"""Every page is served from SQLite and from PostgreSQL, with the same words."""

from tests.hub.pages.community import NAMES, populate


def test_every_page_is_the_same_on_each_database(make_hub, started):
    hub = make_hub(6)
    client = started(hub)
    assert client.get("/").status_code == 200  # before anybody came
    cast = populate(hub)
    paths = ["/", "/domains", "/domains/0", "/members", "/queue", "/attacks", "/join"]
    paths += [f"/experts/{digest}" for digest in cast.accepted] + [f"/members/{caller.account}" for caller in cast.callers]
    pages = {path: client.get(path) for path in paths}
    assert {path: reply.status_code for path, reply in pages.items()} == dict.fromkeys(paths, 200)
    assert all("default-src 'none'" in reply.headers["content-security-policy"] for reply in pages.values())
    assert "2 of 6" in pages["/"].text
    assert "−0.0042" in pages["/members"].text  # what was taken back
    assert "0.0123" in pages["/members"].text
    assert [name for name in NAMES if name in pages["/members"].text] == ["ada", "grace", "linus"]  # the fourth is escaped
    assert client.get("/experts/none").status_code == 404
