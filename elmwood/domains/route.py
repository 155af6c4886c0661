"""Text -> squared distances to the domains, at its end or after every prefix; distances -> weights.

Shapes: N texts, P prefixes, T tokens (N of several documents), W known words, K domains, E candidates (domains or experts, and
the seed last where it is one), D dimensions, V terms.

A word counts once a character that cannot belong to it follows in the prefix (words.py): the word still being written
says nothing yet. A prefix without a known word is the zero vector, so it prefers the centroid nearest the origin.

Centroids are dense [K, D], or sparse over terms: without the SVD, many fine domains are told apart better.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from elmwood.domains.cluster import squared_distances
from elmwood.domains.embed import Terms, unit
from elmwood.domains.words import finished
from elmwood.errors import BadInput

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
RouterFn = Callable[[Floats], Floats]


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
    """Squared distances of text[:cut], for every cut (characters), to each centroid [P, K] float32.

    One addition per word: the embedding of a prefix is the normalised sum of what its words add.
    """
    cut_P = np.minimum(cut_P, len(text))
    if isinstance(centroids, Sparse):
        terms = _terms(fitted)
        row_W, before_W, count_W = terms.known(text)
        words_P = np.searchsorted(count_W, cut_P, side="right")
        dot_WK, norm2_W = _sparse_steps(terms, centroids, row_W, before_W)
        norm_P = np.sqrt(_running(norm2_W[:, None])[words_P])
        return _sparse_distances(_running(dot_WK)[words_P] / np.where(norm_P > 0, norm_P, 1), words_P > 0)
    step_WD, count_W = fitted.steps(text)
    dist2_WK = squared_distances(unit(_running(step_WD)), centroids)  # after each word; prefixes between two words are alike
    return dist2_WK[np.searchsorted(count_W, cut_P, side="right")]


def token_distances(fitted: Embeds, centroids: Centroids, tokens_T: Sequence[int] | Ints, token_bytes: Sequence[bytes]) -> Floats:
    """Row t: squared distances for predicting token t, so from the bytes of tokens[:t] [T, K]."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    pieces = [decode(token_bytes[token]) for token in tokens_T]
    cut_T = np.cumsum([0, *map(len, pieces)])[:-1]
    return prefix_distances(fitted, centroids, "".join(pieces), cut_T)


class Walk:
    """Routing of a text that grows: the squared distances after every piece, at the cost of that piece."""

    def __init__(self, fitted: Embeds, centroids: Centroids):
        self.fitted = fitted
        self.centroids = centroids
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._open = ""  # what may still become part of a word; all of the text, for embedders that do not add up words
        self._count: dict[int, int] = {}
        self._counted, self._dist2_K = -1, np.zeros(0, np.float32)  # for the same embedders: the prefix last looked at
        self._sum_X = np.zeros(len(centroids) if isinstance(centroids, Sparse) else fitted.dimension)
        self._norm2 = 0.0

    def push(self, piece: bytes) -> Floats:
        """Let the text grow; squared distances of all of it so far [K]."""
        self._open += self._decode(piece)
        if not isinstance(self.fitted, Terms):
            if (counted := self.fitted.counted(self._open)) != self._counted:
                self._counted, self._dist2_K = counted, distances(self.fitted, self.centroids, [self._open[:counted]])[0]
            return self._dist2_K
        row_W, count_W = self.fitted.lexicon.steps(self._open)
        for row in row_W[(row_W >= 0) & (count_W <= len(self._open))]:
            self._add(self.fitted, int(row))
        self._open = self._open[max(len(finished(self._open)) - 1, 0) :]
        if isinstance(self.centroids, Sparse):
            return _sparse_distances(self._sum_X[None] / max(self._norm2, 1e-300) ** 0.5, np.array([self._norm2 > 0]))[0]
        return squared_distances(unit(self._sum_X[None]), self.centroids)[0]

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


def candidates(dist2_NK: Floats, seed_distance: float | None) -> Floats:
    """The seed as one more candidate, in the last column, at a fixed squared distance: text far from every domain
    falls back to it. None: it is not a candidate."""
    if seed_distance is None:
        return dist2_NK
    return np.concatenate([dist2_NK, np.full((len(dist2_NK), 1), seed_distance, dist2_NK.dtype)], axis=1)


