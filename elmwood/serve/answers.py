"""Requests on the engine, followed from the event loop: what each choice says, piece by piece. A client that is gone frees its rows."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self

from starlette.types import Receive

from elmwood.ensemble.batch.interface import Ended, Event, Request, Said
from elmwood.errors import BadInput
from elmwood.serve.messages import Asked
from elmwood.serve.metrics import Meter
from elmwood.serve.model import Served, too_long
from elmwood.serve.refusals import Refused
from elmwood.serve.spelling import Piece, Speller

CHOICES = 128  # of one request, all prompts together


class Gone(Exception):
    """The client has closed the connection."""


class Delta(NamedTuple):
    """What is new of a choice."""

    choice: int
    piece: Piece
    finish: str | None = None  # "stop" or "length": its last delta


class Choice:
    """One continuation: its text, and what it was made of."""

    def __init__(self, number: int, tokens: Sequence[int], skipped: int, spelled: Sequence[bytes], stops: Sequence[str], request: Request):
        self.number, self.tokens, self.request = number, tokens, request
        self.prompt = Speller(spelled)  # its echo
        self._begin: Callable[[int], Speller] = lambda start: Speller(spelled, stops, start)
        self.made: Speller | None = None
        self.given = tokens[: 1 - skipped]  # of the prompt's text, and not predicted: a separator that we put there is not its text
        self.completion = 0  # tokens
        self.finish: str | None = None
        self.weight: dict[str, float] = {}  # summed over the tokens that were predicted

    def hear(self, event: Event) -> list[Delta]:
        """The deltas of an event."""
        found: list[Piece] = []
        if self.given and self.request.echo:
            found.append(self.prompt.push(Said(self.given[0], float("nan"), (), prompt=True)))
            self.given = ()
        if self.made is None and not (isinstance(event, Said) and event.prompt):
            if self.request.echo:
                found.append(self.prompt.end())
            self.made = self._begin(self.prompt.place)
        if isinstance(event, Said):
            for digest, weight in event.weights.items():
                self.weight[digest] = self.weight.get(digest, 0.0) + weight
            if event.prompt:
                found.append(self.prompt.push(event))
            elif self.made:
                self.completion += 1
                found.append(self.made.push(event))
                self.finish = "stop" if self.made.stopped else None
        elif self.made:
            found.append(self.made.end())
            self.finish = event.reason
        deltas = [Delta(self.number, piece) for piece in found if piece.text or piece.tokens]
        if not self.finish:
            return deltas
        last = deltas.pop().piece if deltas else Piece("", ())
        return [*deltas, Delta(self.number, last, self.finish)]

    def shares(self) -> dict[str, float]:
        """The mean weight of each candidate, the heaviest first."""
        total = sum(self.weight.values()) or 1.0
        return {digest: weight / total for digest, weight in sorted(self.weight.items(), key=lambda item: (-item[1], item[0]))}


class Answer:
    """The choices of one request, at work. Leaving the block ends what is not finished."""

    def __init__(self, served: Served, choices: Sequence[Choice], meter: Meter, receive: Receive):
        self.served, self.choices, self.meter, self.receive = served, choices, meter, receive
        self.began = time.perf_counter()
        self.first: float | None = None  # seconds to the first token
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._numbers: dict[int, int] = {}  # choice -> the engine's number

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()

        def hear_of(choice: int) -> Callable[[Event], None]:
            def hear(event: Event) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody listens
                    loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

            return hear

        try:
            for choice in self.choices:
                self._numbers[choice.number] = self.served.engine.submit(choice.request, hear_of(choice.number))
        except BaseException as error:
            self._cancel()
            if isinstance(error, BadInput) and (choice.request.only or choice.request.without):
                raise Refused(400, str(error), "elmwood", "invalid_value") from error
            raise
        self._watch = asyncio.create_task(self._until_gone())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cancel()
        self._watch.cancel()
        with suppress(asyncio.CancelledError):
            await self._watch
        self.meter.finished(self.choices, self.first)

    def _cancel(self) -> None:
        for number in self._numbers.values():
            self.served.engine.cancel(number)
        self._numbers.clear()

    async def _until_gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

    async def deltas(self) -> AsyncGenerator[Delta]:
        """All deltas, as they come. Raises Refused where the engine failed, Gone where the client has left."""
        last = dict.fromkeys(range(len(self.choices)), self.began)
        while self._numbers:
            event = await self._events.get()
            if event is None:
                raise Gone
            number, said = event
            if number not in self._numbers:
                continue  # it was stopped by a string
            choice = self.choices[number]
            if isinstance(said, Said) and not said.prompt:
                now = time.perf_counter()
                self.first = now - self.began if self.first is None else self.first
                self.meter.token(now - last[number], not choice.completion, said.weights)
                last[number] = now
            if isinstance(said, Ended) and said.reason == "error":
                raise Refused(said.status, said.detail or "the engine failed", code="engine_error")
            if isinstance(said, Ended) and said.reason == "cancelled":
                why = "the server closes, or serves a newer model since long: send the request again"
                raise Refused(503, why, code="closing", headers={"Retry-After": "5"})
            for delta in choice.hear(said):
                yield delta
            if choice.finish:
                engine_number = self._numbers.pop(number)
                if not isinstance(said, Ended):
                    self.served.engine.cancel(engine_number)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and those that were generated."""
        prompts = {id(choice.tokens): len(choice.tokens) for choice in self.choices}
        given, made = sum(prompts.values()), sum(choice.completion for choice in self.choices)
        return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


