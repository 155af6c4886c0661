"""The engine for any LM: one thread, and each request in turn takes one step.

V vocabulary, T tokens
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor

from elmwood.ensemble.batch.choice import allowed, choose
from elmwood.ensemble.batch.interface import NONE, USUAL, Busy, Counts, Ended, Event, Limits, Request, Said
from elmwood.ensemble.decode import Rule, pick
from elmwood.errors import BadInput, ElmwoodError
from elmwood.lm.devices import ran_out

PIECE = 256  # tokens of a prompt that are read in one turn
logger = logging.getLogger("elmwood.serve")


class Work:
    """A request that waits or runs."""

    def __init__(self, number: int, request: Request, hear: Callable[[Event], None], steps: Iterator[list[Said] | Ended]):
        self.number, self.request, self.hear, self.steps, self.cancelled = number, request, hear, steps, False


class Turns:
    """See interface.py."""

    def __init__(self, lm: Any, limits: Limits = USUAL):
        self.lm, self.limits = lm, limits
        self.context, self.vocabulary, self.separator, self.stops = lm.context, lm.vocabulary, lm.separator, lm.stops
        self.experts = tuple(expert.digest for expert in getattr(lm, "mixture", lm).experts.experts)
        self._numbers, self._failed = count(1), 0
        self._waiting: deque[Work] = deque()
        self._running: list[Work] = []
        self._closing = self._stop = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="elmwood-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, hear: Callable[[Event], None]) -> int:
        check(request, self.context, self.vocabulary, [*self.experts, "seed"])
        lm = choose(self.lm, request.only, request.without)
        with self._changed:
            if self._closing or (len(self._waiting) >= self.limits.queue and not request.joins):
                raise Busy("the server closes" if self._closing else f"{len(self._waiting)} requests wait already: ask again later")
            work = Work(next(self._numbers), request, hear, steps(lm, request))
            self._waiting.append(work)
            self._changed.notify_all()
        return work.number

    def cancel(self, number: int) -> None:
        with self._changed:
            for work in (*self._waiting, *self._running):
                work.cancelled |= work.number == number
            self._changed.notify_all()

    def counts(self) -> Counts:
        with self._changed:
            waiting, running = len(self._waiting), len(self._running)
        experts = len(self.experts)
        return Counts(
            waiting=waiting, running=running, rows=running, experts=experts, resident=experts, failed=self._failed, open=not self._closing
        )

    def close(self, drain_s: float = 0.0) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and not self._running, drain_s)
            self._stop = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        """The engine's thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._stop)
                while self._waiting and (len(self._running) < self.limits.running or self._waiting[0].cancelled):
                    self._running.append(self._waiting.popleft())
                turn = list(self._running)
                if self._stop and not turn:
                    return
            for work in turn:
                if self._step(work):
                    with self._changed:
                        self._running.remove(work)
                        self._changed.notify_all()

    def _step(self, work: Work) -> bool:
        """One turn of a request; whether it has ended."""
        if work.cancelled or self._stop:
            work.steps.close()  # type: ignore[attr-defined]
            work.hear(Ended("cancelled"))
            return True
        try:
            made = next(work.steps)
        except BadInput as error:
            made = Ended("error", str(error), 400)
        except ElmwoodError as error:
            made = Ended("error", str(error), 500)
        except Exception as error:
            logger.exception("request %d", work.number)
            made = failed(error)
        if isinstance(made, Ended):
            self._failed += made.reason == "error"
            work.steps.close()  # type: ignore[attr-defined]
            work.hear(made)
            return True
        for said in made:
            work.hear(said)
        return False


def failed(error: Exception) -> Ended:
    """The end of a request by an error that nobody foresaw, or by lack of memory."""
    if ran_out(error):
        return Ended("error", "memory ran out: ask for less at once, or again later", 503)
    return Ended("error", f"{type(error).__name__}; it is in the server's log", 500)


