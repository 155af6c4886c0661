"""The k-th largest magnitude of a tensor that is read in pieces: a sample says about where, one reading settles it exactly.

N numbers of a part of a tensor
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmwood.merge import kernels

Floats = NDArray[np.floating[Any]]
SPREAD = 6  # standard errors of a sample's quantile that the window reaches to either side


class Kth:
    """Finds the `rank`-th largest of `numbers` magnitudes. Rank 0: infinity; a rank of all or more: 0."""

    def __init__(self, numbers: int, rank: int, sample_N: Floats | None):
        self.numbers, self.rank = numbers, rank
        self.low, self.high = self._window(sample_N)
        self.above = 0  # magnitudes at or over the window
        self.inside: list[Floats] = []
        self.found: float | None = np.inf if rank <= 0 else 0.0 if rank >= numbers else None

    def _window(self, sample_N: Floats | None) -> tuple[float, float]:
        if sample_N is None or not sample_N.size or not 0 < self.rank < self.numbers:
            return 0.0, np.inf
        share, size = self.rank / self.numbers, sample_N.size
        reach = SPREAD * np.sqrt(share * (1 - share) / size) + 2 / size
        falling_N = np.sort(sample_N)[::-1]
        top, bottom = int((share - reach) * size), int((share + reach) * size) + 1
        return (float(falling_N[bottom]) if bottom < size else 0.0), (float(falling_N[top]) if top > 0 else np.inf)

    def push(self, magnitude_N: Floats) -> None:
        if self.found is not None:
            return
        inside_N = np.empty(magnitude_N.size + 1)
        above, inside = kernels.window(magnitude_N, self.low, self.high, inside_N)
        self.above += above
        self.inside.append(inside_N[:inside].copy())

    def settle(self) -> None:
        """After all were pushed: it is known; or the window has moved to where it must be, and all are to be pushed again."""
        if self.found is not None:
            return
        inside_N = np.concatenate(self.inside) if self.inside else np.empty(0)
        place = self.rank - self.above  # among those inside, counted from the largest
        if 1 <= place <= inside_N.size:
            self.found = float(np.partition(inside_N, inside_N.size - place)[inside_N.size - place])
            return
        self.low, self.high = (self.high, np.inf) if place < 1 else (0.0, self.low)
        self.above, self.inside = 0, []
