"""Sums that do not depend on order: addends become integers, in units of 2^-44 and are added as 64-bit integers.

Integers form a commutative group, so any order, any tree and any machine gives the same bits, and what was added can be
subtracted again exactly. An addend errs by at most 2^-45 (3e-14); sums may reach 2^18.

N values of one tensor, or a part of it
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput
from elmwood.weights import kernels

Ints = NDArray[np.int64]
Codes = NDArray[np.uint16]
Floats = NDArray[np.floating[Any]]

BLOCK = 1 << 16
BITS = 44  # after the point
LSB = 2.0**-BITS
ROOM = 1 << (62 - BITS)  # the magnitudes of all addends together stay below this
# adding 1.5 * 2^52 units rounds a float64 to an integer number of them, to nearest even, and leaves it in the low bits of the sum
MAGIC = 1.5 * 2.0**52 * LSB
NARROW = MAGIC / 6  # well below where the trick ends


def reach(part_N: Floats | Codes) -> float:
    """The largest magnitude of float32 or float64 values; NaN or infinity where there is one."""
    kind, mask = (np.uint32, 0x7FFFFFFF) if part_N.dtype == np.float32 else (np.int64, 0x7FFFFFFFFFFFFFFF)
    return float(np.array(kernels.largest(part_N.view(kind), mask), kind).view(part_N.dtype))


def add(total_N: Ints, part_N: Floats | Codes, weight: float = 1.0) -> float:
    """Add weight * part to a sum, of float32, float64 or, as their bits, bf16 values. The largest magnitude that was added.
    Raises BadInput where that is beyond what sums may reach, or not finite."""
    if part_N.dtype == np.uint16:
        reached = float(kernels.add_bf16(part_N, weight, MAGIC, NARROW, total_N))
        return reached if reached < NARROW else add(total_N, widen(part_N), weight)
    reached = reach(part_N) * abs(weight)
    if reached < NARROW:
        kernels.add(part_N, weight, MAGIC, total_N)
    else:
        total_N += _whole(part_N, weight, reached)
    return reached


def vote(total_FN: Ints, part_N: Floats, weight: float) -> float:
    """Add to four sums: what speaks for plus, what for minus, and the weights of either side (TIES, arXiv:2306.01708).
    The largest magnitude that was added. Raises BadInput as `add` does."""
    reached, unit = max(reach(part_N), abs(weight)), round(weight / LSB)
    if reached < NARROW:
        kernels.vote(part_N, unit, MAGIC, total_FN)
        return reached
    whole_N = _whole(part_N, 1.0, reached)
    total_FN[0] += np.maximum(whole_N, 0)
    total_FN[1] += np.minimum(whole_N, 0)
    total_FN[2] += (part_N > 0) * np.int64(unit)
    total_FN[3] += (part_N < 0) * np.int64(unit)
    return reached


def _whole(part_N: Floats | Codes, weight: float, reached: float) -> Ints:
    """weight * part in units of 2^-44, of any size that a sum may have. Raises BadInput."""
    bound(reached)
    return np.rint(part_N * np.float64(weight) * (1 / LSB)).astype(np.int64)


def widen(code_N: Floats | Codes) -> NDArray[np.float32]:
    """bf16 values, from their bits."""
    value_N = np.empty(code_N.shape, np.float32)
    kernels.widen(code_N, value_N)
    return value_N


def value(total_N: Ints) -> NDArray[np.float64]:
    """The sum as float64."""
    value_N = np.empty(total_N.shape)
    kernels.units(total_N, LSB, value_N)
    return value_N


def bound(largest: float) -> int:
    """An integer no smaller, so that bounds add and subtract exactly too. Raises BadInput."""
    if not largest < ROOM:
        raise BadInput(
            f"a value of magnitude {largest:g}, and sums take finite values up to {ROOM}: NaN, Inf or more means that training diverged"
        )
    return math.ceil(largest)


# ---- wide: for numbers of any size -----------------------------------------------------------------------------

HIGH, LOW = 20, 64  # bits after the point of the two parts of a wide value
WIDER = 1 << 22  # what wide sums may reach, as a multiple of what others may


def wide(part_N: Floats) -> tuple[Ints, Ints]:
    """A value as two: whole units of 2^-20, and what is left of them in units of 2^-64. Both add. Magnitudes below 2^40."""
    high_N = np.rint(part_N * 2.0**HIGH)
    low_N = np.rint((part_N - high_N * 2.0**-HIGH) * 2.0**LOW)
    return high_N.astype(np.int64), low_N.astype(np.int64)


def wide_value(high_N: Ints, low_N: Ints) -> NDArray[np.float64]:
    """The sum of wide values as float64."""
    return high_N.astype(np.float64) * 2.0**-HIGH + low_N.astype(np.float64) * 2.0**-LOW


def inner(x: Floats, y: Floats) -> float:
    """The inner product of two tensors, the same bits on every machine: products as integers, in a unit that each block of them
    decides, summed exactly; good to about 2^-45 of the largest product, times the square root of their count."""
    x_N, y_N = x.reshape(-1), y.reshape(-1)
    return math.fsum(block_inner(x_N[at : at + BLOCK], y_N[at : at + BLOCK]) for at in range(0, x_N.size, BLOCK))


def block_inner(x_N: Floats, y_N: Floats) -> float:
    """Of at most BLOCK values. Products that all are below 1e-280 count as nothing."""
    largest = reach(x_N) * reach(y_N) if x_N.size else 0.0
    if not 1e-280 < largest < np.inf:
        return 0.0
    exponent = 45 - int(np.frexp(largest)[1])  # 45 bits and 2^16 addends stay below 2^62
    whole_N = np.rint(np.ldexp(np.multiply(x_N, y_N, dtype=np.float64), exponent)).astype(np.int64)
    return math.ldexp(float(int(whole_N.sum())), -exponent)


def block_gram(point_EN: NDArray[np.float64]) -> NDArray[np.float64]:
    """`block_inner` of every two of some points [E, E], to the same bits."""
    reach_E = np.array([reach(point_N) for point_N in point_EN])
    with np.errstate(over="ignore", invalid="ignore"):
        largest_EE = np.outer(reach_E, reach_E)
    kept_EE = (largest_EE > 1e-280) & (largest_EE < np.inf)
    exponent_EE = 45 - np.frexp(np.where(kept_EE, largest_EE, 1.0))[1]
    total_EE = np.zeros(largest_EE.shape, np.int64)
    kernels.gram(point_EN, np.where(kept_EE, np.ldexp(1.0, exponent_EE), 0.0), 1.5 * 2.0**52, total_EE)
    lower_EE = np.ldexp(total_EE.astype(np.float64), -exponent_EE)
    return np.tril(lower_EE) + np.tril(lower_EE, -1).T


def check_room(together: int) -> None:
    """Raises BadInput where a sum of addends with these bounds could overflow."""
    if together >= ROOM:
        raise BadInput(
            f"the experts' largest values add up to {together}, sums are kept up to {ROOM}: use smaller weights, or fewer experts"
        )