def check(request: Request, context: int, vocabulary: int, known: list[str]) -> None:
    """What can be refused before anything is run. Raises BadInput."""
    size = len(request.tokens)
    most = context - 1 if request.max_tokens else context + request.echo  # the last token of a text that is only scored is not read
    if not 1 <= size <= most:
        raise BadInput(f"the prompt has {size} tokens, from 1 to {most} can be read: {'shorten it' if size else 'write something'}")
    if min(request.tokens) < 0 or max(request.tokens) >= vocabulary:
        raise BadInput(f"a token id outside 0 … {vocabulary - 1}: the text was made with another tokenizer")
    if not (request.temperature >= 0 and 0 < request.top_p <= 1):
        raise BadInput(f"temperature {request.temperature}, top_p {request.top_p}: the first is at least 0, the second above 0, at most 1")
    if request.max_tokens < 0:
        raise BadInput(f"max_tokens is {request.max_tokens}: it is at least 0")
    allowed(known, request.only, request.without)


# ---- one request, step by step ---------------------------------------------------------------------------------------


def steps(lm: Any, request: Request) -> Iterator[list[Said] | Ended]:
    """What a model says of a request, a turn at a time."""
    tokens, texts = request.tokens, [lm.start()]
    names = digests(lm)

    def say(token: int, logp_V: Tensor, text: Any, prompt: bool = False) -> Said:
        top = logp_V.topk(min(request.logprobs, len(logp_V))) if request.logprobs else None
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
        weights = {names.get(name, name): share for name, share in text.shares.items()}
        return Said(token, float(logp_V[token]), pairs, weights, prompt)

    try:
        if request.echo and not request.logprobs:
            loglik_T = lm.score([tokens])[0].tolist() if len(tokens) > 1 else [0.0]
            yield [Said(token, loglik, (), NONE, True) for token, loglik in zip(tokens[1:], loglik_T[1:], strict=True)]
        elif request.echo:
            for logp_V, text, place in read_on(lm, tokens, texts):
                yield [say(tokens[place], logp_V, text, True)]
        room = min(request.max_tokens, lm.context - len(tokens))
        if room <= 0:
            yield Ended("length")
            return
        text, piece = fresh(lm, texts), len(tokens) if hasattr(lm, "block") else PIECE
        logp_V = torch.empty(0)
        for first in range(0, len(tokens), piece):
            logp_V, text = lm.extend(tokens[first : first + piece], text)
            yield []
        generator, rule = torch.Generator().manual_seed(request.rng_seed), Rule(request.temperature, request.top_p)
        stops = lm.stops if request.stops is None else request.stops
        for made in range(1, room + 1):
            token = int(pick(logp_V, rule, torch.rand(1, generator=generator)))
            yield [say(token, logp_V, text)._replace(stop=token in stops)]
            if token in stops:
                yield Ended("stop")
                return
            if made < room:
                logp_V, text = lm.extend([token], text)
        yield Ended("length")
    finally:
        for text in texts:
            getattr(lm, "mixture", lm).experts.end(text)


def read_on(lm: Any, tokens: tuple[int, ...], texts: list[Any]) -> Iterator[tuple[Tensor, Any, int]]:
    """The log-probabilities [V] of each token after the first, as `score` has them, the text that they are of, and the token's place. A
    model that sums its adapters for a prompt reads it anew at each block."""
    block, text = getattr(lm, "block", 0), texts[-1]
    for place in range(1, len(tokens)):
        if block and place % block == 0:
            text = fresh(lm, texts)
            logp_V, text = lm.extend(tokens[:place], text)
        else:
            logp_V, text = lm.extend(tokens[place - 1 : place], text)
        yield logp_V, text, place


def fresh(lm: Any, texts: list[Any]) -> Any:
    """A text in the place of the last one."""
    getattr(lm, "mixture", lm).experts.end(texts[-1])
    texts[-1] = lm.start()
    return texts[-1]


def digests(lm: Any) -> dict[str, str]:
    """The names in a text's shares, as digests or "seed"."""
    lm = getattr(lm, "mixture", lm)
    known = [*(expert.digest for expert in lm.experts.experts), "seed"]
    return dict(zip(lm.names, known, strict=True)) if hasattr(lm, "names") else {lm.name: known[lm.e]}
