"""Disks that are full, object stores that fail, and connections that send too slowly or too much."""

import http.client
import itertools
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from sqlalchemy import select

from elmwood.errors import DoesNotFit
from elmwood.hub import care
from elmwood.hub.app import JSON_BYTES
from elmwood.hub.blobs import Unreachable
from elmwood.hub.database import Database
from elmwood.hub.messages import Limits
from elmwood.hub.tables import nonce, submission, upload
from elmwood.report import connections
from tests.hub.served import serve
from tests.hub.server.people import Person
from tests.hub.server.world import adapter, keys, open_run

# ---- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    words = [] if os.getuid() == 0 else ["sudo", "-n"]
    made = (
        shutil.which("mount")
        and not subprocess.run(
            [*words, "mount", "-t", "tmpfs", "-o", f"size=24m,uid={os.getuid()},mode=700", "tmpfs", place], capture_output=True
        ).returncode
    )
    if not made:
        pytest.skip("a small file system can be mounted by root alone")
    yield place
    subprocess.run([*words, "umount", "-l", place], check=True)


@pytest.fixture
def closing_hub():
    """A function that opens a run in a folder, and closes it at the end."""
    made = []

    def make(*given, **named):
        made.append(open_run(*given, **named))
        return made[-1]

    yield make
    for hub in made:
        hub.close()


def test_a_disk_that_is_full_during_an_upload_and_a_commit_loses_nothing(small_disk, closing_hub, started):
    """28: 507 and what was kept, while the hub answers; with room again the upload goes on; what nobody continues is freed."""
    hub = closing_hub(small_disk / "store", limits=Limits(chunk_bytes=1000, upload_s=100))
    client = started(hub)
    member, verifier = Person(client).enter(), Person(client, keys(hub)["verifier"])
    grant, data = member.claim().json(), adapter(1)
    member.promise(grant, data)
    name = member.begin(grant, len(data))
    member.part(f"/v1/uploads/{name}", 0, data[:300], status=204)
    before = hub.read(lambda c: [dict(row) for row in c.all(select(upload))])
    ballast = small_disk / "ballast"
    fill(ballast)
    refused = member.part(f"/v1/uploads/{name}", 300, data[300:])
    assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (507, "full", True)
    assert float(refused.headers["Retry-After"]) > 0
    assert {member.beat(grant, step, status=None).status_code for step in range(1, 6)} == {507}  # the database has no room either
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == client.get("/queue").status_code == 200
    assert hub.read(lambda c: [dict(row) for row in c.all(select(upload))]) == before
    ballast.unlink()
    assert member.ask("HEAD", f"/v1/uploads/{name}").headers["Upload-Offset"] == "300"
    member.part(f"/v1/uploads/{name}", 300, data[300:], status=204)
    member.post("/v1/submissions", member.submission(grant, data, name), status=202)
    assert verifier.verify().json()["state"] == "accepted"
    assert [finding for finding in care.doctor(hub) if not finding.good] == []
    left = member.claim().json()
    other = member.begin(left, len(data))
    member.part(f"/v1/uploads/{other}", 0, data[:300], status=204)
    assert (hub.blobs.uploads / other).exists()
    hub.clock._uptime += 101
    hub.tick()
    assert [path for path in hub.blobs.uploads.rglob("*") if path.is_file()] == []
    assert member.ask("HEAD", f"/v1/uploads/{other}").status_code == 404


def fill(path):
    """Take all room that is left."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass


def test_a_database_without_room_refuses_the_whole_group_and_goes_on(database: Database):
    """28: at the commit. SQLite's own error, from a limit of pages; the writer opens its next connection without it."""
    database.write(lambda c: c.insert(nonce, key="a", nonce="1", expires=0))
    pages = database.read(lambda c: c.run("PRAGMA page_count").fetchone()[0])
    database.write(lambda c: c.run(f"PRAGMA max_page_count = {pages}") and None)
    held = threading.Event()
    first = database.submit(lambda c: held.wait(60))
    many = [database.submit(lambda c, n=n: c.insert(nonce, key="b", nonce=f"{n}" * 900, expires=0)) for n in range(10)]
    held.set()
    for future in (first, *many):
        with pytest.raises(DoesNotFit, match="full"):
            future.result()
    assert [row["key"] for row in database.read(lambda c: c.all(select(nonce)))] == ["a"]
    database.write(lambda c: c.insert(nonce, key="c", nonce="1", expires=0))
    assert [row["key"] for row in database.read(lambda c: c.all(select(nonce)))] == ["a", "c"]


# ---- an object store that fails -------------------------------------------------------------------------------------


@contextmanager
def between(url, plan):
    """A proxy before an S3 server. `plan(number, method, path)` is called for each request, and gives the status to answer instead, or
    None. Its address, and what was asked: methods, paths and headers."""
    asked, there = [], urlsplit(url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.command, self.path, {name.lower() for name in self.headers}))
            status = plan(len(asked), self.command, self.path)
            if status:
                self.answer(status, {}, b"")
                return
            with closing(http.client.HTTPConnection(there.hostname, there.port, timeout=30)) as server:
                server.request(self.command, self.path, body, dict(self.headers))
                reply = server.getresponse()
                self.answer(reply.status, {name: value for name, value in reply.getheaders() if name not in HOPS}, reply.read())

        def answer(self, status, headers, body):
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


