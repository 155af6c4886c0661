"""Ensembles from columns alone: static weights, a choice of experts, the value of each, whether a new one would help.

N scored tokens, E models, C candidates (experts and the seed; or candidate ensembles), B blocks
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.route import Routing, Signals, weights
from elmwood.evaluate.losses import Estimate

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]
Loss = Callable[[tuple[int, ...]], float]  # of some members, ascending: any unit, less is better

ROUNDS = 50  # Newton steps at most; ten are usual
NOISE = 1e-7  # of a mean loss in single precision, nats
RIDGE = 1e-9  # of the mean curvature, where two experts are the same
CHUNK = 1 << 16  # tokens multiplied at once


def probabilities(loglik_NE: Floats) -> tuple[Floats, Floats]:
    """exp(loglik - peak) [N, E] float32 and the peak [N] float64 of each token, nats. NaN, not scored, has probability 0."""
    loglik_NE = np.asarray(loglik_NE)
    peak_N = np.nanmax(loglik_NE, axis=1).astype(np.float64)
    return np.nan_to_num(np.exp(loglik_NE - peak_N[:, None], dtype=np.float32)), peak_N


# ---- weights --------------------------------------------------------------------------------------------------------


class Optimum(NamedTuple):
    """Static weights of least loss, a bound on their distance from the best, and the passes over the columns."""

    weight_E: Floats
    nats: float  # per token
    gap: float  # nats per token; by convexity no weights are better by more
    passes: int


def optimum(loglik_NE: Floats, tolerance: float = 1e-6) -> Optimum:
    """The weights that mix these columns with the least mean loss, one set for all tokens. The problem is convex.

    Sequential quadratic programming on the dual form of the simplex, each step one non-negative least squares (arXiv:1806.01412):
    ten passes where expectation-maximisation takes hundreds. The gap is max_e mean_t(p_e / p_mix) - 1: loss(w) - loss(w*) is not above it.
    """
    from scipy.linalg import solve_triangular  # a third of a second that only static weights need
    from scipy.optimize import nnls

    p_NE, peak_N = probabilities(loglik_NE)
    experts = p_NE.shape[1]
    weight_E = np.full(experts, 1 / experts)
    loss, passes = _loss(p_NE, weight_E), 1
    for _ in range(ROUNDS):
        ratio_E, curvature_EE = _moments(p_NE, weight_E)
        passes += 1
        gap = float(ratio_E.max()) - 1
        if gap <= tolerance:
            break
        upper_EE = _factor(curvature_EE)
        goal_E, _ = nnls(upper_EE, solve_triangular(upper_EE, 2 * ratio_E - 1, trans="T"))
        goal_E /= goal_E.sum()
        step, better = 1.0, loss
        while step > 1e-3:
            tried_E = (1 - step) * weight_E + step * goal_E
            better, passes = _loss(p_NE, tried_E), passes + 1
            if better <= loss + NOISE:
                break
            step /= 2
        if better > loss + NOISE:
            break
        weight_E, loss = tried_E, better
    gap = max(float(_moments(p_NE, weight_E)[0].max()) - 1, 0.0)
    return Optimum(weight_E, loss - float(peak_N.mean()), gap, passes + 1)


def _factor(curvature_EE: Floats) -> Floats:
    """Its upper Cholesky factor, with as small a ridge as makes it positive definite: sums in single precision of experts that are nearly
    the same are not, by rounding."""
    from scipy.linalg import LinAlgError, cholesky

    mean, ridge = np.trace(curvature_EE) / len(curvature_EE), RIDGE
    while True:
        try:
            return cholesky(curvature_EE + ridge * mean * np.eye(len(curvature_EE)))
        except LinAlgError:
            if ridge > 1:  # cannot happen with finite numbers
                raise
            ridge *= 10


def _loss(p_NE: Floats, weight_E: Floats) -> float:
    with np.errstate(divide="ignore"):
        return -float(np.log(p_NE @ weight_E.astype(np.float32)).mean(dtype=np.float64))


def _moments(p_NE: Floats, weight_E: Floats) -> tuple[Floats, Floats]:
    """Means over tokens of p_e / p_mix [E] and of its products [E, E] float64."""
    experts, count = len(weight_E), len(p_NE)
    ratio_E, curvature_EE = np.zeros(experts), np.zeros((experts, experts))
    for start in range(0, count, CHUNK):
        p_nE = p_NE[start : start + CHUNK]
        ratio_nE = p_nE / (p_nE @ weight_E.astype(np.float32))[:, None]
        ratio_E += ratio_nE.sum(0, dtype=np.float64)
        curvature_EE += ratio_nE.T @ ratio_nE
    return ratio_E / count, curvature_EE / count


def member_weights(signals: Signals, routing: Routing, members: Sequence[int]) -> Floats:
    """Weights of an ensemble of some members and the seed, as the live router gives them; zero for the others [N, C]."""
    weight_NC = np.zeros(signals.shape)
    weight_NC[:, [*members, -1]] = weights(signals.among(members), routing)
    return weight_NC


# ---- which experts --------------------------------------------------------------------------------------------------


class Growth(NamedTuple):
    """Members in the order of choice, the loss with each of them and those before, and the number of losses computed."""

    order: tuple[int, ...]
    losses: tuple[float, ...]
    looked: int


def values(loss: Loss, members: Sequence[int]) -> tuple[float, ...]:
    """Leave-one-out value of each member: how much the loss rises without it. Of one alone it is not defined (NaN)."""
    full = loss(tuple(sorted(members)))
    return tuple(loss(tuple(sorted(set(members) - {one}))) - full if len(members) > 1 else float("nan") for one in members)


def greedy(loss: Loss, members: Iterable[int], most: int, start: Sequence[int] = ()) -> Growth:
    """Add the member that lowers the loss most, again and again, up to `most`; it ends sooner where none lowers it.

    Gains are looked at again only while they could still be the largest (lazy greedy, Minoux 1978): with gains that only shrink as the
    set grows this is the plain greedy choice, 1 - 1/e of the best there is; where they can grow it is a heuristic, and says nothing.
    """
    held, best, looked = tuple(sorted(start)), loss(tuple(start)) if start else float("inf"), 0
    gain_of = dict.fromkeys(members, float("inf"))
    order: list[int] = []
    losses: list[float] = []
    while gain_of and len(order) < most:
        fresh: dict[int, float] = {}
        while (first := max(gain_of, key=lambda one: (gain_of[one], -one))) not in fresh:
            fresh[first] = loss(tuple(sorted((*held, first))))
            gain_of[first] = best - fresh[first] if np.isfinite(best) else -fresh[first]
            looked += 1
        if np.isfinite(best) and gain_of[first] <= 0:
            break
        held, best = tuple(sorted((*held, first))), fresh[first]
        order.append(first)
        losses.append(best)
        gain_of = {one: gain for one, gain in gain_of.items() if one != first}
        if len(order) == 1:  # the first was chosen by its loss, the others by what they add
            gain_of = dict.fromkeys(gain_of, float("inf"))
    return Growth(tuple(order), tuple(losses), looked)


def would_help(new_N: Floats, mixed_N: Floats, block_N: Ints, among_N: Bools) -> Estimate:
    """Mean of p_new / p_mix over some tokens, and its standard error over blocks. Above one: some weight on the new model lowers the loss
    there, and below one none does. A screen: it does not show that the gain is worth having."""
    ratio_N = np.exp(np.asarray(new_N, np.float64)[among_N] - np.asarray(mixed_N, np.float64)[among_N])
    _, place_N = np.unique(block_N[among_N], return_inverse=True)
    sum_B, count_B = np.bincount(place_N, ratio_N), np.bincount(place_N)
    if not len(sum_B):
        return Estimate(float("nan"), float("nan"))
    value = float(sum_B.sum() / count_B.sum())
    blocks = len(sum_B)
    spread = np.square(sum_B - value * count_B).sum()
    return Estimate(value, float(np.sqrt(blocks / (blocks - 1) * spread) / count_B.sum()) if blocks > 1 else float("nan"))


# ---- many candidates ------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """Candidates from the least loss up. Losses are exact for the first `exact`, and of a sample of blocks for the others."""

    order_C: Ints
    nats_C: Floats  # by candidate, per token
    error_C: Floats  # its standard error as an estimate of the loss on all tokens; 0 where it is exact
    exact: int


def rank(
    p_NE: Floats, peak_N: Floats, weight_CE: Floats, block_N: Ints, keep: Sequence[tuple[float, int]] = ((1 / 32, 1000), (1 / 8, 100))
) -> Ranking:
    """Mixtures with static weights, ranked by their loss on all tokens: every one on some blocks, the best of them on more, the best of
    these on all. `keep`: rounds of (share of the blocks, how many go on). Blocks are drawn once: candidates are compared on the same text.
    """
    blocks = int(block_N.max()) + 1
    chance_B = np.random.default_rng(0).permutation(blocks) / blocks
    nats_C, error_C = np.zeros(len(weight_CE)), np.zeros(len(weight_CE))
    alive_C = np.arange(len(weight_CE))
    tiers: list[Ints] = []
    for share, many in (*keep, (1.0, 0)):
        mine_N = np.flatnonzero(chance_B[block_N] < share) if share < 1 else np.arange(len(p_NE))
        nats_C[alive_C], error_C[alive_C] = _losses(p_NE, peak_N, weight_CE[alive_C], block_N, mine_N)
        alive_C = alive_C[np.argsort(nats_C[alive_C], kind="stable")]
        if share == 1:
            error_C[alive_C] = 0
        else:
            tiers.insert(0, alive_C[many:])
            alive_C = alive_C[:many]
    return Ranking(np.concatenate([alive_C, *tiers]), nats_C, error_C, len(alive_C))


def _losses(p_NE: Floats, peak_N: Floats, weight_CE: Floats, block_N: Ints, mine_N: Ints) -> tuple[Floats, Floats]:
    """Mean loss of candidates over some tokens [C], nats, and its standard error over blocks."""
    order_N = mine_N[np.argsort(block_N[mine_N], kind="stable")]
    _, start_B, count_B = np.unique(block_N[order_N], return_index=True, return_counts=True)
    weight_EC = np.ascontiguousarray(weight_CE.T, dtype=np.float32)
    sum_C, square_C, cross_C = (np.zeros(len(weight_CE)) for _ in range(3))
    part_B = start_B // CHUNK_RANKED
    for part in np.unique(part_B):
        first, last = (int(place) for place in np.flatnonzero(part_B == part)[[0, -1]])
        begin, end = int(start_B[first]), int(start_B[last] + count_B[last])
        token_n = order_N[begin:end]
        mixed_nC = p_NE[token_n] @ weight_EC
        np.log(mixed_nC, out=mixed_nC)
        nats_BC = -np.add.reduceat(mixed_nC, start_B[first : last + 1] - begin, axis=0, dtype=np.float64)
        nats_BC -= np.add.reduceat(peak_N[token_n], start_B[first : last + 1] - begin)[:, None]
        sum_C += nats_BC.sum(0)
        square_C += np.square(nats_BC).sum(0)
        cross_C += count_B[first : last + 1] @ nats_BC
    total, blocks = len(order_N), len(start_B)
    value_C = sum_C / total
    spread_C = square_C - 2 * value_C * cross_C + value_C**2 * np.square(count_B).sum()
    return value_C, np.sqrt(np.maximum(spread_C, 0) * blocks / max(blocks - 1, 1)) / total


CHUNK_RANKED = 2048  # tokens, so that a part of all candidates stays in the cache
