"""A hub that serves in a process of its own, for benches that ask it over HTTP, or kill it.

`Server(folder)` is a new process with all its imports; `Server(folder, nursery)` is forked by one that has imported already.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any, NamedTuple

import httpx

from benches.common import cpu_seconds

SERVE = """
import os, sys
from elmwood.hub import app
from elmwood.hub.care import serve
from elmwood.hub.home import Home, Hub
from elmwood.store import Store

def run(folder, port):
    hub = Hub(Home("test", Store(folder)))
    try:
        serve(hub, "127.0.0.1", int(port))
    finally:
        hub.close()
"""
ALONE = f"{SERVE}\nrun(*sys.argv[1:])"
FORKS = (
    SERVE
    + """
import alembic.command, alembic.runtime.environment, uvicorn.lifespan.on, uvicorn.loops.uvloop, uvicorn.protocols.http.httptools_impl
for line in sys.stdin:
    what, *words = line.split()
    if what == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(words[0]), 0)[1]), flush=True)
        continue
    process = os.fork()
    if not process:
        run(*words)
        os._exit(0)
    print(process, flush=True)
"""
)


class Nursery:
    """A process that has imported what a hub needs, and forks hubs: killing one costs the next start no imports."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", FORKS], stdin=PIPE, stdout=PIPE, text=True)

    def ask(self, *words: object) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


class Server:
    """The hub of a folder as a process. `seconds`: until it answered."""

    def __init__(self, folder: Path, nursery: Nursery | None = None):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        self.url, self.nursery = f"http://127.0.0.1:{port}", nursery
        began = time.perf_counter()
        self.process = None if nursery else subprocess.Popen([sys.executable, "-c", ALONE, str(folder), str(port)])
        self.pid = nursery.ask("fork", folder, port) if nursery else self.process.pid if self.process else 0
        with httpx.Client(base_url=self.url, timeout=5, verify=False) as client:
            while True:
                try:
                    client.get("/readyz").raise_for_status()
                    break
                except httpx.HTTPError:
                    assert not self.process or self.process.poll() is None, "the hub did not start"
                    assert time.perf_counter() - began < 600, "the hub did not start"
                    time.sleep(0.02)
        self.seconds = time.perf_counter() - began

    def cpu(self) -> float:
        """Seconds of CPU time that it took so far."""
        return cpu_seconds(self.pid)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, how)
        if self.nursery:
            self.nursery.ask("wait", self.pid)
        elif self.process:
            self.process.wait(60)


class Answer(NamedTuple):
    """What a hub said. Names of headers are in lower case."""

    status_code: int
    headers: dict[str, str]
    text: str


class Wire:
    """Connections to a hub that stay open, each for one request at a time. It takes a tenth of the CPU time of a client library, whose pool
    looks at all that wait for each request: with thousands of workers that is most of what is measured."""

    def __init__(self, url: str, connections: int):
        self.host, _, self.port = url.removeprefix("http://").partition(":")
        self.free: asyncio.LifoQueue[Any] = asyncio.LifoQueue()
        for _ in range(connections):
            self.free.put_nowait(None)

    async def post(self, target: str, content: str, headers: dict[str, str]) -> Answer:
        """Raises ConnectionError where the connection was closed: it may have been idle for too long."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        data = content.encode()
        sent = f"POST {target} HTTP/1.1\r\nHost: hub\r\nContent-Length: {len(data)}\r\n{lines}\r\n".encode() + data
        pair = await self.free.get()
        try:
            reader, writer = pair = pair or await asyncio.open_connection(self.host, int(self.port))
            writer.write(sent)
            first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            found = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest if line)}
            body = await reader.readexactly(int(found.get("content-length", 0)))
            return Answer(int(first.split()[1]), found, body.decode())
        except (OSError, asyncio.IncompleteReadError) as error:
            if pair:
                pair[1].close()
            pair = None
            raise ConnectionError("closed") from error
        finally:
            self.free.put_nowait(pair)

    async def close(self) -> None:
        while not self.free.empty():
            if pair := self.free.get_nowait():
                pair[1].close()
                await pair[1].wait_closed()
