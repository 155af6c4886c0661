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
    blocks = []
    for block in read_deltas(name, place, sources, list(pieces_of((0, place.numbers))), reader):
        point_EN = np.stack(block.delta_EN)
        blocks.append(exact.block_gram(point_EN + block.seed_N if whole else point_EN))
    if len(blocks) == 1:
        return blocks[0]
    found_EE = np.zeros((len(sources), len(sources)))
    for e, row_B in enumerate(zip(*blocks, strict=True)):
        found_EE[e, : e + 1] = [math.fsum(found_B) for found_B in zip(*(block_E[: e + 1] for block_E in row_B), strict=True)]
    return np.tril(found_EE) + np.tril(found_EE, -1).T