def gate(score_NE: Floats, temperature: float, top_k: int) -> Floats:
    """Weights [N, E] float64: softmax of score / temperature over the top_k candidates, zero for the others.

    Rows sum to one; of equal scores the first candidate is kept. Raises BadInput.
    """
    if not temperature > 0 or top_k < 1:
        raise BadInput(f"temperature is {temperature} and top_k {top_k}: both must be above zero")
    score_NE = np.asarray(score_NE, np.float64)
    if top_k < score_NE.shape[1]:
        order_NE = np.argsort(-score_NE, axis=1, kind="stable")
        kept_NE = np.zeros(score_NE.shape, bool)
        np.put_along_axis(kept_NE, order_NE[:, :top_k], True, axis=1)
        score_NE = np.where(kept_NE, score_NE, -np.inf)
    weight_NE = np.exp((score_NE - score_NE.max(1, keepdims=True)) / temperature)
    return weight_NE / weight_NE.sum(1, keepdims=True)


# ---- routers: a signal [N, E] -> scores [N, E], which gate turns into weights --------------------------------------


class Router(NamedTuple):
    """A row of the table of routers."""

    score: RouterFn
    signal: str  # what it looks at: "dense" or "sparse" squared distances, "loglik", or the document's own "domain"
    source: str

    def __call__(self, signal_NE: Floats) -> Floats:
        return self.score(signal_NE)


def nearest(dist2_NE: Floats) -> Floats:
    """Minus the squared distance, so that gate gives exp(-dist² / T)."""
    return -dist2_NE


def cbtm(dist2_NE: Floats) -> Floats:
    """Minus the squared distance squared once more; parity is at T = 0.1."""
    return -np.square(dist2_NE)


def uniform(signal_NE: Floats) -> Floats:
    """All alike."""
    return np.zeros_like(signal_NE)


def posterior(score_NE: Floats) -> Floats:
    """What `posterior_scores` gives, as it is; T = 1 makes the weights Bayes' posterior."""
    return score_NE


ROUTERS: dict[str, Router] = {
    "centroid": Router(nearest, "dense", "the formula of c-BTM, arXiv:2303.14177"),
    "cbtm": Router(cbtm, "dense", "the published code of c-BTM, arXiv:2303.14177"),
    "sparse": Router(nearest, "sparse", "nearest tf-idf centroid without the SVD (Rocchio 1971)"),
    "posterior": Router(posterior, "loglik", "the domain posterior of BTM, arXiv:2208.03306"),
    "uniform": Router(uniform, "dense", "control: every expert alike"),
    "oracle": Router(nearest, "domain", "bound: the expert of the document's own domain"),
}


def posterior_scores(loglik_NE: Floats, document_N: Ints | None = None, prior_E: Floats | None = None) -> Floats:
    """Row t: log prior plus the log-likelihood, in nats, of the tokens before t in the same document, under each expert [N, E].

    The tokens of a document stand one after another. No document_N: all are of one; no prior_E: all are alike before the first token.
    """
    sum_NE = np.zeros((len(loglik_NE) + 1, loglik_NE.shape[1]))
    np.cumsum(loglik_NE, axis=0, dtype=np.float64, out=sum_NE[1:])
    first_N = np.zeros(len(loglik_NE), np.int64)
    if document_N is not None and len(document_N):
        begins_N = np.diff(document_N, prepend=document_N[0] - 1) != 0
        first_N = np.maximum.accumulate(np.where(begins_N, np.arange(len(document_N)), 0))
    before_NE = sum_NE[:-1] - sum_NE[first_N]
    return before_NE if prior_E is None else before_NE + np.log(np.maximum(prior_E, 1e-30))


def posterior_prior(posterior_NE: Floats, decay: float = 0.3) -> Floats:
    """A prior [E] from the posteriors of some held-out documents: BTM's exponential moving average over them."""
    prior_E = np.full(posterior_NE.shape[1], 1 / posterior_NE.shape[1])
    for posterior_E in posterior_NE:
        prior_E = (1 - decay) * prior_E + decay * posterior_E
    return prior_E


def oracle_distances(domain_N: Ints, k: int) -> Floats:
    """Zero to the document's own domain, infinite to the others [N, K]."""
    return np.where(np.arange(k) == np.asarray(domain_N)[:, None], 0.0, np.inf)


# ---- inside ---------------------------------------------------------------------------------------------------------


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


def _sparse_distances(cosine_NK: Floats, some_N: NDArray[np.bool_]) -> Floats:
    """Squared distances from products with unit centroids; a text without words is the zero vector."""
    return np.maximum(some_N[:, None] + 1.0 - 2 * cosine_NK, 0).astype(np.float32)
