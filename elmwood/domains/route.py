"""Text -> squared distances to the domains, at its end or after every prefix; distances -> weights of an ensemble.

Shapes: N texts or tokens, P prefixes, T tokens (N of several documents), W known words, K domains, E experts, C = E + 1 candidates
(the seed last), D dimensions, V terms.

A word counts once it is complete: a character that cannot belong to it follows in the prefix (words.py). A prefix without a known
word is infinitely far from every domain: where the seed is a candidate, it predicts alone. Centroids are dense [K, D], or sparse
over terms: without the SVD, they separate many small domains better.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from elmwood.domains.cluster import squared_distances
from elmwood.domains.embed import Terms, unit
from elmwood.domains.words import complete_words
from elmwood.errors import BadInput, UnknownName
from elmwood.records import Ensemble
from elmwood.registry import lookup, trust, trusted

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]


class Embeds(Protocol):
    """A fitted embedder, as far as routing needs it."""

    @property
    def dimension(self) -> int: ...
    def embed(self, texts: Sequence[str]) -> Floats: ...
    def steps(self, text: str) -> tuple[Floats, Ints]: ...
    def counted(self, text: str) -> int: ...


@dataclass(frozen=True, eq=False)
class Sparse:
    """Centroids over terms: unit rows, kept term by term."""

    term_VK: sparse.csr_matrix

    @classmethod
    def of(cls, centroid_KV: sparse.csr_matrix) -> "Sparse":
        """From centroids as rows, which are scaled to length one."""
        norm_K = sparse.linalg.norm(centroid_KV, axis=1)
        scaled = sparse.diags(1 / np.where(norm_K > 0, norm_K, 1)) @ centroid_KV
        return cls(sparse.csr_matrix(scaled.T))

    def __len__(self) -> int:
        return self.term_VK.shape[1]

    def __getitem__(self, places: Sequence[int]) -> "Sparse":
        return Sparse(sparse.csr_matrix(self.term_VK[:, places]))


Centroids = Floats | Sparse


def distances(fitted: Embeds, centroids: Centroids, texts: Sequence[str]) -> Floats:
    """Squared distance of each text's embedding to each centroid [N, K] float32."""
    if isinstance(centroids, Sparse):
        x_NV = _terms(fitted).tfidf(texts)
        return _sparse_distances((x_NV @ centroids.term_VK).toarray(), np.diff(x_NV.indptr) > 0)
    return squared_distances(fitted.embed(texts), centroids)


def prefix_distances(fitted: Embeds, centroids: Centroids, text: str, cut_P: Sequence[int] | Ints) -> Floats:
    """Squared distances of text[:cut], for every cut (characters), to each centroid [P, K] float32; infinite where nothing is known.

    One addition per word: the embedding of a prefix is the normalised sum of what its words add.
    """
    cut_P = np.minimum(cut_P, len(text))
    if isinstance(centroids, Sparse):
        terms = _terms(fitted)
        row_W, before_W, count_W = terms.known(text)
        words_P = np.searchsorted(count_W, cut_P, side="right")
        dot_WK, norm2_W = _sparse_steps(terms, centroids, row_W, before_W)
        norm_P = np.sqrt(_running(norm2_W[:, None])[words_P])
        return _known(_sparse_distances(_running(dot_WK)[words_P] / np.where(norm_P > 0, norm_P, 1), words_P > 0), words_P > 0)
    step_WD, count_W = fitted.steps(text)
    sum_WD = _running(step_WD)
    # after each word; prefixes between two words are alike
    dist2_WK = _known(squared_distances(unit(sum_WD), centroids), np.any(sum_WD, axis=1))
    return dist2_WK[np.searchsorted(count_W, cut_P, side="right")]


