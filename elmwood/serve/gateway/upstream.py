"""One engine that answers, spoken to over its own API: which adapters it has, how one is loaded, and a request passed on.

The contracts, as read in their code: vLLM 0.32 (entrypoints/serve/lora, with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1), SGLang 0.5.23
(entrypoints/http_server.py), and elmwood's own server, whose replicas load experts by themselves.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import httpx2 as httpx

from elmwood.errors import ElmwoodError, shorten
from elmwood.serve.gateway.book import Book, Entry
from elmwood.serve.gateway.pick import Pick
from elmwood.serve.logs import logger
from elmwood.serve.refusals import Refused

TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # seconds: an answer that is not streamed comes whole
POOL = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)  # uvicorn closes idle ones after 5 s
ROOM = 30.0  # seconds that a request waits for one of the adapters in use to be free
LARGEST = 1 << 20  # bytes of an engine's word about itself, or of a refusal


class Unreachable(ElmwoodError):
    """Nobody answers there."""


class Kind(NamedTuple):
    """How an engine is spoken to."""

    load: str | None  # path; None: it loads adapters itself
    unload: str | None
    model: Callable[[str, str], str]  # (base, adapter) -> what a request calls it
    lost: Callable[[int, bytes], bool]  # whether a refusal says that the adapter is not there


def _not_found(status: int, body: bytes) -> bool:
    return status == 404


def _never_loaded(status: int, body: bytes) -> bool:
    return status in (400, 404, 500) and b"has never been loaded" in body


KINDS = {
    "vllm": Kind("/v1/load_lora_adapter", "/v1/unload_lora_adapter", lambda base, name: name, _not_found),
    "sglang": Kind("/load_lora_adapter", "/unload_lora_adapter", lambda base, name: f"{base}:{name}", _never_loaded),
    "elmwood": Kind(None, None, lambda base, name: name, lambda status, body: False),
}


Check = Callable[["Upstream", Any], Awaitable[None]]  # (engine, cards of its /v1/models): raises Unreachable where it is the wrong one


class Upstream:
    """One engine. All methods run on the event loop of the server.

    `folder_of`: the folder of an expert's adapter, as the engine sees it, written where it is missing; `digests`: the experts that are
    served; `find`: its address by now, which starts it where it does not run.
    """

    def __init__(
        self, url: str, number: int, most: int, digests: Container[str], folder_of: Callable[[str], str], check: Check,
        key: str | None = None, find: Callable[[], str] | None = None, clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.url, self.number, self.digests, self.folder_of, self.check, self.find, self.clock = (
            url,
            number,
            digests,
            folder_of,
            check,
            find,
            clock,
        )
        self.client = httpx.AsyncClient(
            base_url=url, timeout=TIMEOUT, limits=POOL, trust_env=False, follow_redirects=False,
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        )  # fmt: skip
        self.book = Book(most)
        self.kind: Kind | None = None  # known once it has been met
        self.base = ""  # the name of the seed there
        self.up = False
        self.retry_at = 0.0  # when it may be asked again
        self.reason = "it was not asked yet"
        self.running = self.waiting = self.failed = 0
        self.load_seconds = 0.0
        self._tasks: dict[str, asyncio.Task[None]] = {}  # loads, and ways out
        self._meeting: asyncio.Task[None] | None = None
        self._room = asyncio.Condition()

    async def close(self) -> None:
        for task in [*self._tasks.values(), *([self._meeting] if self._meeting else [])]:
            task.cancel()
            with suppress(asyncio.CancelledError, ElmwoodError):
                await task
        await self.client.aclose()

    # ---- whether it is there ------------------------------------------------------------------------------------------

    async def meet(self) -> None:
        """Ask who it is and what it holds, once for all who wait. Raises Unreachable."""
        if self.up:
            return
        if self.clock() < self.retry_at:
            raise Unreachable(self.reason)
        if self._meeting is None or self._meeting.done():
            self._meeting = self._spawn(self._meet())
        await asyncio.shield(self._meeting)

    async def _meet(self) -> None:
        try:
            if self.find:
                self.url = await asyncio.to_thread(self.find)
                self.client.base_url = httpx.URL(self.url)
            reply = await self.client.get("/v1/models", timeout=10.0)
            cards = reply.json()["data"] if reply.status_code == 200 else None
            if not cards:
                raise Unreachable(f"{self.url}/v1/models has status {reply.status_code}: is it an OpenAI server, and is the key right?")
            found = KINDS.get(str(cards[0].get("owned_by")))
            if found is None:
                raise Unreachable(f"{self.url} is a server of {cards[0].get('owned_by')!r}; the gateway knows {', '.join(KINDS)}")
            await self.check(self, cards)
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError, Unreachable) as error:
            self.fell(error)
            raise Unreachable(self.reason) from error
        self.kind, self.base = found, str(next((card["id"] for card in cards if not card.get("parent")), cards[0]["id"]))
        if found.load:
            self.book.found(card["id"] for card in cards if card["id"] in self.digests)
        self.up = True
        logger.info("upstream", extra={"fields": {"upstream": self.number, "state": "up"}})

    def fell(self, error: Exception, pause: float = 1.0) -> None:
        """It does not answer: it is left alone for a moment, then met again."""
        self.reason = str(error) if isinstance(error, Unreachable) else f"{self.url} does not answer ({type(error).__name__}: {error})"
        if self.up or self.retry_at == 0.0:
            logger.warning("upstream", extra={"fields": {"upstream": self.number, "state": "down", "reason": shorten(self.reason)}})
        self.up, self.retry_at = False, self.clock() + pause

    @staticmethod
    def _spawn(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        task.add_done_callback(_retrieve)
        return task

    # ---- adapters -----------------------------------------------------------------------------------------------------

    def wanted(self, pick: Pick) -> Sequence[str]:
        """The experts that a request needs here."""
        return pick.near if self.kind and not self.kind.load else pick.alone

    @asynccontextmanager
    async def hold(self, pick: Pick) -> AsyncIterator[Entry | None]:
        """Keep the expert of a request there for as long as the block lasts; none for the seed. Raises Refused, Unreachable."""
        await self.meet()
        self.running += 1
        entry = None
        try:
            if self.kind and not self.kind.load:
                self.book.touch(pick.near)
            elif pick.alone:
                entry = await self._enter(pick.choice)
            yield entry
        finally:
            self.running -= 1
            if entry:
                entry.users -= 1
                await self._wake()

    async def _enter(self, name: str) -> Entry:
        until = self.clock() + ROOM
        while True:
            step = self.book.want(name)
            if step.entry:
                try:
                    if step.do == "load":
                        self._tasks[name] = self._spawn(self._load(name))
                    if step.do != "go":
                        await asyncio.shield(self._tasks[name])
                except BaseException:
                    step.entry.users -= 1
                    await self._wake()
                    raise
                return step.entry
            if step.do == "unload":
                if step.name not in self._tasks:
                    self._tasks[step.name] = self._spawn(self._unload(step.name))
                await asyncio.shield(self._tasks[step.name])
            else:
                await self._queue(until)

    async def _queue(self, until: float) -> None:
        self.waiting += 1
        try:
            async with self._room, asyncio.timeout(max(0.0, until - self.clock())):
                await self._room.wait()
        except TimeoutError as error:
            raise Refused(
                503, f"all {self.book.most} adapters of the engine were in use for {ROOM:.0f} s: try again, or raise --max-adapters",
                code="no_room", headers={"Retry-After": "5"},
            ) from error  # fmt: skip
        finally:
            self.waiting -= 1

    async def _wake(self) -> None:
        async with self._room:
            self._room.notify_all()

    async def again(self, name: str, entry: Entry, number: int) -> None:
        """The engine does not know an expert that it had: it has restarted. Load it again, once for all who find out."""
        if self.book.lost(name, number):
            self._tasks[name] = self._spawn(self._load(name))
        if name in self._tasks:
            await asyncio.shield(self._tasks[name])

    async def _load(self, name: str) -> None:
        began = self.clock()
        try:
            if self.kind and self.kind.load:
                try:
                    folder = await asyncio.to_thread(self.folder_of, name)
                except OSError as error:
                    raise Refused(503, f"the adapter cannot be written for the engine: {error}", code="adapters") from error
                reply = await self._post(self.kind.load, {"lora_name": name, "lora_path": folder})
                if reply.status_code != 200 and not _loaded_already(reply.content):
                    raise Refused(502, f"the engine does not load expert {name[:8]}: {_reason(reply)}", code="upstream_refused_adapter")
            self.book.loaded(name)
        except BaseException:
            self.failed += 1
            self.book.gone(name)
            raise
        finally:
            self.load_seconds += self.clock() - began
            self._tasks.pop(name, None)
            await self._wake()

    async def _unload(self, name: str) -> None:
        try:
            if self.kind and self.kind.unload:
                reply = await self._post(self.kind.unload, {"lora_name": name})
                if reply.status_code not in (200, 404):
                    fields = {"upstream": self.number, "expert": name, "reason": shorten(_reason(reply))}
                    logger.warning("unload", extra={"fields": fields})
        finally:
            self.book.gone(name)
            self._tasks.pop(name, None)
            await self._wake()

    def retire(self) -> None:
        """Take out experts that are served no more."""
        for name in self.book.retire(self.digests):
            self._tasks[name] = self._spawn(self._unload(name))

    async def _post(self, path: str, body: Any) -> httpx.Response:
        try:
            return await self.client.post(path, json=body)
        except httpx.HTTPError as error:
            self.fell(error)
            raise Unreachable(self.reason) from error

    # ---- requests -----------------------------------------------------------------------------------------------------

    def body(self, given: Mapping[str, Any], body: Mapping[str, Any], pick: Pick) -> Mapping[str, Any]:
        """A request in the engine's words: the expert, or the seed, by its name there. Other elmwood servers read it as it came."""
        assert self.kind
        if not self.kind.load:
            return given
        model = self.base if pick.choice == "seed" else self.kind.model(self.base, pick.choice)
        return {name: value for name, value in body.items() if name != "elmwood"} | {"model": model}

    @asynccontextmanager
    async def send(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> AsyncIterator[httpx.Response]:
        """A response whose body is not yet read. A connection that the engine closed while it lay idle is opened again, once.
        Raises Unreachable where it cannot be connected to; Refused where it breaks off."""
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        request = self.client.build_request("POST", path, content=content, headers=dict(headers) | {"Content-Type": "application/json"})
        try:
            try:
                response = await self.client.send(request, stream=True)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                response = await self.client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self.fell(error)
            raise Unreachable(self.reason) from error
        except httpx.TimeoutException as error:
            raise Refused(504, f"the engine gave no answer in {TIMEOUT.read:.0f} s", code="upstream_timeout") from error
        except httpx.HTTPError as error:
            self.fell(error)
            raise Refused(502, f"the engine broke off: {self.reason}", code="upstream_broke") from error
        try:
            yield response
        finally:
            await response.aclose()


def _loaded_already(body: bytes) -> bool:
    """Names are digests, so what has the name has the content."""
    return b"already been loaded" in body or b"already loaded" in body


def _reason(reply: httpx.Response) -> str:
    """What an engine says of a refusal, in one line."""
    try:
        found = reply.json()
        if reply.status_code == 404 and "error" not in found:
            return "it has no such path: start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, SGLang with --enable-lora"
        found = found.get("error_message") or found.get("error") or found
        return shorten(str(found.get("message", found) if isinstance(found, dict) else found))
    except (ValueError, TypeError, AttributeError):
        return f"status {reply.status_code}: {reply.text[:200]}"


def _retrieve(task: "asyncio.Task[None]") -> None:
    """An error of a task for which nobody waits any more is in the log already, or in the refusals of those who did."""
    if not task.cancelled():
        task.exception()
