"""The magnitudes between which a trimming rule keeps an expert's values, by their rank over one tensor or over all of them.

N values; E experts
"""

from collections.abc import Mapping, Sequence

import numpy as np

from elmwood.merge.rules.base import Floats
from elmwood.merge.sums.blocks import magnitudes, pieces_of, read_deltas
from elmwood.merge.sums.kth import Kth
from elmwood.weights.experts import Source
from elmwood.weights.tensors import BLOCK, ReadAhead, StoredTensor

SAMPLE, STRIP = 1 << 16, 1 << 12  # magnitudes that say about where a threshold lies, and how many of them stand side by side
GROUP = 8  # experts whose magnitudes are ranked in one reading
Cut = tuple[float, float]  # magnitudes from the first up to the second are kept


def find_cuts(shares: tuple[float, float], tensors: Mapping[str, StoredTensor], sources: Sequence[Source], reader: ReadAhead) -> list[Cut]:
    """For each expert the cut that keeps magnitudes by rank over all these tensors together: `shares` as in `Rule.ranks`."""
    numbers = sum(place.numbers for place in tensors.values())
    ranks = [int(share * numbers) for share in shares]
    found: list[Cut] = []
    for start in range(0, len(sources), GROUP):
        group = sources[start : start + GROUP]
        samples = _sample(group, tensors, numbers, reader) if numbers > 4 * BLOCK else [None] * len(group)
        kths = [[Kth(numbers, rank, sample) for rank in ranks] for sample in samples]
        while any(one.found is None for pair in kths for one in pair):
            for name, place in tensors.items():
                _push(name, place, group, kths, reader)
            for one in (one for pair in kths for one in pair):
                one.settle()
        found += [(low.found or 0.0, high.found if high.found is not None else np.inf) for low, high in kths]
    return found


def _push(name: str, place: StoredTensor, group: Sequence[Source], kths: Sequence[Sequence[Kth]], reader: ReadAhead) -> None:
    """Show every magnitude of a tensor of these experts to those who rank them."""
    for block in read_deltas(name, place, group, list(pieces_of((0, place.numbers))), reader):
        for magnitude_N, pair in zip(magnitudes(block.delta_EN), kths, strict=True):
            for kth in pair:
                kth.push(magnitude_N)


def _sample(group: Sequence[Source], tensors: Mapping[str, StoredTensor], numbers: int, reader: ReadAhead) -> list[Floats | None]:
    """Magnitudes of each expert, from strips evenly over the tensors."""
    found: list[list[Floats]] = [[] for _ in group]
    for name, place in tensors.items():
        count = max(1, max(SAMPLE, numbers >> 8) * place.numbers // numbers // STRIP)  # what a window holds grows with the root alone
        firsts = np.linspace(0, max(0, place.numbers - STRIP), count).astype(int).tolist()
        strips = [(first, min(place.numbers, first + STRIP)) for first in firsts]
        for block in read_deltas(name, place, group, strips, reader):
            for magnitude_N, mine in zip(magnitudes(block.delta_EN), found, strict=True):
                mine.append(magnitude_N)
    return [np.concatenate(mine) for mine in found]
