"""The k-th largest magnitude of a tensor that is read in pieces: a sample says about where, one reading settles it exactly.

N values of a part of a tensor; U different magnitudes in the window
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmwood.weights import kernels

Floats = NDArray[np.floating[Any]]
SPREAD = 6  # standard errors of a sample's quantile that the window reaches to either side
WAITING = 1 << 18  # magnitudes in the window that wait to be counted


class Kth:
    """Finds the `rank`-th largest of `numbers` magnitudes. Rank 0: infinity; a rank of all or more: 0.

    Differences of bf16 values take few values, each of them often: those in the window are kept as values and counts."""

    def __init__(self, numbers: int, rank: int, sample_N: Floats | None, waiting: int = WAITING):
        self.numbers, self.rank, self.room = numbers, rank, waiting
        self.low, self.high = self._window(sample_N)
        self.above = 0  # magnitudes at or over the window
        self.value_U, self.count_U = np.empty(0), np.empty(0, np.int64)  # ascending
        self.waiting, self.waiting_N = 0, np.empty(0)
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
        if self.waiting + magnitude_N.size >= self.waiting_N.size:
            self._count()
            self.waiting_N = np.empty(max(self.waiting_N.size, min(self.numbers, self.room) + magnitude_N.size + 1))
        above, inside = kernels.window(magnitude_N, self.low, self.high, self.waiting_N[self.waiting :])
        self.above, self.waiting = self.above + above, self.waiting + inside

    def _count(self) -> None:
        """What waits goes to the values and counts."""
        value_N, count_N = np.unique(self.waiting_N[: self.waiting], return_counts=True)
        merged_N = np.concatenate([self.value_U, value_N])
        order_N = np.argsort(merged_N, kind="stable")
        first_N = np.diff(merged_N[order_N], prepend=np.nan) != 0
        self.value_U = merged_N[order_N[first_N]]
        self.count_U = (
            np.add.reduceat(np.concatenate([self.count_U, count_N])[order_N], np.flatnonzero(first_N)) if len(merged_N) else count_N
        )
        self.waiting = 0

    def settle(self) -> None:
        """After all were pushed: it is known; or the window has moved to where it must be, and all are to be pushed again."""
        if self.found is not None:
            return
        self._count()
        place = self.rank - self.above  # among those inside, counted from the largest
        if 1 <= place <= self.count_U.sum():
            self.found = float(self.value_U[::-1][np.searchsorted(np.cumsum(self.count_U[::-1]), place)])
            return
        self.low, self.high = (self.high, np.inf) if place < 1 else (0.0, self.low)
        self.above, self.value_U, self.count_U = 0, np.empty(0), np.empty(0, np.int64)
