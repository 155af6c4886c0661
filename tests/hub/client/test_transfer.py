"""Uploads and downloads through a connection that is cut again and again: right at the end, and little is sent twice."""

import os
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress

import pytest
from live_hub import TEXTS, draft, live_hub
from small_run import RECIPE

from elmwood.hub.client import transfer
from elmwood.hub.client.http import Hub, Problem
from elmwood.hub.client.probe import boot_id
from elmwood.hub.client.transfer import begin_upload, fetch_blob, offset_of, send
from elmwood.hub.messages import Claim, Consent, Grant, NewAccount
from elmwood.hub.signing import load_or_make_key, secret_hash
from elmwood.store import Store

PIECE = 1 << 14
SIZE = 9 * PIECE + 123


@pytest.fixture(scope="module")
def live(run):
    with live_hub(draft(run, RECIPE), run.store, "cuts") as opened:
        yield opened


@contextmanager
def cutting(url, every):
    """A proxy that cuts each connection after so many bytes of either direction; its address, and what went through."""
    there, counted = ("127.0.0.1", int(url.rpartition(":")[2])), {"up": 0, "down": 0, "cuts": 0}
    listening, opened = socket.socket(), []
    listening.bind(("127.0.0.1", 0))
    listening.listen(16)

    def pump(source, sink, way, both):
        left = every
        try:
            while piece := source.recv(4096):
                sink.sendall(piece[:left])
                counted[way] += len(piece[:left])
                if (left := left - len(piece)) <= 0:
                    counted["cuts"] += 1
                    break
        except OSError:
            pass
        for one in both:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes the other direction

    def accept():
        while True:
            try:
                near = listening.accept()[0]
            except OSError:
                return
            far = socket.create_connection(there)
            opened.extend((near, far))
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threads.append(threading.Thread(target=pump, args=(source, sink, way, (near, far)), daemon=True))
                threads[-1].start()

    accepting, threads = threading.Thread(target=accept, daemon=True), []
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", counted
    finally:
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        accepting.join()
        for one in threads:
            one.join()
        for one in (listening, *opened):
            one.close()


def leased(hub, live, folder):
    """An account, consent and a lease."""
    hub.post("/v1/accounts", NewAccount(name="a", recovery=secret_hash("a code of some length")), "a")
    hub.post("/v1/consents", Consent(licences=live.signed.body["licences"], manifest=1), "b")
    return Grant.model_validate_json(hub.post("/v1/leases", Claim(tier="cpu", boot_id=boot_id(folder)), "c").body)


def test_an_upload_that_is_cut_again_and_again_arrives_whole(live, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PIECE", PIECE)
    path, key = tmp_path / "adapter", load_or_make_key(tmp_path / "key")
    path.write_bytes(os.urandom(SIZE))
    with cutting(live.url, 3 * PIECE) as (url, counted), closing(Hub(url, key, sleep=lambda seconds: None)) as hub:
        grant = leased(hub, live, tmp_path)
        upload = begin_upload(path, grant.lease, grant.token, hub, "d")
        assert begin_upload(path, grant.lease, grant.token, hub, "d") == upload
        send(path, upload, hub)
        assert offset_of(upload, hub) == SIZE
        assert counted["cuts"] >= 3
        assert counted["up"] <= SIZE + (counted["cuts"] + 2) * (PIECE + 4096)  # a piece for each cut, and headers
        with pytest.raises(Problem) as caught:  # a stranger's lease
            begin_upload(path, grant.lease, grant.token + 1, hub, "e")
        assert caught.value.status in (404, 409)


def test_a_download_that_is_cut_goes_on_from_where_it_was(live, run, tmp_path, monkeypatch):
    blob = run.seed.files["model.safetensors"]
    size = run.store.path(blob).stat().st_size
    with cutting(live.url, size // 4) as (url, counted), closing(Hub(url, sleep=lambda seconds: None)) as hub:
        assert fetch_blob(blob, hub, Store(tmp_path / "store")).stat().st_size == size
        assert counted["cuts"] >= 3
        assert counted["down"] <= size + (counted["cuts"] + 1) * 4096


def test_a_clock_that_is_wrong_by_a_day_is_put_right_by_the_hub(live, tmp_path):
    key = load_or_make_key(tmp_path / "key")
    with closing(Hub(live.url, key, clock=lambda: time.time() - 86400)) as hub:
        hub.post("/v1/accounts", NewAccount(name="b", recovery=secret_hash("another code of some length")), "f")
        assert abs(hub.skew - 86400) < 60


def test_a_request_that_is_sent_again_is_done_once(live, tmp_path):
    key = load_or_make_key(tmp_path / "key")
    with closing(Hub(live.url, key)) as hub:
        account = NewAccount(name="c", recovery=secret_hash("one more code of some length"))
        first, second = (hub.post("/v1/accounts", account, "g").json() for _ in range(2))
        assert first == second
    assert TEXTS
