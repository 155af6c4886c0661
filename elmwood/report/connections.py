"""Connections of every server: bounded in bytes and in time, and for the names that a server has. How it says so is the server's own."""

import asyncio
import ipaddress
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_BYTES = 64 << 10  # of the headers of a request
SILENCE = 30.0  # seconds that a body may stand still, and that headers may take
SLOWEST = 1000.0  # bytes a second of a body, on average


class Prompt(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # chosen by what is installed
    """A connection of uvicorn that is closed where the headers of a request take longer than `SILENCE`, or more than `HEAD_BYTES`.

    uvicorn itself waits for ever for the rest of a request that began.
    """

    waiting: asyncio.TimerHandle | None = None
    head = 0  # bytes that came while no request was known

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._busy():
            self._stop()
        else:
            self.head += len(data)
            if self.head > HEAD_BYTES:
                self.transport.close()
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _busy(self) -> bool:
        """Whether a request is known that is not yet answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _expect(self) -> None:
        if self.waiting is None:
            self.waiting = asyncio.get_running_loop().call_later(SILENCE, self._late)

    def _late(self) -> None:
        if not self._busy() and not self.transport.is_closing():
            self.transport.close()

    def _stop(self) -> None:
        self.head = 0
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None


class Unwelcome(HTTPException):
    """A request that no route sees, or whose body is not read to its end. FastAPI hands no other error on from there."""

    def __init__(self, status: int, code: str, detail: str, do: str):
        super().__init__(status, detail, {"Connection": "close"})
        self.code, self.do = code, do


Refuse = Callable[[Unwelcome], Response]


class BoundBodies:
    """Bodies are bounded before they are read, must not stand still, nor come byte by byte; encoded ones are refused."""

    def __init__(self, app: ASGIApp, most: Callable[[Scope], int], refuse: Refuse):
        """`most`: bytes that a request's body may have."""
        self.app, self.most, self.refuse = app, most, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        large = Unwelcome(413, "too-large", f"a body has {(most := self.most(scope)):,} bytes at most", "send less")
        if headers.get("content-encoding", "identity") != "identity":
            wrong = Unwelcome(415, "encoded", "bodies are sent as they are", "send it without Content-Encoding")
            return await self.refuse(wrong)(scope, receive, send)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            return await self.refuse(large)(scope, receive, send)
        seen, since, ended = 0, time.monotonic(), False

        async def bounded() -> Message:
            nonlocal seen, ended
            if ended:
                return await receive()
            left = since + SILENCE + seen / SLOWEST - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(min(SILENCE, left), 0.0))
            except TimeoutError:
                said = f"the body takes too long: {SLOWEST:.0f} bytes a second at least, and no pause of {SILENCE:.0f} s"
                raise Unwelcome(408, "too-slow", said, "send it again") from None
            seen += len(message.get("body", b""))
            if seen > most:
                raise large
            ended = message["type"] == "http.request" and not message.get("more_body")
            return message

        await self.app(scope, bounded, send)


# ---- names ------------------------------------------------------------------------------------------------------------


class Hosts:
    """Requests name this server by one of its names, by `localhost` or by an address: else a page of the web whose name leads to this
    machine (DNS rebinding) may read a server that listens for this machine alone."""

    def __init__(self, app: ASGIApp, names: Collection[str], refuse: Refuse):
        self.app, self.names, self.refuse = app, {name.lower().rstrip(".") for name in (*names, "localhost")}, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]
        if scope["type"] != "http" or all(self._is_ours(host_of(one)) for one in given):
            return await self.app(scope, receive, send)
        wrong = Unwelcome(
            421,
            "host",
            f"this server is not called {given[0][:100]!r}",
            "start it with --host-name NAME, or ask by its address",
        )
        await self.refuse(wrong)(scope, receive, send)

    def _is_ours(self, name: str) -> bool:
        return name in self.names or is_address(name)


def host_of(header: str) -> str:
    """The name in a Host header, without its port."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def names_of(host: str, given: Sequence[str] = ()) -> list[str]:
    """The names that requests to a server that listens at `host` must use; none: any will do. It is checked where names are given, and
    where only this machine can reach the server."""
    loopback = host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
    return [host, *given] if loopback or given else []
