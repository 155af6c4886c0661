"""Rules for the weights of linear layers, which look at a whole matrix. All else is averaged beside them.

O outputs and I inputs of a linear layer; R singular values. `delta` [O, I] is expert minus seed.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from elmwood.merge.rules.base import Floats, Local, Settings, Shape, Total
from elmwood.threads import one_thread

Doubles = NDArray[np.float64]
NOTHING = 1e-9  # of the largest singular value: below, a direction is rounding


def normal_shapes(shape: Shape) -> tuple[Shape, Shape]:
    """Of the fields of a least-squares problem: [I, I] and [I, O]."""
    return (shape[1], shape[1]), (shape[1], shape[0])


@one_thread
def regress(delta_OI: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Normal equations: G and G deltaᵀ. G is xᵀx of what the layer read, off its diagonal times `alpha` (RegMean, arXiv:2212.09849).

    Without a Gram matrix (the weight of no linear layer) G is 1: the average."""
    gram_II = local.statistic("gram")
    if gram_II is None:
        gram_II = np.eye(delta_OI.shape[1])
    else:
        gram_II = gram_II * settings["alpha"] + np.diag(np.diag(gram_II) * (1 - settings["alpha"]))
    return weight * gram_II, weight * (gram_II @ delta_OI.T)


@one_thread
def weigh_by_delta(delta_OI: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Normal equations with G = deltaᵀ delta / |delta|^2: inputs lie about where delta does (WUDI, arXiv:2503.08099, in closed form)."""
    size = float(np.square(delta_OI).sum())
    if not size:
        return np.zeros((delta_OI.shape[1],) * 2), np.zeros_like(delta_OI.T)
    gram_II = delta_OI.T @ delta_OI * (weight / size)
    return gram_II, gram_II @ delta_OI.T


@one_thread
def solve(sums: tuple[Floats, ...], seed_OI: Floats, total: Total, settings: Settings) -> Floats:
    """Seed + the delta that answers the summed normal equations. `ridge`, a share of the mean of G's diagonal, is added to it: where G
    says nothing the seed stays. Of LAPACK: the same bytes on the same kernels."""
    gram_II, right_IO = sums
    damping = settings["ridge"] * float(np.trace(gram_II)) / len(gram_II)
    if not damping:
        delta_IO = np.linalg.lstsq(gram_II, right_IO, rcond=NOTHING)[0]
    else:
        delta_IO = np.linalg.solve(gram_II + damping * np.eye(len(gram_II)), right_IO)
    return seed_OI + settings["scale"] * delta_IO.T


@one_thread
def flatten_spectrum(sums: tuple[Floats, ...], seed_OI: Floats, total: Total, settings: Settings) -> Floats:
    """Seed + scale * mean singular value * U Vᵀ of the summed delta: no direction dominates (Iso-C, arXiv:2502.04959). Of LAPACK."""
    u_OR, size_R, v_RI = np.linalg.svd(sums[0], full_matrices=False)
    kept = size_R > NOTHING * size_R.max(initial=0.0)
    return seed_OI + settings["scale"] * (size_R.mean() if size_R.size else 0.0) * (u_OR[:, kept] @ v_RI[kept])


@one_thread
def join_singular_vectors(deltas: Callable[[], Iterator[Floats]], weight_E: Floats, settings: Settings) -> Floats:
    """Each delta's strongest singular directions, a share `rank` (0: one part in as many as there are experts) of them, all made
    orthogonal together (TSV-Merge, arXiv:2412.00081). Of LAPACK."""
    left, sizes, right = [], [], []
    count = int(np.count_nonzero(weight_E))
    for delta_OI, weight in zip(deltas(), weight_E.tolist(), strict=True):
        if not weight:
            continue
        u_OR, size_R, v_RI = np.linalg.svd(delta_OI, full_matrices=False)
        keep = max(1, int(len(size_R) * (settings["rank"] or 1 / count)))
        left.append(u_OR[:, :keep])
        sizes.append(size_R[:keep] * weight)
        right.append(v_RI[:keep])
    size_R = np.concatenate(sizes)
    used = size_R != 0  # a delta of low rank has directions that are none
    if not used.any():
        return np.zeros((left[0].shape[0], right[0].shape[1]))
    return (_orthogonal(np.concatenate(left, 1)[:, used]) * size_R[used]) @ _orthogonal(np.concatenate(right)[used])


def _orthogonal(matrix: Doubles) -> Doubles:
    """The orthogonal matrix nearest to one (Procrustes)."""
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


def select_and_vote(deltas: Callable[[], Iterator[Floats]], weight_E: Floats, settings: Settings) -> Floats:
    """SCE with its selection (arXiv:2408.07990): the `density` of values that vary most between experts, the mean of those who agree in
    sign, weighed by the squared length of what was selected. The deltas are read twice."""
    count, plain, squares = 0, None, None
    for delta in deltas():
        count += 1
        plain = delta.copy() if plain is None else plain + delta
        squares = np.square(delta) if squares is None else squares + np.square(delta)
    assert plain is not None
    assert squares is not None
    variance = squares / count - np.square(plain / count)
    keep = int(np.count_nonzero(variance > 0) * settings["density"])
    if not keep:
        return np.zeros_like(plain)
    threshold = np.partition(variance.ravel(), variance.size - keep)[variance.size - keep]
    mask, side = variance >= threshold, np.where(plain >= 0, 1.0, -1.0)
    mass, total = np.zeros_like(plain), np.zeros_like(plain)
    for delta, weight in zip(deltas(), weight_E.tolist(), strict=True):
        chosen = np.where(mask, delta, 0.0)
        mine = weight * float(np.square(chosen).sum())
        agrees = np.sign(chosen) == side
        mass += np.where(agrees, chosen * mine, 0.0)
        total += agrees * mine
    return np.divide(mass, total, out=np.zeros_like(mass), where=total != 0)