def token_distances(fitted: Embeds, centroids: Centroids, tokens_T: Sequence[int] | Ints, token_bytes: Sequence[bytes]) -> Floats:
    """Row t: squared distances for predicting token t, so from the bytes of tokens[:t] [T, K]."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    pieces = [decode(token_bytes[token]) for token in tokens_T]
    cut_T = np.cumsum([0, *map(len, pieces)])[:-1]
    return prefix_distances(fitted, centroids, "".join(pieces), cut_T)


class PrefixDistances:
    """Squared distances of a text that grows, after every piece, at the cost of that piece."""

    def __init__(self, fitted: Embeds, centroids: Centroids):
        self.fitted = fitted
        self.centroids = centroids
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._open = ""  # what may still become part of a word; all of the text, for embedders that do not add up words
        self._count: dict[int, int] = {}
        self._counted, self._dist2_K = 0, np.full(len(centroids), np.inf, np.float32)  # for the same embedders: the prefix last looked at
        self._sum_X = np.zeros(len(centroids) if isinstance(centroids, Sparse) else fitted.dimension)
        self._norm2 = 0.0

    def push(self, piece: bytes) -> Floats:
        """Let the text grow; squared distances of all of it so far [K]."""
        self._open += self._decode(piece)
        if not isinstance(self.fitted, Terms) and not isinstance(self.centroids, Sparse):
            if (counted := self.fitted.counted(self._open)) != self._counted:
                x_1D = self.fitted.embed([self._open[:counted]])
                self._counted, self._dist2_K = counted, _known(squared_distances(x_1D, self.centroids), np.any(x_1D, axis=1))[0]
            return self._dist2_K
        terms = _terms(self.fitted)
        row_W, count_W = terms.lexicon.steps(self._open)
        for row in row_W[(row_W >= 0) & (count_W <= len(self._open))]:
            self._add(terms, int(row))
        self._open = self._open[max(len(complete_words(self._open)) - 1, 0) :]
        if isinstance(self.centroids, Sparse):
            known_1 = np.array([self._norm2 > 0])
            return _known(_sparse_distances(self._sum_X[None] / max(self._norm2, 1e-300) ** 0.5, known_1), known_1)[0]
        return _known(squared_distances(unit(self._sum_X[None]), self.centroids), np.any(self._sum_X[None], axis=1))[0]

    def _add(self, terms: Terms, row: int) -> None:
        before_1 = np.array([self._count.get(row, 0)], np.float64)
        self._count[row] = self._count.get(row, 0) + 1
        if isinstance(self.centroids, Sparse):
            dot_1K, norm2_1 = _sparse_steps(terms, self.centroids, np.array([row]), before_1)
            self._sum_X += dot_1K[0]
            self._norm2 += float(norm2_1[0])
        else:
            self._sum_X += terms.table_VD[row] * terms.rise(before_1)


def nearest_place(dist2_NK: Floats, places_E: Sequence[Sequence[int]]) -> Floats:
    """Squared distances to experts that serve several domains: to the nearest of these [N, E]. Each serves one at least."""
    starts_E = np.cumsum([0, *map(len, places_E)])[:-1]
    return np.minimum.reduceat(dist2_NK[:, np.concatenate([np.asarray(places, np.int64) for places in places_E])], starts_E, axis=1)


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

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.top_k < 1:
            raise BadInput(f"temperature is {self.temperature} and top_k {self.top_k}: both must be above zero")
        if not (self.memory >= 0 and 0 < self.decay <= 1):
            raise BadInput(f"memory is {self.memory} and decay {self.decay}: memory is at least 0, decay above 0 and at most 1")

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
    """What routers look at. A router needs one of them, or both."""

    dist2_NE: Floats | None  # squared distances of the text so far to each expert; infinite where nothing is known of it
    memory_NC: Floats | None = None  # what each candidate said of the text so far (`remember`), nats

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
        dist2_NE, memory_NC = self
        return Signals(
            None if dist2_NE is None else dist2_NE[:, list(members)], None if memory_NC is None else memory_NC[:, [*members, -1]]
        )


def weights(signals: Signals, routing: Routing) -> Floats:
    """The weight of each candidate, the seed last [N, C] float64; rows sum to one. Raises UnknownName.

    A softmax of the router's scores over the candidates it keeps: `top_k` of all (experts by their digests, then the seed; of equal
    scores the first), or, for a router that looks at distances and memory, the `top_k` nearest experts and the seed. Where nothing
    is known of the text, the seed is alone, if it is a candidate; otherwise the first `top_k` experts begin alike.
    """
    router = router_of(routing)
    score_NC = np.array(router.score(_with_seed(signals, routing), routing), np.float64)  # ours to change
    joins = routing.seed_distance is not None
    score_NC[:, -1] = score_NC[:, -1] if joins else -np.inf
    kept_NC = candidates(signals, routing) if router.distances and router.memory else best_of(score_NC, routing.top_k)
    kept_NC[:, -1] &= joins
    score_NC[~kept_NC] = -np.inf
    peak_N1 = score_NC.max(1, keepdims=True)
    if (unknown_N1 := np.isinf(peak_N1)).any():
        score_NC[unknown_N1 & kept_NC] = 0
        peak_N1[unknown_N1] = 0
    score_NC -= peak_N1
    np.exp(score_NC, out=score_NC)
    score_NC /= score_NC.sum(1, keepdims=True)
    return score_NC


def candidates(signals: Signals, routing: Routing) -> Bools:
    """Which candidates must be run, whatever the memory is: no other has weight [N, C]."""
    router, (rows, count) = router_of(routing), signals.shape
    if router.memory is None:
        return weights(signals, routing) > 0
    joins = routing.seed_distance is not None
    if router.distances is None:
        return np.broadcast_to(np.arange(count) < count - (not joins), (rows, count)).copy()
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


def _known(dist2_NK: Floats, known_N: Bools) -> Floats:
    """Infinite where nothing is known."""
    return np.where(known_N[:, None], dist2_NK, np.float32(np.inf))


def _terms(fitted: Embeds) -> Terms:
    if not isinstance(fitted, Terms):
        raise BadInput(f"sparse routing needs terms, and {type(fitted).__name__} embeds without them: choose another router, or 'tfidf'")
    return fitted


def _running(step_WX: Floats) -> Floats:
    """Sums of the first 0, 1, ... W rows [W + 1, X] float64."""
    sum_WX = np.zeros((len(step_WX) + 1, step_WX.shape[1]))
    np.cumsum(step_WX, axis=0, out=sum_WX[1:])
    return sum_WX


def _sparse_steps(terms: Terms, centroids: Sparse, row_W: Ints, before_W: Floats) -> tuple[Floats, Floats]:
    """What each word adds to the product with every centroid [W, K], and to the squared norm [W]."""
    weight_W = terms.weight_V[row_W].astype(np.float64)
    dot_WK = centroids.term_VK[row_W].toarray() * (weight_W * terms.rise(before_W))[:, None]
    power2 = 2 * terms.power
    return dot_WK, weight_W**2 * ((before_W + 1) ** power2 - before_W**power2)


def _sparse_distances(cosine_NK: Floats, some_N: Bools) -> Floats:
    """Squared distances from products with unit centroids; a text without words is the zero vector."""
    return np.maximum(some_N[:, None] + 1.0 - 2 * cosine_NK, 0).astype(np.float32)
