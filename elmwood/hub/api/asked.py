"""What routes share: the opened hub, signed requests, limits, and answers."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from ipaddress import IPv6Network
from typing import Annotated, TypeVar

from fastapi import Depends, Request, Response
from limits import RateLimitItemPerHour, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.concurrency import run_in_threadpool

from elmwood.hub import signing
from elmwood.hub.actions import request as asked
from elmwood.hub.actions.request import Caller
from elmwood.hub.database import Connection
from elmwood.hub.home import Hub
from elmwood.hub.rules import Refusal, older_client
from elmwood.records import Frozen

T = TypeVar("T")
NAME = 200  # characters of an Idempotency-Key


class Signed:
    """A request whose signature holds."""

    def __init__(self, hub: Hub, request: Request, known: asked.Request):
        self.hub, self.request, self.known = hub, request, known

    async def act(
        self, fn: Callable[[Connection, Caller], Frozen], status: int = 200, *, new: bool = False, again: bool = False
    ) -> Response:
        """Do something, once; the answer when it is durable. `again`: to do it twice is to do it once, so no reply is kept. Raises
        Refusal."""
        known = self.known._replace(name="") if again else self.known
        found = await write(self.hub, lambda c: asked.perform(c, known, fn, self.hub.moment(), status, new))
        if isinstance(found, Refusal):
            raise found
        return Response(found.body, found.status, media_type="application/json")

    async def look(self, fn: Callable[[Connection, Caller], T]) -> T:
        """Read something as the one who signed. Raises Refusal."""
        return await read(self.hub, lambda c: fn(c, asked.find_caller(c, self.known.key)))

    @property
    def proof(self) -> str:
        """The signed request as JSON, to be kept."""
        headers = {name: self.request.headers[name] for name in (signing.KEY, signing.TIME, signing.NONCE, signing.SIGNATURE)}
        body = getattr(self.request, "_body", b"").decode(errors="replace")
        return json.dumps({"method": self.request.method, "target": target(self.request), "body": body} | headers)


def hub_of(request: Request) -> Hub:
    return request.app.state.hub


async def write(hub: Hub, fn: Callable[[Connection], T]) -> T:
    return await asyncio.wrap_future(hub.database.submit(fn))


async def read(hub: Hub, fn: Callable[[Connection], T]) -> T:
    return await run_in_threadpool(hub.read, fn)


def target(request: Request) -> str:
    """Path and query as sent."""
    path = request.scope.get("raw_path", request.url.path.encode()).decode("ascii", "replace").partition("?")[0]
    query = request.scope["query_string"].decode("ascii", "replace")
    return f"{path}?{query}" if query else path


async def signed(request: Request) -> Signed:
    """The signature of a request. Raises Refusal: 401, with the hub's time."""
    hub, now = hub_of(request), time.time()
    body = await request.body()
    try:
        caller = signing.check_request(request.method, target(request), body, request.headers, now)
    except signing.Forged as error:
        what, _, cure = str(error).partition(": ")
        raise Refusal(401, "bad-signature", what, do=cure, time=int(now)) from None
    request.app.state.limits.check(caller.key, "requests_per_minute")
    name = request.headers.get("Idempotency-Key", "")
    if len(name) > NAME:
        raise Refusal(422, "long-key", f"the Idempotency-Key has {len(name)} characters, {NAME} are read", do="use a shorter one")
    sha = hashlib.sha256(f"{request.method}\n{target(request)}\n".encode() + body).hexdigest()
    return Signed(hub, request, asked.Request(caller.key, caller.nonce, caller.time, sha, name))


async def signed_or_not(request: Request) -> Signed | None:
    """A signed request, or one without any signature."""
    if signing.SIGNATURE in request.headers:
        return await signed(request)
    return None


async def recent(request: Request) -> None:
    """Whether the client is new enough. Raises Refusal: 426."""
    hub = hub_of(request)
    client, least = request.headers.get("Elmwood-Client", "0"), await read(hub, lambda c: asked.current(c).minimum_client)
    if older_client(client, least):
        raise Refusal(426, "old-client", f"this run needs elmwood {least}, the client is {client}", do="pip install --upgrade elmwood")


Here = Annotated[Hub, Depends(hub_of)]
Whose = Annotated[Signed, Depends(signed)]
MaybeWhose = Annotated[Signed | None, Depends(signed_or_not)]
Recent = Depends(recent)


class Limiter:
    """How often a key or an address may ask, counted in this process."""

    def __init__(self, hub: Hub):
        self.hub, self.counter = hub, SlidingWindowCounterRateLimiter(MemoryStorage())
        self.most: dict[str, int] = {}  # as the manifest of the start says

    def check(self, who: str, what: str) -> None:
        """Count one request. Raises Refusal: 429 with Retry-After."""
        if what not in self.most:
            try:
                self.most[what] = self.hub.read(lambda c: getattr(asked.current(c).limits, what))
            except Refusal:  # nothing is published
                return
        most = self.most[what]
        item = RateLimitItemPerHour(most) if what.endswith("hour") else RateLimitItemPerMinute(most)
        if not self.counter.hit(item, who, what):
            wait = max(self.counter.get_window_stats(item, who, what).reset_time - time.time(), 1.0)
            raise Refusal(429, "too-many", f"{most} are allowed ({what.replace('_', ' ')})", do="wait", retryable=True, retry_after=wait)


def network(request: Request) -> str:
    """Where a request came from: an IPv4 address, or the first 64 bits of an IPv6 one, which one household has.

    uvicorn takes it from X-Forwarded-For where the connection is from a proxy that it trusts (FORWARDED_ALLOW_IPS).
    """
    host = request.client.host if request.client else "unknown"
    try:
        return str(IPv6Network((host.partition("%")[0], 64), strict=False))
    except ValueError:
        return host
