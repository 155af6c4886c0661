"""A client that leaves, at any token, streaming or not, frees its place within a step; a server that is told to stop lets requests end."""

import json
import queue
import socket
import threading
from urllib.parse import urlsplit

import httpx
import pytest

from elmwood.ensemble.batch.interface import Ended, Limits, Said
from elmwood.serve import live
from elmwood.serve.app import create_app
from elmwood.serve.model import open_served
from tests.serve.conftest import serving, start


class Paced:
    """An engine whose steps wait for the test: at the token `hold`, until somebody cancels the request or the test goes on."""

    def __init__(self, engine):
        self.engine, self.hold, self.ended = engine, 0, queue.Queue()
        self.reached, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def submit(self, request, hear):
        heard = []

        def watch(event):
            hear(event)
            heard.append(event)
            if isinstance(event, Ended):
                self.ended.put((event.reason, sum(isinstance(one, Said) for one in heard)))
            elif len(heard) == self.hold:
                self.reached.set()
                assert self.go.wait(60)

        return self.engine.submit(request, watch)

    def cancel(self, number):
        self.engine.cancel(number)
        self.go.set()

    def at(self, token):
        self.hold = token
        self.reached.clear()
        self.go.clear()


@pytest.fixture(scope="module")
def paced(world):
    opened = open_served(world.seed, world.store, limits=Limits(queue=1, running=1))
    opened.engine = Paced(opened.engine)
    return opened


@pytest.fixture(scope="module")
def place(paced):
    with serving(create_app(paced)) as address:
        yield address


def send(address, path, body):
    """A request, sent, and its connection."""
    url, data = urlsplit(address), json.dumps(body).encode()
    opened = socket.create_connection((url.hostname, url.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    opened.sendall(head.encode() + data)
    return opened


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_may_leave_at_any_token(paced, place, path, stream):
    body = {"max_tokens": 100, "stream": stream, "seed": 1}
    body |= {"prompt": "the sea"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "the sea"}]}
    for token in (1, 2, 3, 7):
        paced.engine.at(token)
        connection = send(place, path, body)
        assert paced.engine.reached.wait(60)
        connection.close()
        assert paced.engine.ended.get(timeout=60) == ("cancelled", token), "no step after the one at work"
    counts = paced.engine.counts()
    assert (counts.waiting, counts.running) == (0, 0)


def test_a_full_queue_is_429_and_those_who_wait_may_leave(paced, place):
    paced.engine.at(1)
    body = {"prompt": "the sea", "max_tokens": 2, "seed": 1}
    with send(place, "/v1/completions", body):
        assert paced.engine.reached.wait(60)
        waits = send(place, "/v1/completions", body)
        for _ in range(1000):  # it is read by the server's thread
            if httpx.get(f"{place}/healthz", trust_env=False) and paced.engine.counts().waiting:
                break
        full = httpx.post(f"{place}/v1/completions", json=body, trust_env=False)
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        many = httpx.post(f"{place}/v1/completions", json=body | {"n": 4}, trust_env=False)
        assert many.status_code == 429
        waits.close()  # the engine is told, and goes on
        assert {paced.engine.ended.get(timeout=60)[0] for _ in range(2)} == {"length", "cancelled"}


def test_the_choices_of_one_request_wait_however_short_the_queue(place):
    body = {"prompt": "the sea", "max_tokens": 2, "n": 4, "temperature": 0}
    assert len(httpx.post(f"{place}/v1/completions", json=body, trust_env=False, timeout=60).json()["choices"]) == 4


def test_requests_of_a_model_that_was_replaced_have_a_limit(world, monkeypatch):
    monkeypatch.setattr(live, "LONG", 0.0)
    old, new = (open_served(world.seed, world.store) for _ in range(2))
    engine = old.engine = Paced(old.engine)
    app, answers = create_app(old), []
    with serving(app) as address:
        body = {"prompt": "the sea", "max_tokens": 200}
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{address}/v1/completions", json=body, trust_env=False, timeout=60))
        )
        engine.at(1)
        asking.start()
        assert engine.reached.wait(60)
        app.state.live.adopt(new)
        with engine._changed:
            assert engine._changed.wait_for(lambda: engine._stop, 60)
        engine.go.set()
        asking.join(60)
        assert answers[0].status_code == 503
        assert "newer model" in answers[0].json()["error"]["message"]
        assert httpx.post(f"{address}/v1/completions", json=body | {"max_tokens": 1}, trust_env=False, timeout=60).status_code == 200


def test_a_server_that_stops_lets_requests_end(world):
    opened = open_served(world.seed, world.store)
    opened.engine = engine = Paced(opened.engine)
    running = start(create_app(opened), 60)
    engine.at(2)
    parts = []

    def read():
        wish = {"prompt": "the sea", "max_tokens": 9, "stream": True}
        with httpx.stream("POST", f"{running.address}/v1/completions", json=wish, trust_env=False, timeout=60) as reply:
            parts.extend(line for line in reply.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    assert engine.reached.wait(60)
    running.server.should_exit = True
    engine.go.set()
    reader.join(60)
    running.thread.join(60)
    assert parts[-1] == "data: [DONE]"
    assert json.loads(parts[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
    assert not engine.counts().open
