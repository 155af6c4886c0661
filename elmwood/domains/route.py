"""Distances and memory -> weights of an ensemble.

Shapes: N tokens of several documents, E experts, C = E + 1 candidates (the seed last). Where nothing is known of a text, it is infinitely
far from every domain (distances.py): where the seed is a candidate, it predicts alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput, UnknownName
from elmwood.records import Ensemble
from elmwood.registry import lookup, trust, trusted

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]

FORGOTTEN, MOST_NATS = 1e-6, 30.0
FEW = 8  # that are found one after another

# ---- signals -> weights ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """How weights follow from signals: the settings of an ensemble, as its record has them. Raises BadInput."""

    router: str = "centroid"
    top_k: int = 2
    temperature: float = 0.1
    seed_distance: float | None = None  # the seed as a candidate at this squared distance (`posterior`: this many nats behind)
    memory: float = 0.1  # `live`: what a nat of the memory adds to a score
    decay: float = 0.98  # `live`: what is left of the memory after each token
    every: int = 1  # tokens between two searches for the nearest experts; of a text that is not short (`searches`)
    shortlist: int | None = None  # experts that a search finds, among which the nearest are chosen until the next; None: top_k
    margin: float = 0.0  # squared distance by which a newcomer must be nearer than the live expert whose place it takes
    sure: float | None = None  # a candidate with this weight at a search is alone until the next; None: none is
    far: float | None = None  # squared distance beyond which an expert is not run, if the seed is a candidate

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.top_k < 1:
            raise BadInput(f"temperature is {self.temperature} and top_k {self.top_k}: both must be above zero")
        if not (self.memory >= 0 and 0 < self.decay <= 1):
            raise BadInput(f"memory is {self.memory} and decay {self.decay}: memory is at least 0, decay above 0 and at most 1")
        if self.every < 1 or self.margin < 0 or (self.shortlist is not None and self.shortlist < 1):
            raise BadInput(f"every is {self.every}, margin {self.margin}, shortlist {self.shortlist}: at least 1, 0 and 1")
        if self.sure is not None and not 0.5 < self.sure <= 1:
            raise BadInput(f"sure is {self.sure}: it is a weight above 0.5, which one candidate alone can have, and at most 1")
        if self.sure is not None and self.shortlist is not None:
            raise BadInput("sure is decided at a search, and with a shortlist experts change between searches: leave out one of the two")

    @property
    def chooses_anew(self) -> bool:
        """Whether the experts of a token follow from its distances alone: the nearest of all."""
        return self.every == 1 and not self.margin and self.sure is None and self.far is None

    @property
    def chooses_between(self) -> bool:
        """Whether experts change between two searches."""
        return self.shortlist is not None and self.shortlist > self.top_k

    @cached_property
    def alone(self) -> "Routing":
        """How experts that were chosen already are weighted."""
        return replace(self, every=1, shortlist=None, margin=0.0, sure=None, far=None)

    @classmethod
    def of(cls, ensemble: Ensemble) -> Self:
        """The settings of an ensemble."""
        return cls(**{name: getattr(ensemble, name) for name in cls.__dataclass_fields__})

    @property
    def fading(self) -> float:
        """The decay of the memory that this router looks at."""
        return self.decay if router_of(self).memory == "fading" else 1.0

    @property
    def reach(self) -> float:
        """Tokens after which what is left of the memory changes no score by more than FORGOTTEN, at MOST_NATS per token."""
        if self.fading == 1:
            return np.inf
        return float(np.log(FORGOTTEN * (1 - self.fading) / (max(self.memory, 1.0) * MOST_NATS)) / np.log(self.fading))


class Signals(NamedTuple):
    """What routers look at. A router needs one of the first two, or both."""

    dist2_NE: Floats | None  # squared distances of the text so far to each expert; infinite where nothing is known of it
    memory_NC: Floats | None = None  # what each candidate said of the text so far (`remember`), nats
    place_N: Ints | None = None  # tokens before each in its document (`places`); all rows of a document, unless every text is searched anew

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and candidates."""
        if self.dist2_NE is not None:
            return len(self.dist2_NE), self.dist2_NE.shape[1] + 1
        assert self.memory_NC is not None
        return self.memory_NC.shape[0], self.memory_NC.shape[1]

    def some(self, rows: Any) -> "Signals":
        """Some rows."""
        return Signals(*(None if part is None else part[rows] for part in self))

    def among(self, members: Sequence[int]) -> "Signals":
        """Of some experts, and the seed."""
        dist2_NE, memory_NC, place_N = self
        return Signals(
            None if dist2_NE is None else dist2_NE[:, list(members)],
            None if memory_NC is None else memory_NC[:, [*members, -1]], place_N,
        )  # fmt: skip


