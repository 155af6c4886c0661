"""Balanced k-means: clusters of equal size, with an optimal assignment.

Shapes: N documents (B of them in one block), K domains, D dimensions.

With equal sizes, the assignment step is a transportation problem with small K. It is solved in two parts. Newton steps on the
smoothed dual give a price per domain, and nearly equal sizes, in a few passes over the costs. Then shortest augmenting paths
between the K domains make the sizes exact, which keeps the assignment optimal at every step.

Both take time with the square of K. Above MANY domains, balanced groups of domains are found first, and the domains of each group
among its own documents.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.threads import one_thread

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

MANY, GROUPS = 256, 64  # domains found at once, at most; groups of domains
BLOCK = 1 << 15  # documents assigned at once, rounded down to a multiple of K
TOLERANCE = 1e-4  # stop when the objective falls by less than this share
PASSES = 50
SHARPNESS = (0.03, 0.003)  # smoothing of the dual, in units of the standard deviation of costs
SAMPLE, STARTS = 2048, 4  # rows of a trial run, and number of trial runs
STEPS = 16  # Newton steps at each sharpness, at most
SLACK = 0.005  # deviation of a size at which Newton steps stop, as a share of the size


class Clusters(NamedTuple):
    """A clustering: centroids float32, labels, and the mean squared distance of a document to its centroid."""

    centroid_KD: Floats
    label_N: Ints
    objective: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """Documents per domain [K]."""
        return tuple(np.bincount(self.label_N, minlength=len(self.centroid_KD)).tolist())


@one_thread
def kmeans(
    x_ND: Floats, k: int, *, balanced: bool = True, rng_seed: int = 0, start_KD: Floats | None = None, progress: Progress = silent
) -> Clusters:
    """Cluster rows into k domains. Sizes differ by at most one if balanced, and no domain is empty.

    Large inputs are assigned in blocks, with equal sizes within each; centroids are means over all blocks. Starts from start_KD, or
    from the best of a few runs on a sample, which start from k-means++. x_ND may be a memory map. Raises BadInput when there are
    more domains than rows.
    """
    n = len(x_ND)
    if not 1 <= k <= n:
        raise BadInput(f"{k} domains of {n} documents: each domain needs at least one; use fewer domains or more documents")
    if balanced and k > MANY and start_KD is None:
        return _in_groups(x_ND, k, rng_seed, progress)
    order_N = np.random.default_rng(rng_seed).permutation(n)
    if start_KD is None:
        start_KD = _start(x_ND[np.sort(order_N[: max(SAMPLE, 8 * k)])], k, balanced, rng_seed, progress)
    size = max(BLOCK // k * k, k)
    blocks = [np.sort(order_N[start : start + size]) for start in range(0, n, size)]
    if len(blocks[-1]) < k:
        blocks[-2:] = [np.sort(np.concatenate(blocks[-2:]))]
    soft = _passes(x_ND, blocks, start_KD, balanced, TOLERANCE, progress)
    return _passes(x_ND, blocks, soft.centroid_KD, True, TOLERANCE, progress, exact=True, what="equal sizes") if balanced else soft


def _in_groups(x_ND: Floats, k: int, rng_seed: int, progress: Progress) -> Clusters:
    """Balanced k-means into groups of domains, as large as the number of their domains, and then within each group. Sizes of domains
    differ by at most one."""
    n, groups = len(x_ND), min(GROUPS, math.isqrt(k))
    domains_G = np.bincount(np.arange(k) % groups)
    size_K = n // k + (np.arange(k) < n % k)
    size_G = np.add.reduceat(size_K, np.cumsum(domains_G) - domains_G)
    order_N = np.random.default_rng(rng_seed).permutation(n)
    start_GD = _start(x_ND[np.sort(order_N[: max(SAMPLE, 8 * groups)])], groups, True, rng_seed, progress)
    outer = _passes(x_ND, [np.arange(n)], start_GD, True, TOLERANCE, progress, size_K=size_G, what="find groups")
    outer = _passes(x_ND, [np.arange(n)], outer.centroid_KD, True, TOLERANCE, progress, exact=True, size_K=size_G, what="sizes of groups")
    parts, label_N, done = [], np.zeros(n, np.int64), 0
    for group, domains in enumerate(domains_G.tolist()):
        progress("cluster", group, groups, "groups")
        rows = np.flatnonzero(outer.label_N == group)
        parts.append(kmeans(x_ND[rows], domains, rng_seed=rng_seed + group))
        label_N[rows] = done + parts[-1].label_N
        done += domains
    progress("cluster", groups, groups, "groups")
    objective = sum(part.objective * len(part.label_N) for part in parts) / n
    return Clusters(np.concatenate([part.centroid_KD for part in parts]), label_N, objective)


@one_thread
def assign(x_ND: Floats, centroid_KD: Floats, *, balanced: bool = True) -> Clusters:
    """The clusters of centroids that stay where they are: each row to the nearest, or in sizes that differ by at most one if balanced."""
    dist2_KN = np.ascontiguousarray(squared_distances(x_ND, centroid_KD).T)
    label_N = assign_balanced(dist2_KN)[0] if balanced else fill_empty(dist2_KN)
    return Clusters(np.asarray(centroid_KD, np.float32), label_N, float(dist2_KN[label_N, np.arange(len(x_ND))].mean()))


def _passes(
    x_ND: Floats, blocks: Sequence[Ints], start_KD: Floats, balanced: bool, tolerance: float, progress: Progress, exact: bool = False,
    size_K: Ints | None = None, what: str = "cluster",
) -> Clusters:  # fmt: skip
    """Assign and average until the objective falls by less than the tolerance. If `exact`, sizes differ by at most one, or are those that
    are given, of one block."""
    n, k = len(x_ND), len(start_KD)
    centroid_KD = np.array(start_KD, np.float64)
    label_N = np.zeros(n, np.int64)
    price_K: Floats = np.zeros(k)
    objective = best = np.inf
    for done in range(PASSES):
        progress(what, done, PASSES, "passes")
        sum_KD, square = np.zeros_like(centroid_KD), 0.0
        for block in blocks:
            x_BD = np.asarray(x_ND[block])
            dist2_KB = np.ascontiguousarray(squared_distances(x_BD, centroid_KD).T)
            if balanced:
                label_N[block], price_K = assign_balanced(dist2_KB, price_K, exact=exact, size_K=size_K)
            else:
                label_N[block] = fill_empty(dist2_KB)
            sum_KD += members(label_N[block], k) @ x_BD
            square += float(np.square(x_BD, dtype=np.float64).sum())
        count_K1 = np.maximum(np.bincount(label_N, minlength=k), 1)[:, None]
        centroid_KD = sum_KD / count_K1
        objective = (square - float((count_K1 * centroid_KD**2).sum())) / n  # the sum of |x - c|² is that of |x|² - |c|² when c is the mean
        if objective > best * (1 - tolerance):
            break
        best = objective
    progress(what, PASSES, PASSES, "passes")
    return Clusters(centroid_KD.astype(np.float32), label_N, objective)


def squared_distances(x_ND: Floats, centroid_KD: Floats) -> Floats:
    """|x - c|² for every pair [N, K], float32, never below zero."""
    x_ND = np.asarray(x_ND, np.float32)
    centroid_KD = np.asarray(centroid_KD, np.float32)
    dist2_NK = x_ND @ (np.float32(-2) * centroid_KD.T)
    dist2_NK += np.einsum("nd,nd->n", x_ND, x_ND)[:, None]
    dist2_NK += np.einsum("kd,kd->k", centroid_KD, centroid_KD)
    return np.maximum(dist2_NK, 0, out=dist2_NK)


def members(label_N: Ints, k: int) -> sparse.csc_array:
    """Indicator matrix of labels [K, N] float32: multiplied by rows, it sums them by label."""
    n = len(label_N)
    return sparse.csc_array((np.ones(n, np.float32), label_N, np.arange(n + 1)), shape=(k, n))


def fill_empty(cost_KN: Floats) -> Ints:
    """Nearest domain of each row. An empty domain takes the row with the highest cost from a domain that has more than one."""
    k, n = cost_KN.shape
    label_N = cost_KN.argmin(0)
    count_K = np.bincount(label_N, minlength=k)
    if n >= k and not count_K.all():
        worst_first = iter(np.argsort(-cost_KN[label_N, np.arange(n)], kind="stable"))
        for empty in np.flatnonzero(count_K == 0):
            row = next(row for row in worst_first if count_K[label_N[row]] > 1)
            count_K[label_N[row]] -= 1
            label_N[row] = empty
            count_K[empty] = 1
    return label_N


@one_thread
def assign_balanced(
    cost_KN: Floats, price_K: Floats | None = None, *, exact: bool = True, size_K: Ints | None = None
) -> tuple[Ints, Floats]:  # fmt: skip
    """The cheapest assignment with sizes that differ by at most one, or with given ones above zero: labels [N], and prices [K] to start the
    next call from.

    If not `exact`, sizes are off by about one per cent, at a fraction of the time.
    """
    k, n = cost_KN.shape
    price_K = balance_prices(cost_KN, np.zeros(k) if price_K is None else price_K, 1.0 if size_K is None else size_K * k / n)
    label_N = (cost_KN + price_K.astype(cost_KN.dtype)[:, None]).argmin(0)
    low, high = (n // k, -(-n // k)) if size_K is None else (size_K, size_K)
    return repair(cost_KN, label_N, low, high) if exact else label_N, price_K


def balance_prices(cost_KN: Floats, price_K: Floats, share_K: Floats | float = 1.0) -> Floats:
    """Prices [K] under which the domains get nearly equal numbers of rows, times their shares (of mean 1).

    They maximise the entropic dual of the transportation problem (arXiv:1306.0895), by Levenberg-Marquardt steps, with less and
    less smoothing.
    """
    k, n = cost_KN.shape
    price_K = np.array(price_K, np.float64)
    spread = float(cost_KN.std(axis=0).mean()) or 1.0
    for sharpness in SHARPNESS:
        epsilon, damping = sharpness * spread, 0.03
        dual, part_KN, excess_K = _dual(cost_KN, price_K, epsilon, share_K)
        for _ in range(STEPS):
            if np.abs(excess_K).max() < SLACK * n / k:
                break
            shared_KM = part_KN[:, part_KN.max(0) < 0.999]  # rows that nearly belong to one domain have no curvature
            hessian_KK = np.diag(shared_KM.sum(1) + damping * n / k * share_K) - shared_KM @ shared_KM.T
            step_K = epsilon * np.linalg.solve(hessian_KK, excess_K)
            new = _dual(cost_KN, price_K + step_K, epsilon, share_K)
            if new[0] >= dual:
                price_K += step_K
                dual, part_KN, excess_K = new
                damping = max(damping / 8, 1e-4)
            else:
                damping *= 8
    return price_K - price_K.mean()


def _dual(cost_KN: Floats, price_K: Floats, epsilon: float, share_K: Floats | float) -> tuple[float, Floats, Floats]:
    """The entropic dual, the part of each row that each domain gets [K, N], and each domain's excess of rows [K]."""
    k, n = cost_KN.shape
    part_KN = cost_KN + price_K.astype(cost_KN.dtype)[:, None]
    least_N = part_KN.min(0)
    part_KN -= least_N
    part_KN *= -1 / epsilon
    np.exp(part_KN, out=part_KN)
    total_N = part_KN.sum(0)
    part_KN /= total_N
    paid = (price_K * share_K).sum() * n / k
    dual = float(least_N.sum(dtype=np.float64) - epsilon * np.log(total_N).sum(dtype=np.float64) - paid)
    return dual, part_KN, part_KN.sum(1, dtype=np.float64) - n / k * share_K


