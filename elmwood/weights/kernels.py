"""Loops over values, compiled (numba): one pass where numpy would make several.

Without fast mathematics: the same bits as numpy's, on any machine.

N values of a block, float32 or float64; integers count units of 2^-44 (exact.py)
"""

import numpy as np

from elmwood.compiled import compiled

# ---- bytes <-> values


@compiled
def widen(code_N, value_N):
    """bf16 -> float32: the upper half of its bits."""
    for n in range(code_N.size):
        value_N[n] = np.uint32(np.uint32(code_N[n]) << np.uint32(16)).view(np.float32)


@compiled
def narrow(value_N, code_N):
    """float64 -> the nearest bf16, ties to even. By way of float32 rounded to odd, which rounds right the second time
    (Boldo and Melquiond, IEEE Transactions on Computers 57, 2008)."""
    for n in range(value_N.size):
        value = value_N[n]
        single = np.float32(value)
        back = np.float64(single)
        bits = np.uint32(np.float32(single).view(np.uint32) - np.uint32(abs(back) > abs(value)))  # towards zero
        bits = np.uint32(bits | np.uint32(back != value))  # odd, where anything was left over
        bits = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
        code_N[n] = np.uint16(bits >> np.uint32(16))


@compiled
def largest(bits_N, mask):
    """The largest magnitude, as bits; NaN is above infinity. `mask`: all bits but the sign."""
    found = np.int64(0)
    for n in range(bits_N.size):
        found = max(found, np.int64(bits_N[n]) & mask)
    return found


# ---- sums


@compiled
def add(part_N, weight, magic, total_N):
    """total += weight * part, in units. Adding `magic` rounds to an integer number of them and leaves it in the low bits."""
    zero = np.float64(magic).view(np.int64)
    for n in range(part_N.size):
        total_N[n] += np.float64(np.float64(part_N[n]) * weight + magic).view(np.int64) - zero


@compiled
def add_bf16(code_N, weight, magic, most, total_N):
    """The same of bf16 values, from their bits; nothing is added where weight * part reaches `most`. What it does reach."""
    top, zero = np.uint16(0), np.float64(magic).view(np.int64)
    for n in range(code_N.size):
        top = max(top, np.uint16(code_N[n] & np.uint16(0x7FFF)))
    reach = np.float64(np.uint32(np.uint32(top) << np.uint32(16)).view(np.float32)) * abs(weight)
    if reach < most:
        for n in range(code_N.size):
            part = np.float64(np.uint32(np.uint32(code_N[n]) << np.uint32(16)).view(np.float32))
            total_N[n] += np.float64(part * weight + magic).view(np.int64) - zero
    return reach


@compiled
def vote(part_N, unit, magic, total_FN):
    """A ballot: what speaks for plus, what for minus, and the weights of either side, `unit` for each value but 0."""
    zero = np.float64(magic).view(np.int64)
    for n in range(part_N.size):
        part = np.float64(part_N[n])
        whole = np.int64(np.float64(part + magic).view(np.int64) - zero)
        total_FN[0, n] += max(whole, np.int64(0))
        total_FN[1, n] += min(whole, np.int64(0))
        total_FN[2, n] += unit if part > 0 else np.int64(0)
        total_FN[3, n] += unit if part < 0 else np.int64(0)


@compiled
def gram(point_EN, scale_EE, magic, total_EE):
    """total[i, j] += point_i . point_j for j <= i, each product times scale[i, j] rounded to an integer by adding `magic`; a scale of 0
    leaves a pair out. A few thousand values of all points at a time, which stay in the cache."""
    zero, most = np.float64(magic).view(np.int64), point_EN.shape[1]
    for start in range(0, most, 4096):
        for i in range(point_EN.shape[0]):
            for j in range(i + 1):
                total, scale = np.int64(0), scale_EE[i, j]
                if scale != 0:
                    for n in range(start, min(start + 4096, most)):
                        total += np.float64(point_EN[i, n] * point_EN[j, n] * scale + magic).view(np.int64) - zero
                total_EE[i, j] += total


@compiled
def units(total_N, unit, value_N):
    """value = total * unit. Either half of an integer becomes a float64 exactly, their sum is rounded once."""
    for n in range(total_N.size):
        bits = np.int64(total_N[n]).view(np.uint64)
        high = np.uint64(np.uint64(bits >> np.uint64(32)) ^ np.uint64(0x4530000080000000)).view(np.float64)  # 2^84 + 2^63 + 2^32 * upper
        low = np.uint64(np.uint64(bits & np.uint64(0xFFFFFFFF)) | np.uint64(0x4330000000000000)).view(np.float64)  # 2^52 + lower
        value_N[n] = ((high - 19342822341709703277445120.0) + low) * unit  # 2^84 + 2^63 + 2^52


# ---- magnitudes


@compiled
def trim(delta_N, weight, low, high, part_N):
    """part = weight * delta where low <= |delta| < high, else 0; what is not finite stays so, to be refused."""
    for n in range(delta_N.size):
        magnitude = abs(delta_N[n])
        part_N[n] = delta_N[n] * weight if (magnitude >= low) & (magnitude < high) else delta_N[n] * 0.0


@compiled
def window(magnitude_N, low, high, inside_N):
    """How many magnitudes are `high` or more, and how many from `low` up to there: these stand in `inside` [N + 1]."""
    above = inside = 0
    for n in range(magnitude_N.size):
        inside_N[inside] = magnitude_N[n]
        above += magnitude_N[n] >= high
        inside += (magnitude_N[n] >= low) & (magnitude_N[n] < high)
    return above, inside


@compiled
def elect(plus_N, minus_N, plus_weight_N, minus_weight_N, seed_N, scale, normalise, theta_N):
    """seed + scale * the mass of the side with more of it (plus, where they are equal), or the mean of those on it."""
    for n in range(plus_N.size):
        wins = plus_N[n] + minus_N[n] >= 0
        mass = plus_N[n] if wins else minus_N[n]
        weight = plus_weight_N[n] if wins else minus_weight_N[n]
        divisor = weight if normalise & (weight != 0) else 1.0  # nobody: a mass of 0, whatever divides it
        theta_N[n] = mass / divisor * scale + seed_N[n]