def plan(
    served: Served, asked: Asked, prompts: Sequence[tuple[Sequence[int], int]], *, most: int | None, logprobs: int = 0, echo: bool = False
) -> list[Choice]:
    """The choices of a request. A prompt is its tokens, and how many of them at its beginning are no text of the client's. Raises
    Refused."""
    count, context = asked.n or 1, served.engine.context
    if not 1 <= len(prompts) * count <= CHOICES:
        raise Refused(400, f"{len(prompts)} prompts with {count} choices each: a request has from 1 to {CHOICES} choices", "prompt")
    only, without = served.candidates(asked.model, asked.elmwood.only, asked.elmwood.without)
    rng_seed = secrets.randbits(31) if asked.seed is None else asked.seed % (1 << 62)
    temperature = 1.0 if asked.temperature is None else asked.temperature
    found: list[Choice] = []
    for tokens, skipped in prompts:
        room = context - len(tokens)
        if room < 1 and not (most == 0 and room >= -1 and (echo or room >= 0)):
            raise too_long(f"{len(tokens):,} tokens", context, "prompt")
        if not tokens:
            raise Refused(400, "a prompt has no tokens: write something", "prompt")
        for _ in range(count):
            number = len(found)
            request = Request(
                tuple(tokens), max(0, room) if most is None else most, 0.0 if temperature < 1e-3 else temperature,
                1.0 if asked.top_p is None else asked.top_p, rng_seed + number, logprobs=logprobs, echo=echo, only=only, without=without,
                joins=number > 0,
            )  # fmt: skip
            found.append(Choice(number, tokens, skipped, served.spelled, asked.stops, request))
    return found


def provenance(served: Served, choice: Choice) -> dict[str, Any]:
    """Which experts answered, and which might have."""
    found: dict[str, Any] = {
        "experts": [
            {"id": digest, "name": served.expert_name(digest), "weight": round(weight, 6)} for digest, weight in choice.shares().items()
        ],
        "tokens": choice.completion,
    }
    if served.guide:
        found["candidates"] = [place_of(place) for place in served.guide.look(choice.tokens)[:32]]
    return found


def place_of(place: Any) -> Mapping[str, Any]:
    """A candidate of a dry run."""
    weight = None if place.weight is None else round(place.weight, 6)
    return {"id": place.digest, "name": place.name, "distance2": place.dist2, "weight": weight}
