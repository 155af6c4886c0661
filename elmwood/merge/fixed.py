"""Sums that do not depend on order: addends become whole numbers of 2^-44 and are added as 64-bit integers.

Integers form a commutative group, so any order, any tree and any machine gives the same bits, and what was added can be
subtracted again exactly. An addend errs by at most 2^-45 (3e-14); sums may reach 2^18.

N numbers of one tensor, or a part of it
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput

Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]

BLOCK = 1 << 16
BITS = 44  # after the point
LSB = 2.0**-BITS
ROOM = 1 << (62 - BITS)  # the magnitudes of all addends together stay below this
# adding 1.5 * 2^52 units rounds a float64 to a whole number of them, to nearest even, and leaves it in the low bits of the sum
MAGIC = np.float64(1.5 * 2.0**52 * LSB)  # no plain float: float32 addends would be added in float32
MAGIC_BITS = int(MAGIC.view(np.int64))
NARROW = float(MAGIC) / 6  # well below where the trick ends


def reach(part_N: Floats) -> float:
    """The largest magnitude; NaN or infinity where there is one."""
    return max(float(part_N.max()), -float(part_N.min())) if part_N.size else 0.0


class Sum:
    """A sum of N numbers under way, in `total_N` where it is given. What addends have too much is taken off once, at the end."""

    def __init__(self, numbers: int, total_N: Ints | None = None):
        self.total_N = np.zeros(numbers, np.int64) if total_N is None else total_N
        self.excess = 0

    def add(self, part_N: Floats, largest: float, scratch_N: Floats) -> None:
        """`largest` is reach(part) or more; `scratch` is float64 of the same size. Raises BadInput."""
        self.add_whole(*_whole(part_N, largest, scratch_N))

    def add_whole(self, whole_N: Ints, excess: int) -> None:
        """Whole numbers, each with `excess` too much."""
        np.add(self.total_N, whole_N, out=self.total_N)
        self.excess += excess

    def close(self) -> Ints:
        """The sum, in units of 2^-44."""
        if self.excess:
            excess = self.excess % (1 << 64)  # 64-bit integers wrap around: a group all the same
            self.total_N -= np.int64(excess - (1 << 64) if excess >> 63 else excess)
            self.excess = 0
        return self.total_N


def _whole(part_N: Floats, largest: float, scratch_N: Floats) -> tuple[Ints, int]:
    """Numbers in units of 2^-44, each with so much too much; they may stand in `scratch`. Raises BadInput."""
    if largest < NARROW:
        np.add(part_N, MAGIC, out=scratch_N)
        return scratch_N.view(np.int64), MAGIC_BITS
    bound(largest)
    np.multiply(part_N, np.float64(1 / LSB), out=scratch_N)
    np.rint(scratch_N, out=scratch_N)
    return scratch_N.astype(np.int64), 0


class Ballot:
    """Four sums of N numbers under way: what speaks for plus, what for minus, and the weights of either side (TIES, arXiv:2306.01708)."""

    def __init__(self, total_FN: Ints):
        """`total_FN`: zeros, one row for each sum."""
        self.total_FN = total_FN
        numbers = total_FN.shape[1]
        self.plus, self.both = Sum(numbers, total_FN[0]), Sum(numbers, total_FN[1])
        self.weight, self.count = 0.0, 0
        self.votes_2N = np.zeros((2, numbers), np.uint8)  # of those with the present weight

    def add(self, part_N: Floats, weight: float, largest: float, scratch_N: Floats) -> None:
        """One vote for each number but 0. `largest` and `scratch` as in Sum. Raises BadInput."""
        if weight != self.weight or self.count == 255:
            self._count()
            self.weight = weight
        self.count += 1
        self.votes_2N[0] += (part_N > 0).view(np.uint8)
        self.votes_2N[1] += (part_N < 0).view(np.uint8)
        whole_N, excess = _whole(part_N, largest, scratch_N)
        self.both.add_whole(whole_N, excess)
        np.maximum(whole_N, excess, out=whole_N)
        self.plus.add_whole(whole_N, excess)

    def _count(self) -> None:
        unit = round(self.weight / LSB)
        for total_N, votes_N in zip(self.total_FN[2:], self.votes_2N, strict=True):
            total_N += votes_N.astype(np.int64) * unit
        self.votes_2N[:] = 0
        self.count = 0

    def close(self) -> None:
        """Leave plus, minus and their weights in the rows, in units of 2^-44."""
        self._count()
        self.plus.close()
        np.subtract(self.both.close(), self.total_FN[0], out=self.total_FN[1])


def value(total_N: Ints) -> NDArray[np.float64]:
    """The sum as float64."""
    value_N = total_N.astype(np.float64)
    value_N *= LSB
    return value_N


def bound(largest: float) -> int:
    """A whole number no smaller, so that bounds add and subtract exactly too. Raises BadInput."""
    if not largest < ROOM:
        raise BadInput(f"a number of magnitude {largest:g}: sums are kept up to {ROOM}; NaN or infinity means a training gone astray")
    return math.ceil(largest)


# ---- wide: for numbers of any size -----------------------------------------------------------------------------

HIGH, LOW = 20, 64  # bits after the point of the two parts of a wide number
WIDER = 1 << 22  # what wide sums may reach, as a multiple of what others may


def wide(part_N: Floats) -> tuple[Ints, Ints]:
    """A number as two: whole units of 2^-20, and what is left of them in units of 2^-64. Both add. Magnitudes below 2^40."""
    high_N = np.rint(part_N * 2.0**HIGH)
    low_N = np.rint((part_N - high_N * 2.0**-HIGH) * 2.0**LOW)
    return high_N.astype(np.int64), low_N.astype(np.int64)


def wide_value(high_N: Ints, low_N: Ints) -> NDArray[np.float64]:
    """The sum of wide numbers as float64."""
    return high_N.astype(np.float64) * 2.0**-HIGH + low_N.astype(np.float64) * 2.0**-LOW


def inner(x: Floats, y: Floats) -> float:
    """The inner product of two tensors, the same bits on every machine: products as whole numbers of a unit that each block of them
    decides, summed exactly; good to about 2^-45 of the largest product, times the root of their number."""
    x_N, y_N = x.reshape(-1), y.reshape(-1)
    return math.fsum(block_inner(x_N[at : at + BLOCK], y_N[at : at + BLOCK]) for at in range(0, x_N.size, BLOCK))


def block_inner(x_N: Floats, y_N: Floats) -> float:
    """Of at most BLOCK numbers. Products that all are below 1e-280 count as nothing."""
    largest = reach(x_N) * reach(y_N) if x_N.size else 0.0
    if not 1e-280 < largest < np.inf:
        return 0.0
    exponent = 45 - int(np.frexp(largest)[1])  # 45 bits and 2^16 addends stay below 2^62
    whole_N = np.rint(np.ldexp(np.multiply(x_N, y_N, dtype=np.float64), exponent)).astype(np.int64)
    return math.ldexp(float(int(whole_N.sum())), -exponent)


def check_room(together: int) -> None:
    """Raises BadInput where a sum of addends with these bounds could overflow."""
    if together >= ROOM:
        raise BadInput(
            f"the experts' largest numbers add up to {together}, sums are kept up to {ROOM}: use smaller weights, or fewer experts"
        )
