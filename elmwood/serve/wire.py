"""Answers on the wire, whole or as server-sent events, the same for completions and chats."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from elmwood.serve.answers import Answer, Choice, Delta, Gone, provenance
from elmwood.serve.messages import Asked
from elmwood.serve.metrics import Meter
from elmwood.serve.model import Served
from elmwood.serve.refusals import Refused, body_of, refusal_of
from elmwood.serve.spelling import Placed

LEAST = -9999.0  # a log-probability of minus infinity, which JSON has not


class Style(Protocol):
    """How an API spells choices."""

    object: str
    chunk: str  # the object of a streamed part
    prefix: str  # of ids

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first streamed part of a choice, where it has one before any text."""
        ...

    def part(self, delta: Delta) -> dict[str, Any]:
        """A streamed part."""
        ...

    def whole(self, choice: Choice, text: str, tokens: Sequence[Placed]) -> dict[str, Any]: ...


async def respond(request: Request, served: Served, asked: Asked, choices: Sequence[Choice], style: Style, meter: Meter) -> Response:
    """Run the choices of a request. Raises Refused, Gone."""
    if asked.stream_options and not asked.stream:
        raise Refused(400, "stream_options are of streams: leave them out, or set stream", "stream_options", "invalid_value")
    answer = Answer(served, choices, meter, request.receive)
    head = {"id": f"{style.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
    head["system_fingerprint"] = served.fingerprint
    note = request.scope.setdefault("elmwood.note", {})
    if asked.stream:
        await answer.__aenter__()  # what is refused is refused before a stream begins
        return Stream(_events(answer, asked, style, head, note), answer)
    async with answer:
        texts: list[list[str]] = [[] for _ in choices]
        tokens: list[list[Placed]] = [[] for _ in choices]
        async with aclosing(answer.deltas()) as deltas:
            async for delta in deltas:
                texts[delta.choice].append(delta.piece.text)
                tokens[delta.choice] += delta.piece.tokens
        found = []
        for choice in choices:
            one = style.whole(choice, "".join(texts[choice.number]), tokens[choice.number])
            if asked.elmwood.provenance:
                one["elmwood"] = provenance(served, choice)
                if asked.elmwood.tokens:
                    one["elmwood"]["by_token"] = by_token(served, tokens[choice.number])
            found.append(one)
        note |= _noted(answer, asked)
        body = {**head, "object": style.object, "choices": found, "usage": answer.usage}
        if asked.elmwood.provenance:
            body["elmwood"] = served.facts()
        return JSONResponse(body)


async def _events(
    answer: Answer, asked: Asked, style: Style, head: dict[str, Any], note: dict[str, Any]
) -> AsyncIterator[dict[str, Any] | None]:
    """The objects of a stream; None is its end."""
    served, counted = answer.served, bool(asked.stream_options and asked.stream_options.include_usage)
    base: dict[str, Any] = {**head, "object": style.chunk} | ({"usage": None} if counted else {})
    for choice in answer.choices:
        if (opening := style.opening(choice)) is not None:
            yield base | {"choices": [opening]}
    async with aclosing(answer.deltas()) as deltas:
        async for delta in deltas:
            part, extra = style.part(delta), {}
            if asked.elmwood.provenance:
                own: dict[str, Any] = {"by_token": by_token(served, delta.piece.tokens)} if asked.elmwood.tokens else {}
                if delta.finish:
                    own |= provenance(served, answer.choices[delta.choice])
                    extra["elmwood"] = served.facts()
                part |= {"elmwood": own} if own else {}
            yield base | {"choices": [part]} | extra
    note |= _noted(answer, asked)
    if counted:
        yield base | {"choices": [], "usage": answer.usage}
    yield None


def by_token(served: Served, tokens: Sequence[Placed]) -> list[dict[str, Any]]:
    """The weights of the experts at each token; `start` is its place in the text of the choice."""
    return [
        {
            "token": served.token_name(placed.said.token), "id": placed.said.token, "start": placed.start,
            "weights": {digest: round(weight, 5) for digest, weight in placed.said.weights.items()},
        }
        for placed in tokens
    ]  # fmt: skip


def finite(logprob: float) -> float | None:
    """A log-probability as JSON has it; None for a token that was given."""
    return None if logprob != logprob else max(logprob, LEAST)


def _noted(answer: Answer, asked: Asked) -> dict[str, Any]:
    """For the log."""
    first = None if answer.first is None else round(answer.first, 4)
    return {"model": asked.model, **answer.usage, "finish": [choice.finish for choice in answer.choices], "first_token_s": first}


class Stream(Response):
    """Server-sent events. A client that is gone ends the work at once, whether or not something is being sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any] | None], answer: Answer):
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events, self.answer = events, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.events:
                data = "[DONE]" if event is None else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
                await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        except Gone:
            scope.setdefault("elmwood.note", {})["gone"] = True
            return
        except OSError:  # Starlette's servers say so where the client has left
            scope.setdefault("elmwood.note", {})["gone"] = True
            return
        except Exception as error:  # the status is sent: the error is the last event, and [DONE] does not follow
            data = json.dumps(body_of(refusal_of(error)), ensure_ascii=False)
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        finally:
            await self.answer.__aexit__(None, None, None)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