HOPS = {"Connection", "Transfer-Encoding", "Keep-Alive", "Date", "Server"}


def test_an_object_store_that_fails_now_and_then_or_for_a_while(s3, monkeypatch, tmp_path, closing_hub, started):
    """29: what fails once is tried again; what fails for longer is a 503 that ends by itself. Nothing is accepted twice, no list is asked
    for, and no conditional write."""
    state = {"every": 3, "away": False}

    def plan(number, method, path):
        return 503 if state["away"] or (state["every"] and number % state["every"] == 0) else None

    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    with between(s3["AWS_ENDPOINT"], plan) as (url, asked):
        monkeypatch.setenv("AWS_ENDPOINT", url)
        hub = closing_hub(tmp_path / "store", blobs="s3://hub/faulty")
        client = started(hub)
        member, verifier = Person(client).enter(), Person(client, keys(hub)["verifier"])
        grant, data = member.claim().json(), adapter(1)
        member.promise(grant, data)
        name = member.begin(grant, len(data))
        state["away"] = True
        refused = member.part(f"/v1/uploads/{name}", 0, data)
        assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (503, "away", True)
        assert float(refused.headers["Retry-After"]) > 0
        with pytest.raises(Unreachable):
            hub.blobs.probe()
        assert member.beat(grant).json()["alive"]
        state["away"] = False
        member.part(f"/v1/uploads/{name}", 0, data, status=204)
        bodies = [member.post("/v1/submissions", member.submission(grant, data, name), status=202).json() for _ in range(2)]
        assert bodies[0] == bodies[1]
        assert verifier.verify().json()["state"] == "accepted"
        assert client.get(f"/v1/blobs/{bodies[0] and member.submission(grant, data, name)['adapter']}").content == data
        assert "written and read" in hub.blobs.probe()
        state["every"] = 0
        assert [finding for finding in care.doctor(hub) if not finding.good] == []
        assert len(hub.read(lambda c: c.all(select(submission)))) == 1
    assert not [path for method, path, _ in asked if "list-type" in path or (method == "GET" and urlsplit(path).path.count("/") < 3)]
    assert not [path for _, path, headers in asked if headers & {"if-match", "if-none-match", "if-modified-since", "if-unmodified-since"}]


# ---- connections ----------------------------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path, monkeypatch, closing_hub):
    """Where a hub of short patience answers."""
    monkeypatch.setattr(connections, "SILENCE", 0.3)
    hub = closing_hub(tmp_path / "store")
    with serve(hub) as url:
        yield urlsplit(url).hostname, urlsplit(url).port


def until_closed(there, pieces, pause=0.0):
    """Send pieces until the other end closes; what it said."""
    with socket.create_connection(there, timeout=30) as one:
        with suppress(OSError):
            for piece in pieces:
                one.sendall(piece)
                one.settimeout(pause or 30)
                with suppress(TimeoutError):
                    if not one.recv(1, socket.MSG_PEEK):
                        break
                    break  # it answers
            one.settimeout(30)
        said = b""
        with suppress(OSError):
            while part := one.recv(1 << 16):
                said += part
    return said


def test_connections_that_send_slowly_are_cut(address):
    """32: no request, a header, or a body that comes byte by byte, each byte in time."""
    began = time.monotonic()
    assert until_closed(address, []) == b""
    assert until_closed(address, [b"GET / HTTP/1.1\r\nHost: x\r\n", *(b"X-Name: y\r\n" for _ in range(10_000))], 0.02) == b""
    head = b"POST /v1/leases HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    assert until_closed(address, [head, *([b"x"] * 1000)], 0.02).startswith(b"HTTP/1.1 408")
    assert until_closed(address, [head]).startswith(b"HTTP/1.1 408")
    chunked = b"POST /v1/leases HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    endless = (b"10000\r\n" + b" " * 65536 + b"\r\n" for _ in range(10_000))
    assert until_closed(address, [chunked, *itertools.islice(endless, 40)], 0.001).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - began < 60


def test_headers_without_end_are_cut_and_a_request_after_a_request_is_not(address):
    """32."""
    endless = (b"X-Name: " + b"y" * 60_000 + b"\r\n" for _ in range(1000))
    assert until_closed(address, [b"GET / HTTP/1.1\r\nHost: x\r\n", *endless], 0.001)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
    with closing(http.client.HTTPConnection(*address, timeout=30)) as one:
        for _ in range(3):
            one.request("GET", "/healthz")
            assert one.getresponse().read().startswith(b'{"state":"up"')
            time.sleep(0.0)


def test_a_body_of_many_keys_is_answered_in_little_time_and_space(closing_hub, tmp_path, started):
    """32: as many as go into a body."""
    client = started(closing_hub(tmp_path / "store"))
    member = Person(client).enter()
    body = json.dumps({"tier": "cpu", "boot_id": "b007b007"} | {f"k{n}": n for n in range(60_000)}).encode()
    assert len(body) < JSON_BYTES
    began = time.process_time()
    reply = member.ask("POST", "/v1/leases", body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, len(reply.content) < 5000) == (422, True)
    assert time.process_time() - began < 5
    began = time.process_time()
    assert client.post("/v1/leases", content=body, headers={"Content-Type": "application/json"}).status_code == 401
    assert time.process_time() - began < 1