def repair(cost_KN: Floats, label_N: Ints, low: int | Ints, high: int | Ints) -> Ints:
    """Move rows along cheapest paths between domains until all sizes, or each [K], are in [low, high]. Optimal if label_N was optimal for
    its sizes."""
    k = len(cost_KN)
    label_N = label_N.copy()
    count_K = np.bincount(label_N, minlength=k)
    gap_KK = np.full((k, k), np.inf)  # cheapest move of one row from a to b
    row_KK = np.zeros((k, k), np.int64)  # which row that is

    def refresh(a: int) -> None:
        rows = np.flatnonzero(label_N == a)
        gap_KK[a] = np.inf
        if len(rows):
            move_KM = cost_KN[:, rows].astype(np.float64)
            move_KM -= move_KM[a].copy()
            best_K = move_KM.argmin(1)
            gap_KK[a] = move_KM[np.arange(k), best_K]
            row_KK[a] = rows[best_K]
        gap_KK[a, a] = 0

    for a in range(k):
        refresh(a)
    while True:
        over_K, under_K = count_K > high, count_K < low
        if over_K.any():
            path = _cheapest_path(gap_KK, over_K, count_K < high, np.inf)
        elif under_K.any():
            path = _cheapest_path(gap_KK, count_K > low, under_K, np.inf)
        else:  # the sizes are right; other domains may be cheaper to have the larger ones
            path = _cheapest_path(gap_KK, count_K > low, count_K < high, -1e-9)
        if path is None:
            return label_N
        moved = [row_KK[a, b] for a, b in pairwise(path)]
        label_N[moved] = path[1:]
        count_K[path[0]] -= 1
        count_K[path[-1]] += 1
        for a in path:
            refresh(a)