def weights(signals: Signals, routing: Routing) -> Floats:
    """The weight of each candidate, the seed last [N, C] float64; rows sum to one. Raises UnknownName.

    A softmax of the router's scores over the candidates it keeps: `top_k` of all (experts by their digests, then the seed; of equal
    scores the first), or, for a router that looks at distances and memory, the `top_k` nearest experts and the seed. Where nothing
    is known of the text, the seed is alone, if it is a candidate; otherwise the first `top_k` experts begin alike. Only experts that are
    live have weight (`live_experts`), and a candidate that was sure enough at a search has all of it.
    """
    router = router_of(routing)
    score_NC = np.array(router.score(_with_seed(signals, routing), routing), np.float64)  # ours to change
    joins = routing.seed_distance is not None
    score_NC[:, -1] = score_NC[:, -1] if joins else -np.inf
    if router.distances and router.memory:
        kept_NC = candidates(signals, routing)
    else:
        live_NC = None if routing.chooses_anew else _live(signals, routing)
        kept_NC = best_of(score_NC if live_NC is None else np.where(live_NC, score_NC, -np.inf), routing.top_k)
        kept_NC &= live_NC if live_NC is not None else True
    kept_NC[:, -1] &= joins
    score_NC[~kept_NC] = -np.inf
    peak_N1 = score_NC.max(1, keepdims=True)
    if (unknown_N1 := np.isinf(peak_N1)).any():
        score_NC[unknown_N1 & kept_NC] = 0
        peak_N1[unknown_N1] = 0
    score_NC -= peak_N1
    np.exp(score_NC, out=score_NC)
    score_NC /= score_NC.sum(1, keepdims=True)
    return score_NC if routing.sure is None else _leave_alone(score_NC, routing, signals.place_N)


def candidates(signals: Signals, routing: Routing) -> Bools:
    """Which candidates must be run, whatever the memory is: no other has weight [N, C]."""
    router, (rows, count) = router_of(routing), signals.shape
    if router.memory is None:
        return weights(signals, routing) > 0
    joins = routing.seed_distance is not None
    if router.distances is None:
        return np.broadcast_to(np.arange(count) < count - (not joins), (rows, count)).copy()
    if not routing.chooses_anew:
        return _live(signals, routing)
    assert signals.dist2_NE is not None
    near_NE = best_of(-np.asarray(signals.dist2_NE, np.float64), routing.top_k)
    if joins:
        near_NE &= np.isfinite(signals.dist2_NE)
    return np.column_stack([near_NE, np.full(rows, joins)])


