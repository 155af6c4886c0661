"""A request at work: its text, and a row for each candidate that reads it.

E experts, V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elmwood.ensemble.batch.candidates import Choice, Look
from elmwood.ensemble.batch.interface import Event, Request
from elmwood.ensemble.batch.residency import Seat
from elmwood.ensemble.text_router import Walk


@dataclass(eq=False)
class Row:
    """What one candidate has read of one text."""

    candidate: int
    place: int  # among keys and values
    seat: Seat | None = None  # where its adapter is; none while it is idle, and for the seed
    read: int = 0  # tokens
    memory: float = 0.0  # of what it gave the tokens it has read, nats
    loglik: list[float] = field(default_factory=list)  # of the tokens it has read, where anybody asks
    last_V: Tensor | None = None  # log-probabilities after the last token it has read
    ahead: list[Tensor] = field(default_factory=list)  # of the tokens that are looked at, as far as it has read [V] each
    known: float = 0.0  # where `last_V` is not known: what it gave the next token
    used: int = 0  # the step in which it was last active


@dataclass(eq=False)
class Text:
    """A request that waits or runs."""

    number: int
    request: Request
    hear: Callable[[Event], None]
    choice: Choice
    room: int  # tokens that may be generated
    tokens: list[int]
    walk: Walk | None = None  # what the router remembers
    base: int = 0  # the place of the next token to be said
    looks: list[Look] = field(default_factory=list)  # of this token, and of those after it that are known
    pending: Look | None = None  # of the token after these
    pushed: int = 0  # tokens that the router has read
    span: int = 0  # of experts that act from a point on: the first token that they predict
    held: Look | None = None  # before that token
    until: int | None = None  # tokens that the seed alone reads before they do; none once it has
    run: list[int] = field(default_factory=list)  # candidates that must read: those of all looks, and the seed where bounds refer to it
    rows: dict[int, Row] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    made: int = 0
    overtaken: int = 0
    cancelled: bool = False
    generator: torch.Generator = field(default_factory=torch.Generator)

    @classmethod
    def of(cls, number: int, request: Request, hear: Callable[[Event], None], choice: Choice, context: int) -> "Text":
        text = cls(number, request, hear, choice, min(request.max_tokens, context - len(request.tokens)), list(request.tokens))
        text.base = 1 if request.echo else len(text.tokens)
        text.generator.manual_seed(request.rng_seed)
        return text

    @property
    def end(self) -> int:
        """How many tokens candidates read before anything is said."""
        return self.base + max(len(self.looks), 1) - 1 if self.until is None else self.until

    @property
    def ready(self) -> bool:
        """Whether all of its candidates have read all there is."""
        return all((row := self.rows.get(c)) is not None and row.read == self.end for c in self.run)

    @property
    def over(self) -> bool:
        """Whether nothing is left to say."""
        return self.base >= len(self.tokens) and self.made >= self.room