def _cheapest_path(gap_KK: Floats, sources: NDArray[np.bool_], sinks: NDArray[np.bool_], limit: float) -> list[int] | None:
    """Bellman-Ford from all sources; the path to the cheapest sink, or None if it costs `limit` or more."""
    if not (sources.any() and sinks.any()):
        return None
    k = len(gap_KK)
    cost_K = np.where(sources, 0.0, np.inf)
    before_K = np.full(k, -1)
    for _ in range(k):
        through_KK = cost_K[:, None] + gap_KK
        via_K = through_KK.argmin(0)
        new_K = through_KK[via_K, np.arange(k)]
        better = new_K < cost_K - 1e-12
        if not better.any():
            break
        cost_K[better] = new_K[better]
        before_K[better] = via_K[better]
    sink = int(np.where(sinks, cost_K, np.inf).argmin())
    if not cost_K[sink] < limit:
        return None
    path = [sink]
    while before_K[path[0]] >= 0 and len(path) <= k:
        path.insert(0, int(before_K[path[0]]))
    return path


def _start(x_SD: Floats, k: int, balanced: bool, rng_seed: int, progress: Progress) -> Floats:
    """Centroids [K, D] of the best of a few runs on a sample, which start from k-means++."""
    progress("try starts", 0, STARTS, "trials")
    from sklearn.cluster import kmeans_plusplus  # takes two seconds, needed only here

    x_SD, trials = np.asarray(x_SD, np.float32), []
    for trial in range(STARTS):

        def tell(_: str, done: float, total: float, __: str, trial: int = trial) -> None:
            progress("try starts", trial + done / total, STARTS, "trials")

        start_KD = kmeans_plusplus(x_SD, k, random_state=rng_seed + trial)[0]
        trials.append(_passes(x_SD, [np.arange(len(x_SD))], start_KD, balanced, 10 * TOLERANCE, tell))
    return min(trials, key=lambda trial: trial.objective).centroid_KD