def remember(loglik_NC: Floats, decay: float = 1.0, document_N: Ints | None = None) -> Floats:
    """The memory before token t [N, C], float64, nats: the sum over tokens s < t of its document of decay^(t - 1 - s) log p(x_s).
    The tokens of a document are consecutive; without document_N all are of one. D documents, T tokens of the longest."""
    before_NC = np.zeros(np.shape(loglik_NC))
    first_D = np.zeros(1, np.int64) if document_N is None else np.flatnonzero(np.diff(document_N, prepend=-1))
    size_D = np.diff(first_D, append=len(before_NC))
    first_D = first_D[np.argsort(-size_D, kind="stable")]  # the longest first
    left_T = len(size_D) - np.searchsorted(np.sort(size_D), np.arange(size_D.max(initial=0)), side="right")  # longer than t
    place_N = np.concatenate([np.zeros(0, np.int64), *(first_D[:left] + t for t, left in enumerate(left_T))])  # all at t, then at t + 1
    given_NC, memory_NC = np.asarray(loglik_NC, np.float64)[place_N], np.zeros(before_NC.shape)
    ends_T = np.cumsum(left_T)
    for end, left, before in zip(ends_T[:-1], left_T[1:], left_T[:-1], strict=True):
        last = slice(end - before, end - before + left)
        np.multiply(memory_NC[last], decay, out=memory_NC[end : end + left])
        memory_NC[end : end + left] += given_NC[last]
    before_NC[place_N] = memory_NC
    return before_NC


# ---- which experts are live ----------------------------------------------------------------------------------------
# A text is searched for its nearest experts at some places. Between two searches it keeps the experts it found, or chooses among a few.


class Live(NamedTuple):
    """The experts that predict a text, and those that may do so before the next search: their numbers, ascending."""

    experts: Ints
    listed: Ints


EARLY = 32  # tokens of a short text: its nearest experts still change, and are searched for before each (docs/log/routing-scale.md)
NOBODY = Live(np.zeros(0, np.int64), np.zeros(0, np.int64))


def places(document_N: Ints) -> Ints:
    """Tokens before each in its document, the separator included [N]. The tokens of a document are consecutive, all but the separator."""
    first_N = np.flatnonzero(np.diff(document_N, prepend=-1))
    return np.arange(len(document_N)) - np.repeat(first_N, np.diff(first_N, append=len(document_N))) + 1


def searches(place_N: Ints, every: int) -> Bools:
    """Whether experts are searched for before these tokens [N]: while a text is short, and at every multiple of `every`."""
    place_N = np.asarray(place_N)
    return (place_N < EARLY) | (place_N % every == 0)


def looked_at(begin: int, end: int, routing: Routing) -> Ints:
    """The places after `begin` at which a text must be looked at to know its live experts at `end`: the last search and the end, and with
    a margin all places at which they may change, from the end of what is early on."""
    place_T = np.arange(min(begin + 1, end), end + 1)
    search_T = searches(place_T, routing.every)
    since = int(np.max(place_T[search_T & (place_T < EARLY if routing.margin else True)], initial=0))
    changes_T = search_T | routing.chooses_between if routing.margin else place_T == since
    return place_T[(changes_T & (place_T >= since)) | (place_T == end)]


def search(live: Live, dist2_E: Floats, routing: Routing, place: int) -> Live:
    """The nearest of all experts. In a text that is not short, one that is live already counts as nearer by the margin. Only experts that
    are as near as the farthest of those listed before are ordered, since as many as are wanted are."""
    score_E = np.array(dist2_E)
    score_E[live.experts] -= np.float32(routing.margin if place >= EARLY else 0)
    if (joins := routing.seed_distance is not None) and routing.far is not None:
        score_E[dist2_E > routing.far] = np.inf
    count = max(routing.top_k, routing.shortlist or 0)
    listed = np.flatnonzero(score_E <= score_E[live.listed].max()) if len(live.listed) == count else np.arange(len(score_E))
    listed = listed[closest(score_E[listed], count)]
    listed = listed[np.isfinite(score_E[listed])] if joins else listed
    return Live(listed[closest(score_E[listed], routing.top_k)], listed)


def choose(live: Live, dist2_L: Floats, routing: Routing) -> Live:
    """The nearest of those that the last search listed, whose distances these are; the live ones count as nearer by the margin."""
    score_L = np.array(dist2_L)
    score_L[np.searchsorted(live.listed, live.experts)] -= np.float32(routing.margin)
    return live._replace(experts=live.listed[closest(score_L, routing.top_k)])


