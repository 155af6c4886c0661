"""/v1/completions and /v1/chat/completions."""

import time
from collections.abc import Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from elmwood.serve.answers import Choice, Delta, plan
from elmwood.serve.messages import Chat, Completion, parse
from elmwood.serve.metrics import Meter
from elmwood.serve.model import Served
from elmwood.serve.refusals import Refused
from elmwood.serve.spelling import Placed
from elmwood.serve.wire import finite, respond

USUAL = 16  # tokens of a completion, where nothing is said


class Completions:
    """Text."""

    object = chunk = "text_completion"
    prefix = "cmpl"

    def __init__(self, served: Served, logprobs: int | None):
        self.served, self.logprobs = served, logprobs

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return None

    def part(self, delta: Delta) -> dict[str, Any]:
        return self._spell(delta.choice, delta.piece.text, delta.piece.tokens, delta.finish)

    def whole(self, choice: Choice, text: str, tokens: Sequence[Placed]) -> dict[str, Any]:
        return self._spell(choice.number, text, tokens, choice.finish)

    def _spell(self, number: int, text: str, tokens: Sequence[Placed], finish: str | None) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Placed]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        name = self.served.token_name
        found = [(name(said.token), finite(said.logprob), said.top, start) for said, start in tokens]
        return {
            "tokens": [token for token, *_ in found], "token_logprobs": [logprob for _, logprob, *_ in found],
            "top_logprobs": [
                None if logprob is None else {token: logprob} | {name(other): finite(value) for other, value in reversed(top)}
                for token, logprob, top, _ in found
            ],
            "text_offset": [start for *_, start in found],
        }  # fmt: skip


class Chats:
    """Messages."""

    object, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, served: Served, logprobs: int | None):
        self.served, self.logprobs = served, logprobs

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return {"index": choice.number, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def part(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.piece.text} if delta.piece.text else {}
        return {"index": delta.choice, "delta": content, "logprobs": self._logprobs(delta.piece.tokens), "finish_reason": delta.finish}

    def whole(self, choice: Choice, text: str, tokens: Sequence[Placed]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice.number, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": choice.finish}

    def _logprobs(self, tokens: Sequence[Placed]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        return {
            "content": [self._one(said.token, said.logprob) | {"top_logprobs": [self._one(*one) for one in said.top]} for said, _ in tokens]
        }

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.served.token_name(token), "logprob": finite(logprob), "bytes": list(self.served.spelled[token])}


async def complete(request: Request, given: Any, served: Served, meter: Meter) -> Response:
    """POST /v1/completions. Raises Refused."""
    asked = parse(Completion, given)
    prompts = [(tokens, skipped) for tokens, skipped in await run_in_threadpool(_prompts, asked, served)]
    choices = plan(
        served, asked, prompts, most=USUAL if asked.most is None else asked.most, logprobs=asked.logprobs or 0, echo=bool(asked.echo)
    )
    return await respond(request, served, asked, choices, Completions(served, asked.logprobs), meter)


def _prompts(asked: Completion, served: Served) -> list[tuple[list[int], int]]:
    """The tokens of each prompt, and how many at its beginning are ours: text gets a separator before it, tokens are taken as they are."""
    given = asked.prompt
    if isinstance(given, str):
        return [(served.encode(given), 1)]
    if not given:
        raise Refused(400, "the list of prompts is empty: send one prompt or several", "prompt", "invalid_value")
    if isinstance(given[0], int):
        return [(_checked(given, served), 0)]
    return [(served.encode(one), 1) if isinstance(one, str) else (_checked(one, served), 0) for one in given]


def _checked(tokens: Any, served: Served) -> list[int]:
    """Raises Refused."""
    if not tokens or min(tokens) < 0 or max(tokens) >= served.engine.vocabulary:
        raise Refused(400, f"a prompt of tokens has at least one, each from 0 to {served.engine.vocabulary - 1}", "prompt", "invalid_value")
    return list(tokens)


async def chat(request: Request, given: Any, served: Served, meter: Meter) -> Response:
    """POST /v1/chat/completions. Raises Refused."""
    asked = parse(Chat, given)
    if asked.top_logprobs and not asked.logprobs:
        raise Refused(400, "top_logprobs needs logprobs: set it to true", "top_logprobs", "invalid_value")
    tokens = await run_in_threadpool(served.chat, asked.messages, time.time())
    count = (asked.top_logprobs or 0) if asked.logprobs else None
    choices = plan(served, asked, [(tokens, 1)], most=asked.most, logprobs=count or 0)
    return await respond(request, served, asked, choices, Chats(served, count), meter)
