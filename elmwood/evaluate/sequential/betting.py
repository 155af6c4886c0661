"""Is a mean above m? Tests by betting, valid at every look (Waudby-Smith & Ramdas, arXiv:2010.09686, section 4: without replacement;
with unequal chances, arXiv:2305.06884).

T draws in random order out of `size` blocks, S independent runs (any leading axes), G candidate means.

A bettor who doubts that the mean of all blocks is at most m bets on each block before seeing it. If m is right, the wealth is a
supermartingale: the probability that it ever reaches 1/alpha is at most alpha (Ville's inequality), however often one looks. The only
assumptions are that the order of the blocks is random and that no block lies below its floor.

Blocks may have weights. Then each block is drawn with a probability proportional to its weight among the undrawn blocks, and the mean
is the weighted mean.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elmwood.errors import BadInput

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

STAKE = 0.75  # largest share of the wealth that a block at its floor can cost
PRIOR = 20.0  # blocks that the prior mean counts for
TINY = 1e-6  # of the distance from floor to ceiling; below it a bet would amplify rounding errors
GRID = 50  # candidate means in one round of the search for a limit
ROUNDS = 4  # each searches within one step of the previous grid


class Draws(NamedTuple):
    """The blocks drawn so far from a population, in order."""

    value_T: Floats  # differences, each at or above its floor
    size: int  # blocks in the population
    low: float  # a lower bound of every value of the population
    high: float  # an upper bound
    shift_T: Floats | float = 0.0  # added to each value by a control variate; its mean over the undrawn blocks is zero
    weight_T: Floats | float = 1.0  # of the drawn blocks; the weights of all blocks sum to `size`

    @property
    def values(self) -> Floats:
        return np.asarray(self.value_T, np.float64)


def wealth(drawn: Draws, mean: ArrayLike, low_T: Floats | float | None = None) -> Floats:
    """log wealth after each draw against "the mean of all blocks is at most `mean`" [..., T]; infinite once that is impossible.

    Bets are aGRAPA's: approximately growth-optimal, from earlier draws only. `mean` broadcasts against the leading axes. `low_T`: floors
    of the shifted values at each draw, where a control variate moves them. Raises BadInput when there are more draws than blocks.
    """
    value = drawn.values
    shifted = value + drawn.shift_T
    if shifted.shape[-1] > drawn.size:
        raise BadInput(f"{shifted.shape[-1]} draws from {drawn.size} blocks: draw each block once")
    low = np.asarray(drawn.low if low_T is None else low_T, np.float64)
    left = undrawn_mean(value, drawn.size, mean, drawn.weight_T)
    scale = max(drawn.high - drawn.low, 1e-12)
    room = np.maximum(left - low, TINY * scale)
    bet = np.clip(agrapa_bets(shifted, left, low), 0.0, STAKE / room)
    with np.errstate(divide="ignore"):
        growth = np.log1p(np.maximum(bet * (shifted - left), -1.0))
    weight_T = np.broadcast_to(drawn.weight_T, value.shape)
    undrawn = np.maximum(drawn.size - np.cumsum(weight_T, axis=-1), 0)
    rest = drawn.size * np.asarray(mean, np.float64)[..., None] - np.cumsum(weight_T * value, axis=-1)  # sum of the undrawn blocks
    refuted = np.maximum.accumulate(rest < undrawn * drawn.low - TINY * scale, axis=-1)
    return np.where(refuted, np.inf, np.cumsum(growth, axis=-1))


def undrawn_mean(value: Floats, size: int, mean: ArrayLike, weight_T: Floats | float = 1.0) -> Floats:
    """Mean of the blocks that are undrawn before each draw if the mean of all blocks is `mean` [..., T]."""
    weight_T = np.broadcast_to(weight_T, value.shape)
    before = np.cumsum(weight_T * value, axis=-1) - weight_T * value
    left_T = size - (np.cumsum(weight_T, axis=-1) - weight_T)
    return (size * np.asarray(mean, np.float64)[..., None] - before) / np.maximum(left_T, 1e-12)


def agrapa_bets(value: Floats, left: Floats, low: Floats) -> Floats:
    """aGRAPA's bet for each draw from those before it: (mean - m) / (variance + (mean - m)^2) [..., T].

    The prior is a mean of m and a standard deviation of one third of the distance to the floor; after a few draws the data dominate.
    """
    count = np.arange(value.shape[-1])
    first, second = np.cumsum(value, axis=-1) - value, np.cumsum(value * value, axis=-1) - value * value
    gain = (first - count * left) / (count + PRIOR)
    centre = first / np.maximum(count, 1)
    variance = (np.square((left - low) / 3) + np.maximum(second - count * centre * centre, 0)) / (count + 1)
    return gain / np.maximum(variance + gain * gain, 1e-300)


# ---- from wealth to answers -----------------------------------------------------------------------------------------


def average(log_wealth_VT: Floats) -> Floats:
    """log of the mean wealth of several bettors on the same draws [V, ..., T] -> [..., T]: also a valid bettor."""
    return np.logaddexp.reduce(log_wealth_VT, axis=0) - np.log(len(log_wealth_VT))


def draws_to_reject(log_wealth_T: Floats, alpha: float) -> Ints:
    """Number of draws until the wealth reached 1/alpha [...]; 0 where it did not."""
    hit_T = log_wealth_T >= -np.log(alpha)
    return np.where(hit_T.any(-1), hit_T.argmax(-1) + 1, 0)


def limit(bet: Callable[[Floats], Floats], alpha: float, low: float, high: float) -> float:
    """One end of a confidence interval: the last rejected mean, counting from `low`, before the first that is not rejected.

    `bet(mean_G)` gives log wealth against each mean [G, T]. For an upper limit, `low` is the larger end. A rejected mean stays rejected,
    so the interval holds at all times at once. The grids get finer and round towards `low`, so the interval is never too narrow.
    """
    for _ in range(ROUNDS):
        mean_G = np.linspace(low, high, GRID)
        kept_G = draws_to_reject(bet(mean_G), alpha) == 0
        first = int(kept_G.argmax()) if kept_G.any() else GRID - 1
        if first == 0:
            return low
        low, high = float(mean_G[first - 1]), float(mean_G[first])
    return low
