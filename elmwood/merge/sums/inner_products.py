"""Inner products of experts, from one reading of a tensor: all that rules on the sphere need to know of them.

N values of a block; E experts
"""

import math
from collections.abc import Sequence

import numpy as np

from elmwood.merge.rules.base import Floats
from elmwood.merge.sums.blocks import pieces_of, read_deltas
from elmwood.weights import exact
from elmwood.weights.experts import Source
from elmwood.weights.tensors import ReadAhead, StoredTensor


def inner_products(name: str, place: StoredTensor, sources: Sequence[Source], whole: bool, reader: ReadAhead) -> Floats:
    """[E, E], of the experts' deltas or, where `whole`, of their weights as they are; blocks of all experts stand in memory."""
    count = len(sources)
    found: dict[tuple[int, int], list[float]] = {(i, j): [] for i in range(count) for j in range(i + 1)}
    for block in read_deltas(name, place, sources, list(pieces_of((0, place.numbers))), reader):
        point_EN = [delta_N + block.seed_N for delta_N in block.delta_EN] if whole else block.delta_EN
        for (i, j), sums in found.items():
            sums.append(exact.block_inner(point_EN[i], point_EN[j]))
    inner_EE = np.zeros((count, count))
    for (i, j), sums in found.items():
        inner_EE[i, j] = inner_EE[j, i] = math.fsum(sums)
    return inner_EE