def live_experts(dist2_NE: Floats, place_N: Ints, routing: Routing) -> Bools:
    """Which experts predict each token [N, E]: what `search` and `choose` find as each document grows."""
    live_NE, live = np.zeros(dist2_NE.shape, bool), NOBODY
    search_N = searches(place_N, routing.every)
    first_N = np.diff(place_N, prepend=0) != 1
    search_S = np.flatnonzero(search_N | first_N)
    for n, end in zip(search_S.tolist(), np.append(search_S, len(place_N))[1:].tolist(), strict=True):
        live = search(NOBODY if first_N[n] else live, dist2_NE[n], routing, int(place_N[n]))
        if not routing.chooses_between:
            live_NE[n:end, live.experts] = True
        elif not routing.margin:
            live_NE[n:end, live.listed] = best_of(-dist2_NE[n:end, live.listed], routing.top_k)
        else:
            live_NE[n, live.experts] = True
            for between in range(n + 1, end):
                live = choose(live, dist2_NE[between, live.listed], routing)
                live_NE[between, live.experts] = True
    return live_NE


def closest(dist2_X: Floats, count: int) -> Ints:
    """The places of the smallest, ascending; of equal ones the first. Exact, in time that grows with their number alone."""
    if count >= len(dist2_X):
        return np.arange(len(dist2_X))
    last = np.partition(dist2_X, count - 1)[count - 1]
    below = np.flatnonzero(dist2_X < last)
    return np.sort(np.concatenate([below, np.flatnonzero(dist2_X == last)[: count - len(below)]]))


# ---- routers: signals -> scores, which `weights` turns into weights ------------------------------------------------


class CandidateSignals(NamedTuple):
    """Signals of all candidates, the seed last."""

    dist2_NC: Floats  # float64; the seed at its distance
    memory_NC: Floats


class Router(NamedTuple):
    """A row of the table of routers."""

    score: Callable[[CandidateSignals, Routing], Floats]  # [N, C]: the log of the weights, up to a constant
    distances: Literal["dense", "sparse"] | None  # to which centroids, if it looks at distances
    memory: Literal["fading", "whole"] | None  # of the candidates' log-likelihoods of the text so far, if it looks at them
    source: str
    monotone: bool = False  # of two experts with the same memory the nearer never scores less


def nearest(signals: CandidateSignals, routing: Routing) -> Floats:
    """-dist² / T."""
    return -signals.dist2_NC / routing.temperature


def cbtm(signals: CandidateSignals, routing: Routing) -> Floats:
    """-dist⁴ / T; parity with the published code is at T = 0.1."""
    return -np.square(signals.dist2_NC) / routing.temperature


def uniform(signals: CandidateSignals, routing: Routing) -> Floats:
    """All alike."""
    return np.zeros_like(signals.dist2_NC)


def live(signals: CandidateSignals, routing: Routing) -> Floats:
    """-dist² / T, and the memory."""
    return nearest(signals, routing) + routing.memory * signals.memory_NC


def posterior(signals: CandidateSignals, routing: Routing) -> Floats:
    """The memory over T: at T = 1 the weights are Bayes' posterior. Experts are alike at first, the seed is behind by its distance."""
    score_NC = signals.memory_NC / routing.temperature
    score_NC[:, -1] -= (routing.seed_distance or 0) / routing.temperature
    return score_NC


ROUTERS: dict[str, Router] = {
    "centroid": Router(nearest, "dense", None, "the formula of c-BTM, arXiv:2303.14177", monotone=True),
    "cbtm": Router(cbtm, "dense", None, "the published code of c-BTM, arXiv:2303.14177", monotone=True),
    "sparse": Router(nearest, "sparse", None, "nearest tf-idf centroid without the SVD (Rocchio 1971)", monotone=True),
    "live": Router(live, "dense", "fading", "centroid, and a fading memory of log-likelihoods: docs/log/routing.md", monotone=True),
    "live-sparse": Router(live, "sparse", "fading", "the same with sparse centroids: docs/log/routing-scale.md", monotone=True),
    "posterior": Router(posterior, None, "whole", "the domain posterior of BTM, arXiv:2208.03306"),
    "uniform": Router(uniform, "dense", None, "control: every expert alike"),
}


