"""Which names reach a server, over a real app, and what a page whose name was rebound gets."""

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from elmwood.report.connections import BoundBodies, Hosts, host_of, names_of


def refuse(error):
    return PlainTextResponse(f"{error.code}: {error.detail}", error.status_code, error.headers)


async def size(request):
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture(scope="module")
def client():
    app = Starlette(routes=[Route("/", size, methods=["GET", "POST"])])
    app.add_middleware(BoundBodies, most=lambda scope: 10, refuse=refuse)
    app.add_middleware(Hosts, names=names_of("127.0.0.1", ["models.example.org."]), refuse=refuse)
    with TestClient(app, base_url="http://localhost") as found:
        yield found


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("10.1.2.3", 200),
        ("models.example.org", 200), ("Models.Example.Org.:443", 200), ("rebound.example", 421), ("rebound.example:8000", 421),
        ("127.0.0.1.rebound.example", 421), ("localhost.rebound.example", 421), ("models.example.org.evil", 421), ("", 421),
        ("127.0.0.1@rebound.example", 421), ("[::1].rebound.example", 200),
    ],
)  # fmt: skip
def test_only_names_of_the_server_reach_it(client, host, status):
    """What a browser sends is what stands in its address bar, and no browser opens the last one."""
    reply = client.get("/", headers={"host": host})
    assert reply.status_code == status, reply.text


def test_a_server_for_all_checks_names_where_it_is_told_some():
    assert names_of("0.0.0.0") == names_of("models.example.org") == []
    assert names_of("0.0.0.0", ["a.example"]) == ["0.0.0.0", "a.example"]
    assert names_of("::1") == ["::1"]
    assert names_of("localhost", ["b"]) == ["localhost", "b"]
    assert host_of("[fe80::1]:80") == "fe80::1"


def test_bodies_are_bounded_with_and_without_their_length(client):
    assert client.post("/", content=b"x" * 10).text == "10"
    assert client.post("/", content=b"x" * 11).text.startswith("too-large")
    assert client.post("/", content=iter([b"x" * 6, b"x" * 6])).status_code == 413
    assert client.post("/", content=b"x", headers={"content-encoding": "gzip"}).status_code == 415
