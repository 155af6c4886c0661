"""Requests passed on to an engine, and its answers passed back as they come. A client that is gone ends the work there too."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import httpx2 as httpx
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from elmwood.serve.answers import place_of
from elmwood.serve.gateway.fleet import Fleet
from elmwood.serve.gateway.pick import Pick, pick, prompts_of, text_of
from elmwood.serve.gateway.upstream import Unreachable, Upstream
from elmwood.serve.messages import Extra
from elmwood.serve.metrics import Meter
from elmwood.serve.model import Served
from elmwood.serve.refusals import Refused, body_of, refusal_of, reply_of

OWN = ("lora_path", "lora", "lora_request", "lora_id")  # fields with which a client would choose adapters past the router
PASSED = ("x-request-id", "traceparent", "tracestate")  # headers that reach the engine; a client's key does not
BACK = ("content-type", "retry-after")  # headers that reach the client
LONG = 8192  # bytes of a request that is routed on another thread
LARGEST = 1 << 26  # bytes of an answer that is not streamed
DONE = b"data: [DONE]"


class Asked(NamedTuple):
    """A request, understood as far as the gateway must."""

    path: str
    given: Mapping[str, Any]  # as it came, for other elmwood servers
    body: Mapping[str, Any]  # for an engine that has one expert for each request
    prompts: list[list[int]]  # tokens, by which each was routed
    picks: list[Pick]
    extra: Extra
    streams: bool


async def answer(request: Request, given: Any, served: Served, fleet: Fleet, meter: Meter) -> Response:
    """POST /v1/completions and /v1/chat/completions. Raises Refused."""
    understood = partial(understand, request.url.path, given, served, await fleet.mixes())
    # a thread must be woken, which on a busy machine takes longer than to route a short text
    size = request.headers.get("content-length", "")
    asked = understood() if size.isdecimal() and int(size) < LONG else await run_in_threadpool(understood)
    headers = {name: value for name in PASSED if (value := request.headers.get(name))}
    note = request.scope.setdefault("elmwood.note", {})
    note["model"] = given.get("model") or "auto"
    work = partial(_several if len(asked.picks) > 1 else _one, asked, headers, served, fleet, meter, note)
    return Relay(work)


def understand(path: str, given: Any, served: Served, mixes: bool) -> Asked:
    """Route a request. `mixes`: the engines mix experts, and route all of its prompts themselves. What engines have and elmwood's own
    server has not passes. Raises Refused."""
    if not isinstance(given, dict):
        raise Refused(400, "the body is no JSON object: send one")
    if wrong := next((name for name in OWN if given.get(name) is not None), None):
        raise Refused(400, f"{wrong} is not for clients: choose an expert with model", wrong, "unsupported_parameter")
    model = given.get("model") or "auto"
    if not isinstance(model, str):
        raise Refused(400, "model is a name", "model", "invalid_value")
    try:
        extra = Extra.model_validate(given.get("elmwood") or {})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise Refused(400, f"elmwood.{'.'.join(map(str, first['loc']))}: {first['msg'][:300]}", "elmwood", "invalid_value") from error
    only, without = served.candidates(model[:300], extra.only, extra.without)
    body = dict(given)
    if path.endswith("/chat/completions"):
        prompts = [served.encode(text_of(given), param="messages")]
    else:
        prompts = prompts_of(given, served)
        if not given.get("echo"):  # text begins with the separator, as experts were trained; an echo is of the text as it came
            body["prompt"] = prompts[0] if len(prompts) == 1 else prompts
    picks = [pick(served.guide, tokens, only, without) for tokens in prompts]
    if mixes or len({one.choice for one in picks}) == 1:
        picks = picks[:1]
    if given.get("stream") and len(picks) > 1:
        raise Refused(400, "these prompts go to different experts: stream them one by one", "prompt", "unsupported_parameter")
    return Asked(path, given, body, prompts, picks, extra, bool(given.get("stream")))


# ---- one engine -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def answered(fleet: Fleet, where: Pick, asked: Asked, headers: Mapping[str, str]) -> AsyncIterator[tuple[Upstream, httpx.Response]]:
    """The answer of an engine, read as far as its headers; of a refusal, all of it. Raises Refused."""
    tried: set[int] = set()
    while True:
        upstream = fleet.choose(where, tried)
        async with AsyncExitStack() as stack:
            try:
                response = await _send(stack, upstream, where, asked, headers)
            except Unreachable:
                tried.add(upstream.number)
                continue
            if response.status_code in (401, 403):
                raise Refused(502, "the engine refuses the gateway's key: see --upstream-key-file", code="upstream_key")
            yield upstream, response
            return


async def _send(stack: AsyncExitStack, upstream: Upstream, where: Pick, asked: Asked, headers: Mapping[str, str]) -> httpx.Response:
    entry = await stack.enter_async_context(upstream.hold(where))
    number = entry.number if entry else 0
    for again in (True, False):
        sent = AsyncExitStack()
        response = await sent.enter_async_context(upstream.send(asked.path, upstream.body(asked.given, asked.body, where), headers))
        if response.status_code >= 400:
            async with sent:
                refusal = await _read(response)
            if again and entry and upstream.kind and upstream.kind.lost(response.status_code, refusal):
                await upstream.again(where.choice, entry, number)
                continue
        else:
            await stack.enter_async_context(sent)
        break
    return response


async def _read(response: httpx.Response) -> bytes:
    """The whole body. Raises Refused."""
    size = response.headers.get("content-length", "")
    if size.isdecimal() and int(size) > LARGEST:
        raise Refused(502, f"the engine's answer has more than {LARGEST >> 20} MB: ask for fewer choices at once", code="upstream_broke")
    try:
        await response.aread()
    except httpx.HTTPError as error:
        raise Refused(502, f"the engine broke off in its answer ({type(error).__name__})", code="upstream_broke") from error
    return response.content


async def _one(
    asked: Asked, headers: Mapping[str, str], served: Served, fleet: Fleet, meter: Meter, note: dict[str, Any], send: Send
) -> None:
    began, where = time.perf_counter(), asked.picks[0]
    with fleet.admit():
        async with answered(fleet, where, asked, headers) as (upstream, response):
            note |= {"expert": where.choice, "upstream": upstream.number}
            back = [(name.encode(), response.headers[name].encode()) for name in BACK if name in response.headers]
            back += [(b"x-elmwood-expert", where.choice.encode()), (b"x-elmwood-upstream", str(upstream.number).encode())]
            adds = asked.extra.provenance and not (upstream.kind and not upstream.kind.load)  # elmwood's own servers say it themselves
            if response.status_code < 400 and response.headers.get("content-type", "").startswith("text/event-stream"):
                back += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
                await send({"type": "http.response.start", "status": response.status_code, "headers": back})
                chunks: AsyncIterator[bytes] = response.aiter_raw()
                if adds:
                    chunks = _with_last_event(chunks, {"choices": [], "elmwood": served.facts() | provenance(served, asked, 0)})
                first = True
                async for chunk in chunks:
                    if first:
                        first = False
                        note["first_byte_s"] = round(time.perf_counter() - began, 4)
                        meter.token(time.perf_counter() - began, True, {where.choice: 1.0})
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                return await send({"type": "http.response.body", "body": b"", "more_body": False})
            raw = await _read(response)
            if adds and response.status_code < 400:
                raw = json.dumps(_with_provenance(_json(raw), served, asked, [0] * len(asked.prompts)), ensure_ascii=False).encode()
            back.append((b"content-length", str(len(raw)).encode()))
            await send({"type": "http.response.start", "status": response.status_code, "headers": back})
            await send({"type": "http.response.body", "body": raw, "more_body": False})


async def _several(
    asked: Asked, headers: Mapping[str, str], served: Served, fleet: Fleet, meter: Meter, note: dict[str, Any], send: Send
) -> None:
    """Prompts that go to different experts: a request for each expert, and one answer of all."""
    groups: dict[str, list[int]] = {}
    for place, where in enumerate(asked.picks):
        groups.setdefault(where.choice, []).append(place)
    several = asked.body["prompt"]
    found: list[Any] = []

    async def ask(places: list[int]) -> tuple[list[int], dict[str, Any]]:
        body = dict(asked.body) | {"prompt": [several[place] for place in places]}
        async with answered(fleet, asked.picks[places[0]], asked._replace(body=body), headers) as (_, response):
            raw = await _read(response)
            if response.status_code >= 400:
                raise Passed(response.status_code, raw)
            return places, _json(raw)

    with fleet.admit():
        tasks = [asyncio.create_task(ask(places)) for places in groups.values()]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    whole = dict(found[0][1])
    whole["choices"] = sorted(
        (choice for places, body in found for choice in _placed(places, body["choices"])), key=lambda one: one["index"]
    )
    if all(isinstance(body.get("usage"), dict) for _, body in found):
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        whole["usage"] = {name: sum(int(body["usage"].get(name) or 0) for _, body in found) for name in names}
    note |= {"expert": list(groups)}
    if asked.extra.provenance:
        whole = _with_provenance(whole, served, asked, list(range(len(asked.prompts))))
    headers_back = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers_back})
    await send({"type": "http.response.body", "body": json.dumps(whole, ensure_ascii=False).encode(), "more_body": False})


class Passed(Exception):
    """A refusal of an engine, in its own words."""

    def __init__(self, status: int, raw: bytes):
        self.status, self.raw = status, raw


def _placed(places: Sequence[int], choices: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choices of some prompts, with their indices among those of all prompts."""
    count = len(choices) // len(places)
    return [choice | {"index": places[choice["index"] // count] * count + choice["index"] % count} for choice in choices]


def _json(raw: bytes) -> dict[str, Any]:
    """Raises Refused."""
    try:
        found = json.loads(raw)
        found["choices"]
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(502, "the engine's answer is none of an OpenAI server", code="upstream_broke") from error
    return found


# ---- which expert answered ------------------------------------------------------------------------------------------


def provenance(served: Served, asked: Asked, prompt: int) -> dict[str, Any]:
    """The expert of a prompt, and those that might have answered."""
    choice = asked.picks[min(prompt, len(asked.picks) - 1)].choice
    found: dict[str, Any] = {"experts": [{"id": choice, "name": served.expert_name(choice), "weight": 1.0}]}
    if served.guide:
        found["candidates"] = [place_of(place) for place in served.guide.look(asked.prompts[prompt])[:32]]
    return found


def _with_provenance(body: dict[str, Any], served: Served, asked: Asked, pick_of: Sequence[int]) -> dict[str, Any]:
    count = max(1, len(body["choices"]) // len(asked.prompts))
    choices = [
        choice | {"elmwood": provenance(served, asked, min(choice["index"] // count, len(asked.prompts) - 1))} for choice in body["choices"]
    ]
    return body | {"choices": choices, "elmwood": served.facts()}


async def _with_last_event(chunks: AsyncIterator[bytes], event: dict[str, Any]) -> AsyncIterator[bytes]:
    """A stream of events with one more before [DONE]."""
    left = b""
    async for chunk in chunks:
        *lines, left = (left + chunk).split(b"\n")
        for line in lines:
            if line.startswith(DONE):
                yield b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
            yield line + b"\n"
    if left:
        yield left


# ---- the client -----------------------------------------------------------------------------------------------------


class Relay(Response):
    """A response that work writes as it comes; a client that is gone ends the work."""

    def __init__(self, work: Callable[[Send], Awaitable[None]]):
        super().__init__()
        self.work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = events = False

        async def watched(message: Message) -> None:
            nonlocal began, events
            if message["type"] == "http.response.start":
                began, events = True, any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            await send(message)

        work = asyncio.ensure_future(self.work(watched))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                scope.setdefault("elmwood.note", {})["gone"] = True
                return
            work.result()
        except OSError:  # Starlette's servers say so where the client has left
            scope.setdefault("elmwood.note", {})["gone"] = True
        except Passed as refusal:
            await Response(refusal.raw, refusal.status, media_type="application/json")(scope, receive, send)
        except Exception as error:
            error = Refused(502, f"the engine broke off ({type(error).__name__})", code="upstream_broke") if _is_http(error) else error
            if not began:
                return await reply_of(refusal_of(error))(scope, receive, send)
            if not events:
                raise
            data = json.dumps(
                body_of(refusal_of(error)), ensure_ascii=False
            )  # the status is sent: the error is the last event, without [DONE]
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for task in (work, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


def _is_http(error: Exception) -> bool:
    return isinstance(error, httpx.HTTPError | httpx.StreamError)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
