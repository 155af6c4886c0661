"""What an engine is asked, what it says, and what it promises. Free of torch: the server's shell reads it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from elmwood.errors import ElmwoodError

NONE: Mapping[str, float] = MappingProxyType({})


class Request(NamedTuple):
    """One continuation of one text. Several of the same text are several requests with other rng seeds."""

    tokens: tuple[int, ...]  # from the separator on; at least one
    max_tokens: int  # 0: only the prompt is scored
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0
    rng_seed: int = 0
    stops: frozenset[int] | None = None  # tokens that end a text; None: the model's own
    logprobs: int = 0  # most likely alternatives reported with each token
    echo: bool = False  # also say log p of the prompt's tokens
    only: tuple[str, ...] = ()  # candidates (digests of experts, or "seed") that the router may choose from; empty: all
    without: tuple[str, ...] = ()  # candidates that it may not
    joins: bool = False  # one more choice of a request that was taken: it waits, however many do


class Said(NamedTuple):
    """One token. The first token of a prompt, which is given, is not said."""

    token: int
    logprob: float  # of the ensemble at temperature 1, nats
    top: tuple[tuple[int, float], ...]  # the likeliest tokens and their logprobs, likeliest first
    weights: Mapping[str, float] = NONE  # of the candidates that predicted it, by digest or "seed"; empty for a prompt that `score` read
    prompt: bool = False  # a token of the prompt (echo)
    stop: bool = False  # it ends the text, and is no part of it; `Ended("stop")` follows


class Ended(NamedTuple):
    """The last event of a request."""

    reason: str  # "stop" | "length" | "cancelled" | "error"
    detail: str = ""  # of an error
    status: int = 500  # of an error, as HTTP has it: 503 where the engine ran out of memory or found a mismatched generation


Event = Said | Ended


class Counts(NamedTuple):
    """The state of an engine at one moment."""

    waiting: int = 0  # requests
    running: int = 0
    rows: int = 0  # (request, expert) pairs that are run
    cache_share: float = 0.0  # of the key-value cache in use, 0 to 1
    experts: int = 0  # that the router may choose
    resident: int = 0  # experts in device slots
    loading: int = 0
    loads: int = 0  # since the start
    load_seconds: float = 0.0  # since the start
    mismatches: int = 0  # requests ended because a slot had another generation than its row; must stay 0
    failed: int = 0  # requests ended by an error, since the start
    refused: int = 0  # experts whose adapter cannot be used
    open: bool = True  # it takes requests


class Limits(NamedTuple):
    """How much an engine takes on."""

    queue: int = 256  # requests that wait
    running: int = 64  # requests at once
    rows: int = 256  # (request, expert) pairs at once
    cache_bytes: int = 0  # of keys and values; 0: chosen by the engine
    slots: int = 0  # of experts on the device; 0: chosen by the engine
    host_bytes: int = 0  # of experts in main memory, of which there are at least twice the slots; 0: chosen by the engine
    deterministic: bool = False  # a request has the same bytes whatever else is asked


USUAL = Limits()


class Busy(ElmwoodError):
    """The queue is full, or the engine closes."""

    def __init__(self, message: str, retry_s: float = 1.0):
        super().__init__(message)
        self.retry_s = retry_s


class Engine(Protocol):
    """A model that continues many texts at once. All methods may be called from any thread."""

    context: int  # largest number of tokens of a text
    vocabulary: int
    separator: int
    stops: frozenset[int]
    experts: tuple[str, ...]  # the digests that `only` and `without` may name, beside "seed"; empty where the model has no router

    def submit(self, request: Request, hear: Callable[[Event], None]) -> int:
        """Queue a request; its number. `hear` is called on the engine's thread and must return at once. The last event is `Ended`.
        Raises BadInput, and Busy where the queue is full."""
        ...

    def cancel(self, number: int) -> None:
        """End a request within a step, with `Ended("cancelled")`; nothing happens where it has ended, or never was."""
        ...

    def counts(self) -> Counts: ...

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those at work end for this time, cancel the rest, and stop. Idempotent."""
        ...
