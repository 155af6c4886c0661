"""Connections and bodies are bounded: in bytes, and in the time that they may take."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from elmwood.hub.messages import Problem

JSON_BYTES = 1 << 20  # of a body that is no part of an upload
PART_BYTES = (64 << 20) + 1
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


def problem(status: int, made: Problem, headers: dict[str, str] | None = None) -> Response:
    return Response(made.model_dump_json(), status, headers, "application/problem+json")


class BoundBodies:
    """Bodies are bounded before they are read, must not stand still, nor come byte by byte; encoded ones are refused.

    What is wrong while an app reads is an HTTPException: FastAPI hands no other error on.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        most = PART_BYTES if scope["method"] == "PATCH" else JSON_BYTES
        if headers.get("content-encoding", "identity") != "identity":
            return await _refuse(415, "encoded", "bodies are sent as they are", "send it without Content-Encoding")(scope, receive, send)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            return await _refuse(413, "too-large", f"a body has {most} bytes at most", "send less")(scope, receive, send)
        seen, since = 0, time.monotonic()

        async def bounded() -> Message:
            nonlocal seen
            if ended:
                return await receive()
            left = since + SILENCE + seen / SLOWEST - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(min(SILENCE, left), 0.0))
            except TimeoutError:
                said = f"the body takes too long: {SLOWEST:.0f} bytes a second at least, and no pause of {SILENCE:.0f} s"
                raise HTTPException(408, said, {"Connection": "close"}) from None
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(413, f"a body has {most} bytes at most", {"Connection": "close"})
            if message["type"] == "http.request" and not message.get("more_body"):
                ended.append(True)
            return message

        ended: list[bool] = []
        await self.app(scope, bounded, send)


def _refuse(status: int, code: str, detail: str, do: str) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    return problem(status, Problem(code=code, detail=detail, do=do), {"Connection": "close"})
