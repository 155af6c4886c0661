"""What a merge will lose, from what its experts left of their text: no model is run, no text is read. A proxy: true losses decide.

O outputs and I inputs of a linear layer; E experts. Deltas are from the seed.

Both estimates are quadratic in the candidate and add over experts, so the three sums of a tensor serve any number of candidates:
tr(D G Dᵀ) - 2 tr(D R) + c, with G = Σ w_i G_i, R = Σ w_i G_i D_iᵀ, c = Σ w_i tr(D_i G_i D_iᵀ).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.merge.layer_weights import everywhere, layer_name
from elmwood.merge.rules.base import Floats
from elmwood.merge.states import open_all, statistics_of
from elmwood.merge.statistics import ExpertStatistics
from elmwood.merge.sums.whole_tensor import whole_delta
from elmwood.records import Merged, Seed, Statistics
from elmwood.store import Store
from elmwood.weights.experts import Source, Whole
from elmwood.weights.tensors import SIZES, Files, decode

Doubles = NDArray[np.float64]
Kind = Literal["gram", "fisher"]


class Quadratic(NamedTuple):
    """Sums over experts for one tensor. `curvature` is a matrix [I, I] (of inputs) or of the tensor's own shape (a diagonal)."""

    curvature: Doubles
    right: Doubles  # curvature times delta, summed
    constant: float
    diagonal: bool


def quadratic(experts: Iterable[tuple[float, Floats, Floats]], diagonal: bool) -> Quadratic | None:
    """From (weight, curvature, delta) of each expert. None without experts."""
    made: Quadratic | None = None
    for weight, curvature, delta in experts:
        pulled = curvature * delta if diagonal else delta @ curvature
        mine = Quadratic(np.asarray(curvature * weight, np.float64), np.asarray(pulled * weight, np.float64),
                         weight * float((pulled * delta).sum()), diagonal)  # fmt: skip
        made = mine if made is None else Quadratic(made[0] + mine[0], made[1] + mine[1], made[2] + mine[2], diagonal)
    return made


def error(delta: Floats, known: Quadratic) -> float:
    """The candidate's distance from all experts, each measured by its own curvature; 0 or more, but for rounding."""
    pulled = known.curvature * delta if known.diagonal else delta @ known.curvature
    return float((pulled * delta).sum()) - 2 * float((known.right * delta).sum()) + known.constant


def estimates(
    seed: Seed, members: Sequence[str], candidates: Mapping[str, Merged], store: Store, kind: Kind = "gram", progress: Progress = silent
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Candidate -> layer ("0", "1", …, or "outside") -> estimate, from the statistics of these experts. A tensor of each stands in memory.

    "gram": the squared error of what linear layers give out, over that of the seed, which so has 1; the mean over the tensors of a layer.
    "fisher": half the squared distance weighed by the diagonal of the Fisher matrix (of rows' mean losses, nats), of all tensors.
    Raises BadInput where an expert left no statistics.
    """
    tensors, sources, _ = open_all(seed, {digest: everywhere(1.0) for digest in members}, store, False)
    left = statistics_of(True, members, store)
    statistics = [ExpertStatistics(store.load(left[one.digest], Statistics), store) for one in sources]
    merged: dict[str, Source] = {name: Whole(one.digest, store.folder(one.files), tensors) for name, one in candidates.items()}
    found: dict[str, dict[str, float]] = {name: {} for name in candidates}
    counts: dict[str, int] = {}
    files = Files()
    names = [name for name, place in tensors.items() if place.dtype in SIZES and (kind == "fisher" or statistics[0].gram(name) is not None)]
    for number, name in enumerate(names):
        place = tensors[name]
        seed_N = decode(files.read(place, 0, place.numbers), place.dtype).astype(np.float64)
        curves = [(one.gram if kind == "gram" else one.fisher)(name) for one in statistics]
        pairs = (
            (one_left.record.fisher / 2 if kind == "fisher" else 1.0, curve, whole_delta(one, name, place, seed_N, files))
            for one, one_left, curve in zip(sources, statistics, curves, strict=True)
            if curve is not None
        )
        known = quadratic(pairs, kind == "fisher")
        where = layer_name(name)
        for title, one in merged.items():
            value = error(whole_delta(one, name, place, seed_N, files), known) if known else 0.0
            scale = known.constant if known and kind == "gram" else 1.0
            found[title][where] = found[title].get(where, 0.0) + (value / scale if scale else 0.0)
        counts[where] = counts.get(where, 0) + 1
        progress("estimate", number + 1, len(names), "tensors")
    files.close()
    if kind == "fisher":
        return found
    return {title: {where: value / counts[where] for where, value in rows.items()} for title, rows in found.items()}


def by_coordinates(
    begin: str, others: Sequence[str], layers: Sequence[str], estimated: Mapping[str, Mapping[str, float]],
    loss: Callable[[Mapping[str, str]], float],
) -> dict[str, str]:  # fmt: skip
    """Layer -> candidate, by true losses: one pass over the layers, each of which goes from `begin` to the first of `others` that lowers
    the loss. Estimates decide the order alone: of layers by how far theirs could fall, of candidates by theirs there. Without them,
    as they come. At most len(layers) * len(others) + 1 losses."""

    def at(name: str, layer: str) -> float:
        return estimated.get(name, {}).get(layer, 0.0)

    choice = dict.fromkeys(layers, begin)
    best = loss(choice)
    for layer in sorted(layers, key=lambda one: min((at(name, one) for name in others), default=0.0) - at(begin, one)):
        for name in sorted(others, key=lambda one: at(one, layer)):
            other = {**choice, layer: name}
            if (lower := loss(other)) < best:
                choice, best = other, lower
                break
    return choice
