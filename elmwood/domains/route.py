"""Text -> squared distances to the domains, at its end or after every prefix, and distances -> weights.

Shapes: N texts, P prefixes, T tokens, W words, K domains, E candidates (domains, and the seed last where it is one), D dimensions.

A word counts once a character that cannot belong to it follows it in the prefix (words.py): the word still being
written says nothing yet. A prefix without a known word is the zero vector, so it prefers the centroid nearest the origin.
"""

import codecs
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.cluster import squared_distances
from elmwood.domains.embed import Terms, unit
from elmwood.errors import BadInput

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
RouterFn = Callable[[Floats], Floats]


def distances(fitted: Terms, centroid_KD: Floats, texts: Sequence[str]) -> Floats:
    """Squared distance of each text's embedding to each centroid [N, K]."""
    return squared_distances(fitted.embed(texts), centroid_KD)


def prefix_distances(fitted: Terms, centroid_KD: Floats, text: str, cut_P: Sequence[int] | Ints) -> Floats:
    """Squared distances of text[:cut], for every cut (characters, ascending), to each centroid [P, K] float32.

    One addition per word: the embedding of a prefix is the normalised sum of its words' vectors.
    """
    step_WD, count_W = fitted.steps(text)
    sum_WD = np.zeros((len(step_WD) + 1, fitted.dimension))
    np.cumsum(step_WD, axis=0, out=sum_WD[1:])
    sum_PD = sum_WD[np.searchsorted(count_W, cut_P, side="right")]
    return squared_distances(unit(sum_PD).astype(np.float32), centroid_KD)


def token_distances(fitted: Terms, centroid_KD: Floats, tokens_T: Sequence[int] | Ints, token_bytes: Sequence[bytes]) -> Floats:
    """Row t: squared distances for predicting token t, so from the bytes of tokens[:t] [T, K]."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    pieces = [decode(token_bytes[token]) for token in tokens_T]
    cut_T = np.cumsum([0, *map(len, pieces)])[:-1]
    return prefix_distances(fitted, centroid_KD, "".join(pieces), cut_T)


def candidates(dist2_NK: Floats, seed_distance: float | None) -> Floats:
    """The seed as one more candidate, in the last column, at a fixed squared distance; None: it is not one."""
    if seed_distance is None:
        return dist2_NK
    return np.concatenate([dist2_NK, np.full((len(dist2_NK), 1), seed_distance, dist2_NK.dtype)], axis=1)


def gate(score_NE: Floats, temperature: float, top_k: int) -> Floats:
    """Weights [N, E]: softmax of score / temperature over the top_k candidates, zero for the others. Rows sum to one."""
    if not temperature > 0 or top_k < 1:
        raise BadInput(f"temperature {temperature} and top_k {top_k}: both must be above zero")
    score_NE = np.asarray(score_NE, np.float64)
    candidates_E = score_NE.shape[1]
    if top_k < candidates_E:
        order_NE = np.argsort(-score_NE, axis=1, kind="stable")
        kept_NE = np.zeros(score_NE.shape, bool)
        np.put_along_axis(kept_NE, order_NE[:, :top_k], True, axis=1)
        score_NE = np.where(kept_NE, score_NE, -np.inf)
    weight_NE = np.exp((score_NE - score_NE.max(1, keepdims=True)) / temperature)
    return weight_NE / weight_NE.sum(1, keepdims=True)


def centroid(dist2_NK: Floats) -> Floats:
    """exp(-dist² / T), the formula of arXiv:2303.14177."""
    return -dist2_NK


def cbtm(dist2_NK: Floats) -> Floats:
    """exp(-dist⁴ / T): what the published code of arXiv:2303.14177 computes, with T = 0.1."""
    return -np.square(dist2_NK)


def uniform(dist2_NK: Floats) -> Floats:
    """All alike: a control."""
    return np.zeros_like(dist2_NK)


ROUTERS: dict[str, RouterFn] = {"centroid": centroid, "cbtm": cbtm, "uniform": uniform}
