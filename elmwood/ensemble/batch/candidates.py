"""Which candidates of a model predict a text, and with what weight: an engine's requests beside one another.

E experts by digest, C candidates (the seed last), N requests
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.route import Routing, Signals, candidates, router_of, weights
from elmwood.ensemble.batch.choice import SEED, allowed
from elmwood.errors import BadInput

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Choice:
    """The candidates that a request leaves. `alone`: one of them, without a router."""

    members: tuple[int, ...] = ()  # experts
    routing: Routing | None = None
    alone: int | None = None


class Candidates:
    """The candidates of a model and its router, if it has one."""

    def __init__(
        self, digests: Sequence[str], router: Any, routing: Routing | None, bounded: Collection[int] = (), base: int | None = None
    ):
        """`base`: the candidate that uses no adapter; the seed, or the only one of a model whose weights are all its own."""
        self.names = (*digests, SEED)  # of the candidates
        self.router, self.routing, self.bounded = router, routing, frozenset(bounded)
        self.seed = len(digests)
        self.base = self.seed if base is None else base
        self.memory = routing is not None and router_of(routing).memory is not None
        self.whole = Choice(tuple(range(self.seed)), routing) if routing else Choice(alone=0)

    def choose(self, only: Collection[str], without: Collection[str], refused: Collection[str] = ()) -> Choice:
        """What is left for a request; experts that cannot be loaded are left out. Raises BadInput."""
        if not only and not without and not refused:
            return self.whole
        left = allowed(self.names, only, [*without, *(name for name in refused if name not in without)])
        if len(left) == 1 and self.names.index(left[0]) not in self.bounded:
            return self._one(self.names.index(left[0]))
        if self.routing is None:
            if refused or not (self.whole.alone is not None and self.names[self.whole.alone] in left):
                raise BadInput("this model has no router: name one of its candidates, or none")
            return self.whole
        if SEED in only and self.routing.seed_distance is None:
            raise BadInput("the seed is no candidate of this router, so it has no weight beside experts: name it alone, or leave it out")
        kept = set(left)
        members = tuple(e for e in range(self.seed) if self.names[e] in kept)
        if not members:
            raise BadInput("no expert is left beside the seed: name it alone with `only`")
        return Choice(members, self.routing if SEED in kept else replace(self.routing, seed_distance=None))

    def _one(self, c: int) -> Choice:
        if c == self.seed and c != self.base:
            raise BadInput("this model is no adapter over its seed, and the seed is not open beside it: open the seed")
        return Choice(alone=c)

    @property
    def most(self) -> int:
        """Candidates that predict a token, at most; the seed, which bounds refer to, included."""
        if self.routing is None:
            return 1
        router = router_of(self.routing)
        if router.distances is None:
            return self.seed + 1
        most = min(self.routing.top_k, self.seed) + 1
        return most if router.memory or self.bounded or self.routing.seed_distance is not None else most - 1

    def start(self) -> Any:
        """An empty text, for `push`."""
        return self.router.start() if self.routing else None

    def push(self, prefix: Any, tokens: Sequence[int]) -> Floats | None:
        """Let a text grow: its distances [E], none where the router looks at none."""
        found = self.router.push(prefix, tokens) if prefix is not None else None
        return None if found is None else found[0]

    def active(self, choice: Choice, dist2_E: Floats | None) -> list[int]:
        """The candidates that predict the next token; others have no weight, whatever the memory is."""
        if choice.alone is not None:
            return [choice.alone]
        assert choice.routing
        among = self._among(choice, None if dist2_E is None else dist2_E[None], np.zeros((1, self.seed + 1)))
        return [self._whole(choice, c) for c in np.flatnonzero(candidates(among, choice.routing)[0])]

    def weigh(self, choice: Choice, dist2_E: Floats | None, memory: Mapping[int, float]) -> dict[int, float]:
        """The weight of each active candidate, by what each said of the text so far [nats]."""
        if choice.alone is not None:
            return {choice.alone: 1.0}
        assert choice.routing
        memory_1C = np.zeros((1, self.seed + 1))
        memory_1C[0, list(memory)] = list(memory.values())
        signals = self._among(choice, None if dist2_E is None else dist2_E[None], memory_1C)
        weight_C, active_C = weights(signals, choice.routing)[0], candidates(signals, choice.routing)[0]
        return {self._whole(choice, c): float(weight_C[c]) for c in np.flatnonzero(active_C)}

    def _among(self, choice: Choice, dist2_1E: Floats | None, memory_1C: Floats) -> Signals:
        signals = Signals(dist2_1E, memory_1C)
        return signals if len(choice.members) == self.seed else signals.among(choice.members)

    def _whole(self, choice: Choice, c: Any) -> int:
        """A candidate's number among all."""
        return choice.members[c] if c < len(choice.members) else self.seed