def open_router(name: str) -> Router:
    """The row of a name that the user typed: of the table, or a Router or a function of scores at `module:function`, which is trusted
    from then on. Raises UnknownName."""
    return lookup(ROUTERS, name, "router") if name in ROUTERS or ":" not in name else _row(trust(name, "router"), name)


def router_of(settings: Routing | Ensemble) -> Router:
    """The row of a name that a record may have brought: of the table, or trusted before. Raises UnknownName."""
    if settings.router in ROUTERS:
        return ROUTERS[settings.router]
    if ":" in settings.router:
        return _row(trusted(settings.router, "router"), settings.router)
    raise UnknownName(f"the ensemble asks for router {settings.router!r}; have {', '.join(sorted(ROUTERS))}")


def _row(found: Any, name: str) -> Router:
    return found if isinstance(found, Router) else Router(found, "dense", None, name)


# ---- inside ---------------------------------------------------------------------------------------------------------


def _live(signals: Signals, routing: Routing) -> Bools:
    """The experts that are live, and the seed if it is a candidate [N, C]. Raises BadInput."""
    if signals.dist2_NE is None or signals.place_N is None:
        raise BadInput(f"router {routing.router!r} looks at no distances: leave out every, shortlist, margin, sure and far")
    live_NE, joins = live_experts(signals.dist2_NE, signals.place_N, routing), routing.seed_distance is not None
    if joins:
        live_NE &= np.isfinite(signals.dist2_NE)
    return np.column_stack([live_NE, np.full(len(live_NE), joins)])


def _leave_alone(weight_NC: Floats, routing: Routing, place_N: Ints | None) -> Floats:
    """From each search to the next, all the weight on the candidate that was sure. A router with a memory asks all at the search itself."""
    assert place_N is not None
    search_N = searches(place_N, routing.every)
    block_N = np.cumsum(search_N) - 1
    at_SC = weight_NC[search_N]
    best_S = at_SC.argmax(1)
    alone_N = np.isin(block_N, np.flatnonzero(at_SC.max(1, initial=0) >= routing.sure))
    if router_of(routing).memory:
        alone_N &= ~search_N
    weight_NC[alone_N] = 0
    weight_NC[alone_N, best_S[block_N[alone_N]]] = 1
    return weight_NC


def _with_seed(signals: Signals, routing: Routing) -> CandidateSignals:
    rows, count = signals.shape
    dist2_NC = np.zeros((count, rows)).T  # column by column: sums and maxima over few candidates are then over long columns
    if signals.dist2_NE is not None:
        dist2_NC[:, :-1] = signals.dist2_NE
    dist2_NC[:, -1] = routing.seed_distance or 0
    memory_NC = 0.0 if signals.memory_NC is None else np.asarray(signals.memory_NC, np.float64)
    return CandidateSignals(dist2_NC, np.broadcast_to(memory_NC, (rows, count)))


def best_of(score_NE: Floats, top_k: int) -> Bools:
    """The top_k of each row; of equal scores the first [N, E]."""
    if top_k >= score_NE.shape[1]:
        return np.ones(score_NE.shape, bool)
    kept_NE = np.zeros(score_NE.shape, bool)
    if top_k > FEW:
        np.put_along_axis(kept_NE, np.argsort(-score_NE, axis=1, kind="stable")[:, :top_k], True, axis=1)
        return kept_NE
    left_NE = np.maximum(score_NE, np.finfo(score_NE.dtype).min)
    for _ in range(top_k):  # ten times as fast as sorting hundreds
        best_N1 = left_NE.argmax(1)[:, None]
        np.put_along_axis(kept_NE, best_N1, True, axis=1)
        np.put_along_axis(left_NE, best_N1, -np.inf, axis=1)
    return kept_NE
