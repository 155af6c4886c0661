"""Text -> squared distances to the domains, at its end or after every prefix.

Shapes: N texts, P prefixes, T tokens, W known words, S pieces of a text, K domains, E experts, D dimensions, V terms.

A word counts once it is complete: a character that cannot belong to it follows in the prefix (words.py). A prefix without a known
word is infinitely far from every domain. Centroids are dense [K, D], or sparse over terms: without the SVD, they separate many small
domains better.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from elmwood.domains.cluster import squared_distances
from elmwood.domains.embed import Terms, unit
from elmwood.domains.words import complete_words
from elmwood.errors import BadInput

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
FEW_WORDS = 8  # that are added one by one


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
        step_W, norm2_W = _sparse_steps(terms, row_W, before_W)
        dot_WK = centroids.term_VK[row_W].toarray() * step_W[:, None]
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


@dataclass(frozen=True, eq=False)
class Flat:
    """Dense centroids, ready for products."""

    minus2_DK: Floats  # float32
    norm2_K: Floats

    @classmethod
    def of(cls, centroid_KD: Floats) -> "Flat":
        centroid_KD = np.asarray(centroid_KD, np.float32)
        return cls(np.ascontiguousarray(np.float32(-2) * centroid_KD.T), np.einsum("kd,kd->k", centroid_KD, centroid_KD))

    def __len__(self) -> int:
        return len(self.norm2_K)

    def distances(self, x_SD: Floats, places: Ints | None) -> Floats:
        """|x - c|² to all centroids, or to some [S, K] float32."""
        x_SD = np.asarray(x_SD, np.float32)
        minus2_DK, norm2_K = (self.minus2_DK, self.norm2_K) if places is None else (self.minus2_DK[:, places], self.norm2_K[places])
        dist2_SK = x_SD @ minus2_DK
        dist2_SK += np.einsum("sd,sd->s", x_SD, x_SD)[:, None]
        dist2_SK += norm2_K
        return np.maximum(dist2_SK, 0, out=dist2_SK)


class Prefixes(NamedTuple):
    """A text at several lengths: sums of what its words add, as products with all centroids where these are sparse."""

    sum_SX: Floats  # float64
    norm2_S: Floats  # of the sum over terms, where centroids are sparse
    known_S: Bools  # whether a word is known by then

    def some(self, chosen: Bools | slice) -> "Prefixes":
        """Some of the lengths."""
        return Prefixes(self.sum_SX[chosen], self.norm2_S[chosen], self.known_S[chosen])


class PrefixDistances:
    """Squared distances of a text that grows, after every piece, at the cost of that piece."""

    def __init__(self, fitted: Embeds, centroids: Centroids | Flat):
        self.fitted = fitted
        self.centroids = Flat.of(centroids) if isinstance(centroids, np.ndarray) else centroids
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._open = ""  # what may still become part of a word; all of the text, for embedders that do not add up words
        self._count: dict[int, int] = {}
        self._counted = 0  # for the same embedders: the prefix last looked at
        self._sum_X = np.zeros(len(centroids) if isinstance(centroids, Sparse) else fitted.dimension)
        self._norm2 = 0.0

    def push(self, piece: bytes) -> Floats:
        """Let the text grow; squared distances of all of it so far [K]."""
        return self.to(self.read([piece]))[0]

    def read(self, piece_S: Sequence[bytes]) -> Prefixes:
        """Let the text grow by some pieces; what it is after each. Valid until it grows again."""
        said_S = [self._decode(piece) for piece in piece_S]
        if not isinstance(self.fitted, Terms) and not isinstance(self.centroids, Sparse):
            sum_SX = np.stack([self._embed(said) for said in said_S])
            return Prefixes(sum_SX, np.zeros(len(said_S)), np.any(sum_SX, axis=1))
        terms = _terms(self.fitted)
        cut_S = len(self._open) + np.cumsum([len(said) for said in said_S])
        self._open += "".join(said_S)
        row_W, count_W = terms.lexicon.steps(self._open)
        counts_W = (row_W >= 0) & (count_W <= len(self._open))
        row_W, place_W = row_W[counts_W], np.searchsorted(cut_S, count_W[counts_W])
        self._open = self._open[max(len(complete_words(self._open)) - 1, 0) :]
        return self._add(terms, row_W, self._before(row_W), place_W, len(said_S))

    def to(self, prefixes: Prefixes, places: Ints | None = None) -> Floats:
        """Squared distances of prefixes to all centroids, or to some [S, K]."""
        if isinstance(self.centroids, Sparse):
            dot_SK = prefixes.sum_SX if places is None else prefixes.sum_SX[:, places]
            cosine_SK = dot_SK / np.sqrt(np.maximum(prefixes.norm2_S, 1e-300))[:, None]
            return _known(_sparse_distances(cosine_SK, prefixes.known_S), prefixes.known_S)
        return _known(self.centroids.distances(unit(prefixes.sum_SX), places), prefixes.known_S)

    def _embed(self, said: str) -> Floats:
        self._open += said
        if (counted := self.fitted.counted(self._open)) != self._counted:
            self._counted, self._sum_X = counted, self.fitted.embed([self._open[:counted]])[0].astype(np.float64)
        return self._sum_X

    def _before(self, row_W: Ints) -> Floats:
        """How often each word occurred before [W]; these occurrences are counted."""
        before_W = np.empty(len(row_W))
        for w, row in enumerate(row_W.tolist()):
            before_W[w] = count = self._count.get(row, 0)
            self._count[row] = count + 1
        return before_W

    def _add(self, terms: Terms, row_W: Ints, before_W: Floats, place_W: Ints, pieces: int) -> Prefixes:
        """Words join the text, each in one of its pieces."""
        begin_S = np.searchsorted(place_W, np.arange(pieces + 1))
        if isinstance(self.centroids, Sparse):
            step_W, norm2_W = _sparse_steps(terms, row_W, before_W)
            sum_SX = _sparse_sums(self.centroids.term_VK, row_W, step_W, begin_S)
            norm2_S = self._norm2 + np.concatenate([[0.0], np.cumsum(norm2_W)])[begin_S[1:]]
            self._norm2 = float(norm2_S[-1])
        else:
            step_WD = terms.table_VD[row_W]
            step_WD *= terms.rise(before_W)[:, None]
            sum_SX = np.stack([step_WD[first:end].sum(0) for first, end in pairwise(begin_S)])
            norm2_S = np.zeros(pieces)
        sum_SX[0] += self._sum_X
        if pieces > 1:
            np.cumsum(sum_SX, axis=0, out=sum_SX)
        self._sum_X = sum_SX[-1]
        return Prefixes(sum_SX, norm2_S, norm2_S > 0 if isinstance(self.centroids, Sparse) else np.any(sum_SX, axis=1))


def nearest_place(dist2_NK: Floats, places_E: Sequence[Sequence[int]]) -> Floats:
    """Squared distances to experts that serve several domains: to the nearest of these [N, E]. Each serves one at least."""
    starts_E = np.cumsum([0, *map(len, places_E)])[:-1]
    return np.minimum.reduceat(dist2_NK[:, np.concatenate([np.asarray(places, np.int64) for places in places_E])], starts_E, axis=1)


# ---- inside ---------------------------------------------------------------------------------------------------------


def _known(dist2_NK: Floats, known_N: Bools) -> Floats:
    """Infinite where nothing is known."""
    return dist2_NK if known_N.all() else np.where(known_N[:, None], dist2_NK, np.float32(np.inf))


def _terms(fitted: Embeds) -> Terms:
    if not isinstance(fitted, Terms):
        raise BadInput(f"sparse routing needs terms, and {type(fitted).__name__} embeds without them: choose another router, or 'tfidf'")
    return fitted


def _running(step_WX: Floats) -> Floats:
    """Sums of the first 0, 1, ... W rows [W + 1, X] float64."""
    sum_WX = np.zeros((len(step_WX) + 1, step_WX.shape[1]))
    np.cumsum(step_WX, axis=0, out=sum_WX[1:])
    return sum_WX


def _sparse_steps(terms: Terms, row_W: Ints, before_W: Floats) -> tuple[Floats, Floats]:
    """What each word adds to its term [W], and to the squared norm [W]."""
    weight_W = terms.weight_V[row_W].astype(np.float64)
    power2 = 2 * terms.power
    return weight_W * terms.rise(before_W), weight_W**2 * ((before_W + 1) ** power2 - before_W**power2)


def _sparse_sums(term_VK: sparse.csr_matrix, row_W: Ints, step_W: Floats, begin_S: Ints) -> Floats:
    """Products of what the words of each piece add with all centroids [S, K]; begin_S[s]: the first word of a piece, the number of words
    at its end. Only terms that centroids have are looked at."""
    if len(row_W) <= FEW_WORDS:
        sum_SK = np.zeros((len(begin_S) - 1, term_VK.shape[1]))
        for s, (first, end) in enumerate(pairwise(begin_S.tolist())):
            for row, step in zip(row_W[first:end].tolist(), step_W[first:end].tolist(), strict=True):
                its = slice(term_VK.indptr[row], term_VK.indptr[row + 1])
                sum_SK[s, term_VK.indices[its]] += step * term_VK.data[its]
        return sum_SK
    return (sparse.csr_matrix((step_W, row_W, begin_S), shape=(len(begin_S) - 1, term_VK.shape[0])) @ term_VK).toarray()


def _sparse_distances(cosine_NK: Floats, some_N: Bools) -> Floats:
    """Squared distances from products with unit centroids; a text without words is the zero vector."""
    dist2_NK = np.multiply(cosine_NK, -2.0, dtype=np.float64)
    dist2_NK += some_N[:, None] + 1.0
    return np.maximum(dist2_NK, 0, out=dist2_NK).astype(np.float32)
