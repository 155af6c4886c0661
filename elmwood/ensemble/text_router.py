"""Where a text lies among the experts of a forest. Free of torch: no model is opened, unless it is what embeds the text.

Shapes: E experts by digest, A of them live, T tokens, N scored tokens of several documents, P domains that the experts serve
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.corpus.tokens import Windows, token_bytes
from elmwood.domains import embed
from elmwood.domains.distances import Centroids, Flat, PrefixDistances, Prefixes, nearest_place, token_distances
from elmwood.domains.partition import centroids, serving
from elmwood.domains.route import NOBODY, Live, Routing, Signals, candidates, choose, looked_at, router_of, search, searches, weights
from elmwood.errors import ForeignExpert
from elmwood.lm.files import tokenizer
from elmwood.records import Expert, Partition, Seed
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


class Near(NamedTuple):
    """The live experts of a text, by number, and their squared distances."""

    place: int  # tokens of the text
    expert_A: Ints
    dist2_A: Floats


NEAR = Near(0, NOBODY.experts, np.zeros(0, np.float32))


class Walk:
    """What a router remembers of a text that grows."""

    def __init__(self, prefix: PrefixDistances, members: Ints | None = None):
        """`members`: the experts that may be found, ascending; None: all."""
        self.prefix, self.members = prefix, members
        self.live: Live = NOBODY
        self.now = self.searched = NEAR  # at its end, and at the last search
        self.alone: tuple[int, int | None] = (-1, None)  # a search, and the candidate that was sure enough there

    def whole(self, number_A: Ints) -> Ints:
        """The numbers among all experts of some that are counted among the members."""
        return number_A if self.members is None else self.members[number_A]


def weigh(near: Near | None, memory_C: Floats, routing: Routing) -> tuple[list[int], list[float]]:
    """The candidates that predict a text's next token and their weights, by the live experts and what each candidate said of the text so
    far: what `weights` has in its row. Near is none where the router looks at no distances."""
    seed = len(memory_C) - 1
    member_A = [*range(seed), seed] if near is None else [*near.expert_A.tolist(), seed]
    signals = Signals(None if near is None else near.dist2_A[None], memory_C[None, member_A])
    weight_A = weights(signals, routing.alone)[0]
    kept_A = np.flatnonzero(candidates(signals, routing.alone)[0]).tolist()
    return [member_A[a] for a in kept_A], weight_A[kept_A].tolist()


def sure_of(active: Sequence[int], weight_A: Sequence[float], routing: Routing) -> int | None:
    """The candidate that is alone until the next search, by the weights at this one."""
    weight, c = max(zip(weight_A, active, strict=True), default=(0.0, -1))
    return c if routing.sure is not None and weight >= routing.sure else None


class TextRouter:
    """Where a text lies among the experts of a forest; nothing for a router that looks at no distances (`reads_text`)."""

    def __init__(
        self, routing: Routing, embedder: Any, centroids_K: Centroids, places_E: Sequence[tuple[int, ...]], spelled: Sequence[bytes]
    ):  # fmt: skip
        """`embedder`: none for a router that looks at no distances; `places_E`: the domains of each expert; `spelled`: the bytes of each
        token."""
        self.routing, self.places_E, self.embedder, self.spelled = routing, places_E, embedder, spelled
        self.reads_text = embedder is not None
        if not self.reads_text:
            return
        self.centroids_P = centroids_K[list(chain.from_iterable(places_E))]
        starts_E = np.cumsum([0, *map(len, self.places_E)])
        self.own_E = [range(first, last) for first, last in pairwise(starts_E.tolist())]  # rows of these centroids
        self.single = len(self.own_E) == starts_E[-1]  # each expert serves one domain
        self.ready_P = Flat.of(self.centroids_P) if isinstance(self.centroids_P, np.ndarray) else self.centroids_P

    def distances(self, windows: Windows) -> Floats | None:
        """Of the document before each scored token [N, E]."""
        if not self.reads_text:
            return None
        parts = [np.zeros((0, len(self.own_E)), np.float32)]
        for _, tokens_T in windows.documents():
            parts.append(nearest_place(token_distances(self.embedder, self.centroids_P, tokens_T, self.spelled)[1:], self.own_E))
        return np.concatenate(parts)

    def start(self, members: Sequence[int] | None = None) -> Walk | None:
        """An empty text, for which only some experts are looked for."""
        if not self.reads_text:
            return None
        return Walk(PrefixDistances(self.embedder, self.ready_P), None if members is None else np.asarray(members, np.int64))

    def push(self, tokens_T: Sequence[int]) -> Floats | None:
        """The distances of a text to all experts [1, E]."""
        if (walk := self.start()) is None:
            return None
        return self._to_experts(walk, walk.prefix.read([self._spell(tokens_T)]))

    def follow(self, walk: Walk, tokens_T: Sequence[int], routing: Routing | None = None) -> Near:
        """Let a text grow; its live experts by now, as `live_experts` has them, and how near they are. A search looks at all experts; what
        comes between two, at those that are listed."""
        routing, begin = routing or self.routing, walk.now.place
        place_S = looked_at(begin, begin + len(tokens_T), routing)
        prefixes = walk.prefix.read([self._spell(tokens_T[a - begin : b - begin]) for a, b in pairwise([begin, *place_S.tolist()])])
        search_S = searches(place_S, routing.every)
        every_SE = iter(self._to_experts(walk, prefixes.some(search_S)) if search_S.any() else prefixes.sum_SX[:0])  # in one product
        for s, (place, is_search) in enumerate(zip(place_S.tolist(), search_S.tolist(), strict=True)):
            here = prefixes.some(slice(s, s + 1))
            if is_search:
                dist2_E = next(every_SE)
                walk.live = search(walk.live, dist2_E, routing, place)
                dist2_A = dist2_E[walk.live.experts]
            elif routing.chooses_between:
                dist2_L = self._to_experts(walk, here, walk.live.listed)[0]
                walk.live = choose(walk.live, dist2_L, routing)
                dist2_A = dist2_L[np.searchsorted(walk.live.listed, walk.live.experts)]
            else:
                dist2_A = self._to_experts(walk, here, walk.live.experts)[0]
            walk.now = Near(place, walk.whole(walk.live.experts), dist2_A)
            walk.searched = walk.now if is_search else walk.searched
        return walk.now

    def _spell(self, tokens_T: Sequence[int]) -> bytes:
        return b"".join([self.spelled[token] for token in tokens_T])

    def _to_experts(self, walk: Walk, prefixes: Prefixes, expert_A: Ints | None = None) -> Floats:
        """Squared distances of prefixes to all experts that the walk may find, or to some of these [S, A]."""
        expert_A = walk.members if expert_A is None else walk.whole(expert_A)
        if self.single:
            return walk.prefix.to(prefixes, expert_A)
        own_A = self.own_E if expert_A is None else [self.own_E[e] for e in expert_A.tolist()]
        place_P = np.concatenate([np.zeros(0, np.int64), *own_A])
        starts_A = np.cumsum([0, *map(len, own_A)])[:-1]
        dist2_SP = walk.prefix.to(prefixes, place_P)
        return np.minimum.reduceat(dist2_SP, starts_A, axis=1) if own_A else dist2_SP


def open_text_router(routing: Routing, partition: Partition, experts: Sequence[Expert], seed: Seed, store: Store) -> TextRouter:
    """The router of the experts of a partition. Raises UnknownName, ForeignExpert."""
    kind, places_E = router_of(routing).distances, places(experts, partition, store)
    if kind is None:
        return TextRouter(routing, None, np.zeros((0, 0)), places_E, [])
    spelled = token_bytes(tokenizer(seed, store))
    spelled += [b""] * (seed.vocabulary - len(spelled))  # some embeddings are padded with unused rows
    embedder = embed.load(partition.embedder, store)
    return TextRouter(routing, embedder, centroids(partition, store, kind), places_E, spelled)


def places(experts: Sequence[Expert], partition: Partition, store: Store) -> list[tuple[int, ...]]:
    """The domains of a partition that each expert serves. Raises ForeignExpert, also where an expert serves none."""
    found = serving(partition, [(expert.partition, expert.domain) for expert in experts], store)
    for expert, served in zip(experts, found, strict=True):
        if not served:
            raise ForeignExpert(f"every part of the domain of expert {expert.digest[:8]} has experts of its own by now: leave it out")
    return found


def names_of(experts: Sequence[Expert], store: Store) -> list[str]:
    """The name of each expert: its domain, with its digest where several have the same."""
    domains = [store.load(expert.partition or "", Partition).domains[expert.domain or 0].name for expert in experts]
    count = Counter(domains)
    return [f"{name}:{expert.digest[:8]}" if count[name] > 1 else name for name, expert in zip(domains, experts, strict=True)]
