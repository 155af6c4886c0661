"""Balanced k-means: equal domains, exactly assigned.

Shapes: N documents (B of them in one block), K domains, D dimensions.

Equal sizes make the assignment step a transportation problem with K small. It is solved in two parts: prices per domain
from Newton steps on the smoothed dual (nearly balanced, a few passes over the costs), then shortest augmenting paths
over the K domains until the sizes are right, which keeps the assignment optimal at every step.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

BLOCK = 1 << 15  # documents assigned at once, rounded down to a multiple of K
TOLERANCE = 1e-4  # stop when the objective falls by less than this share
PASSES = 30


class Clusters(NamedTuple):
    """A clustering: centroid_KD float32, label_N, and the mean squared distance of a document to its centroid."""

    centroid_KD: Floats
    label_N: Ints
    objective: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """Documents per domain [K]."""
        return tuple(np.bincount(self.label_N, minlength=len(self.centroid_KD)).tolist())


def kmeans(
    x_ND: Floats, k: int, *, balanced: bool = True, rng_seed: int = 0, start_KD: Floats | None = None, progress: Progress = silent
) -> Clusters:
    """Cluster rows into k domains: sizes differ by at most one if balanced, and no domain is empty.

    Larger inputs are taken in blocks (equal sizes within each), centroids are means over all of them, so the order of
    blocks does not decide. Starts from k-means++ on the first block, or from start_KD. x_ND may be a memory map.
    Raises BadInput when there are more domains than rows.
    """
    n = len(x_ND)
    if not 1 <= k <= n:
        raise BadInput(f"{k} domains of {n} documents: each domain needs at least one; ask for fewer domains or give more documents")
    rng = np.random.default_rng(rng_seed)
    order_N = rng.permutation(n) if n > BLOCK else np.arange(n)
    size = max(BLOCK // k * k, k)
    blocks = [np.sort(order_N[start : start + size]) for start in range(0, n, size)]
    if len(blocks) > 1 and len(blocks[-1]) < k:
        blocks[-2:] = [np.sort(np.concatenate(blocks[-2:]))]
    centroid_KD = _start(np.asarray(x_ND[blocks[0]]), k, rng_seed) if start_KD is None else np.array(start_KD, np.float64)
    label_N = np.zeros(n, np.int64)
    best = np.inf
    price_K: Floats = np.zeros(k)
    for step in range(PASSES):
        progress("cluster", step, PASSES, "passes")
        sum_KD = np.zeros_like(centroid_KD)
        total = 0.0
        for block in blocks:
            x_BD = np.asarray(x_ND[block])
            dist2_BK = squared_distances(x_BD, centroid_KD)
            if balanced:
                label_B, price_K = assign_balanced(dist2_BK, price_K)
            else:
                label_B = fill_empty(dist2_BK)
            label_N[block] = label_B
            total += float(dist2_BK[np.arange(len(block)), label_B].sum())
            sum_KD += sum_rows(x_BD, label_B, k)
        count_K = np.bincount(label_N, minlength=k)
        centroid_KD = sum_KD / np.maximum(count_K, 1)[:, None]
        if total > best * (1 - TOLERANCE):
            break
        best = total
    progress("cluster", PASSES, PASSES, "passes")
    # with centroids at the means, the sum of squares splits: |x|² = |x - c|² + |c|²
    squares = sum(float(np.square(x_ND[block], dtype=np.float64).sum()) for block in blocks)
    objective = (squares - float((count_K[:, None] * centroid_KD**2).sum())) / n
    return Clusters(centroid_KD.astype(np.float32), label_N, objective)


def squared_distances(x_ND: Floats, centroid_KD: Floats) -> Floats:
    """|x - c|² for every pair [N, K], float32, never below zero."""
    x_ND = np.asarray(x_ND, np.float32)
    centroid_KD = np.asarray(centroid_KD, np.float32)
    dist2_NK = x_ND @ (-2 * centroid_KD.T)
    dist2_NK += np.einsum("nd,nd->n", x_ND, x_ND)[:, None]
    dist2_NK += np.einsum("kd,kd->k", centroid_KD, centroid_KD)
    return np.maximum(dist2_NK, 0, out=dist2_NK)


def sum_rows(x_ND: Floats, label_N: Ints, k: int) -> Floats:
    """Sum of the rows of each label [K, D], float64."""
    order_N = np.argsort(label_N, kind="stable")
    sorted_N = label_N[order_N]
    present, first = np.unique(sorted_N, return_index=True)
    sum_KD = np.zeros((k, x_ND.shape[1]))
    sum_KD[present] = np.add.reduceat(x_ND[order_N].astype(np.float64), first, axis=0)
    return sum_KD


def fill_empty(cost_NK: Floats) -> Ints:
    """Nearest domain of each row; a domain nobody chose takes the row that is worst off and whose own domain can spare it."""
    n, k = cost_NK.shape
    label_N = cost_NK.argmin(1)
    count_K = np.bincount(label_N, minlength=k)
    if n >= k and not count_K.all():
        worst_first = iter(np.argsort(-cost_NK[np.arange(n), label_N], kind="stable"))
        for empty in np.flatnonzero(count_K == 0):
            row = next(row for row in worst_first if count_K[label_N[row]] > 1)
            count_K[label_N[row]] -= 1
            label_N[row] = empty
            count_K[empty] = 1
    return label_N


def assign_balanced(cost_NK: Floats, price_K: Floats | None = None) -> tuple[Ints, Floats]:
    """The cheapest assignment whose sizes differ by at most one: label_N, and prices to start the next from."""
    n, k = cost_NK.shape
    price_K = balance_prices(cost_NK, np.zeros(k) if price_K is None else price_K)
    label_N = (cost_NK + price_K.astype(cost_NK.dtype)).argmin(1)
    return repair(cost_NK, label_N, n // k, -(-n // k)), price_K


def balance_prices(cost_NK: Floats, price_K: Floats) -> Floats:
    """Prices [K] under which the domains nearly share the rows equally: Newton steps on the entropic dual, sharpened."""
    n, k = cost_NK.shape
    price_K = np.array(price_K, np.float64)
    spread = float(cost_NK.std(axis=1).mean()) or 1.0
    for sharpness in (0.3, 0.1, 0.03, 0.01):
        epsilon = sharpness * spread
        for _ in range(3):
            share_NK = cost_NK + price_K.astype(cost_NK.dtype)
            share_NK -= share_NK.min(1, keepdims=True)
            np.exp(share_NK / -epsilon, out=share_NK)
            share_NK /= share_NK.sum(1, keepdims=True)
            count_K = share_NK.sum(0, dtype=np.float64)
            excess_K = count_K - n / k
            if np.abs(excess_K).max() < 0.01 * n / k:
                break
            hessian_KK = np.diag(count_K) - share_NK.T @ share_NK + 1e-3 * n / k * np.eye(k)
            step_K = np.linalg.solve(hessian_KK, excess_K)
            price_K += epsilon * np.clip(step_K, -4, 4)
    return price_K - price_K.mean()


def repair(cost_NK: Floats, label_N: Ints, low: int, high: int) -> Ints:
    """Move rows along cheapest paths between domains until every size is in [low, high]; optimal if label_N was for its sizes."""
    k = cost_NK.shape[1]
    label_N = label_N.copy()
    count_K = np.bincount(label_N, minlength=k)
    gap_KK = np.full((k, k), np.inf)  # cheapest move of one row from a to b
    row_KK = np.zeros((k, k), np.int64)  # which row that is

    def refresh(a: int) -> None:
        rows = np.flatnonzero(label_N == a)
        gap_KK[a] = np.inf
        if len(rows):
            move = cost_NK[rows].astype(np.float64)
            move -= move[:, [a]]
            best = move.argmin(0)
            gap_KK[a] = move[best, np.arange(k)]
            row_KK[a] = rows[best]
        gap_KK[a, a] = 0

    for a in range(k):
        refresh(a)
    while True:
        over, under = count_K > high, count_K < low
        if over.any():
            sources, sinks, limit = over, count_K < high, np.inf
        elif under.any():
            sources, sinks, limit = count_K > low, under, np.inf
        else:
            sources, sinks, limit = count_K > low, count_K < high, -1e-9
        path = _cheapest_path(gap_KK, sources, sinks, limit)
        if path is None:
            return label_N
        moved = [row_KK[a, b] for a, b in pairwise(path)]
        label_N[moved] = path[1:]
        count_K[path[0]] -= 1
        count_K[path[-1]] += 1
        for a in path:
            refresh(a)


def _cheapest_path(gap_KK: Floats, sources: NDArray[np.bool_], sinks: NDArray[np.bool_], limit: float) -> list[int] | None:
    """Bellman-Ford from all sources at once; the path to the cheapest sink, or None if it costs `limit` or more."""
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


def _start(x_ND: Floats, k: int, rng_seed: int) -> Floats:
    """k-means++ centroids [K, D]."""
    centroid_KD, _ = kmeans_plusplus(np.asarray(x_ND, np.float32), k, random_state=rng_seed)
    return centroid_KD.astype(np.float64)
