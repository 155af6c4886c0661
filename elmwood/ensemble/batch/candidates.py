"""Which candidates of a model predict a text, and with what weight: an engine's requests beside one another.

E experts by digest, C candidates (the seed last), A of them active, N requests
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.route import Routing, router_of
from elmwood.ensemble.batch.choice import SEED, allowed
from elmwood.ensemble.text_router import Near, Walk, sure_of, weigh
from elmwood.errors import BadInput

Floats = NDArray[np.floating]


class Look(NamedTuple):
    """What the router says of the text before a token."""

    place: int  # tokens of this text
    near: Near | None  # the live experts; none where the router looks at no distances
    searched: Near | None  # those of the last search
    active: list[int]  # candidates that must have read the text

    @property
    def since(self) -> int:
        """The place of the last search."""
        return self.searched.place if self.searched else self.place


@dataclass(frozen=True)
class Choice:
    """The candidates that a request leaves. `alone`: one of them, without a router."""

    members: tuple[int, ...] = ()  # experts
    routing: Routing | None = None
    alone: int | None = None


class Candidates:
    """The candidates of a model and its router, if it has one."""

    def __init__(
        self, digests: Sequence[str], router: Any, routing: Routing | None, bounded: Collection[int] = (), base: int | None = None,
        reads: bool = False,
    ):  # fmt: skip
        """`base`: the candidate that uses no adapter; the seed, or the only one of a model whose weights are all its own. `reads`: the seed
        reads each text, whether or not it predicts."""
        self.names = (*digests, SEED)  # of the candidates
        self.router, self.routing, self.bounded = router, routing, frozenset(bounded)
        self.seed = len(digests)
        self.base, self.reads = self.seed if base is None else base, reads
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
        joins = self.reads or router.memory or self.bounded or self.routing.seed_distance is not None
        return most if joins else most - 1

    def start(self, choice: Choice) -> Walk | None:
        """An empty text, for `look`."""
        members = None if len(choice.members) == self.seed else choice.members
        return self.router.start(members) if choice.alone is None else None

    def look(self, choice: Choice, walk: Walk | None, tokens: Sequence[int], place: int) -> Look:
        """Let a text grow by some tokens to so many, and see who predicts the next one. Where the memory decides who is alone, all that
        may be are asked until `decide` knows."""
        if choice.alone is not None:
            return Look(place, None, None, [choice.alone])
        assert choice.routing
        if walk is None:
            return Look(place, None, None, self._weigh(choice, None, {})[0])
        near, searched = self.router.follow(walk, tokens, choice.routing), walk.searched
        if choice.routing.sure is not None and not self.memory and walk.alone[0] != searched.place:
            walk.alone = searched.place, sure_of(*self._weigh(choice, searched, {}), choice.routing)
        alone = self._alone(walk, searched, place)
        return Look(place, near, searched, self._weigh(choice, near, {})[0] if alone is None else [alone])

    def undecided(self, choice: Choice, walk: Walk | None, look: Look) -> list[int]:
        """The candidates whose memory at the last search must be known to know who is alone since then; none where it is known."""
        if walk is None or look.searched is None or not self.memory or choice.routing is None or choice.routing.sure is None:
            return []
        return [] if walk.alone[0] == look.searched.place else self._weigh(choice, look.searched, {})[0]

    def decide(self, choice: Choice, walk: Walk | None, look: Look, memory: Mapping[int, float]) -> None:
        """Note who is alone after the last search, by what each had said of the text by then [nats]."""
        assert choice.routing
        assert walk
        walk.alone = look.since, sure_of(*self._weigh(choice, look.searched, memory), choice.routing)

    def weigh(self, choice: Choice, walk: Walk | None, look: Look, memory: Mapping[int, float]) -> dict[int, float]:
        """The weight of each candidate, by what each said of the text so far [nats]."""
        alone = look.active[0] if len(look.active) == 1 else None
        if alone is None and walk is not None and look.searched is not None:
            alone = self._alone(walk, look.searched, look.place)
        return {alone: 1.0} if alone is not None else dict(zip(*self._weigh(choice, look.near, memory), strict=True))

    def _alone(self, walk: Walk, searched: Near, place: int) -> int | None:
        """Who is alone at a place, as far as it is known. At a search a router with a memory asks all."""
        decided, alone = walk.alone
        return alone if decided == searched.place and not (self.memory and place == searched.place) else None

    def _weigh(self, choice: Choice, near: Near | None, memory: Mapping[int, float]) -> tuple[list[int], list[float]]:
        assert choice.routing
        memory_C = np.zeros(self.seed + 1)
        memory_C[list(memory)] = list(memory.values())
        if near is not None or len(choice.members) == self.seed:
            return weigh(near, memory_C, choice.routing)
        member_C = [*choice.members, self.seed]
        active, weight_A = weigh(None, memory_C[member_C], choice.routing)
        return [member_C[c] for c in active], weight_A
