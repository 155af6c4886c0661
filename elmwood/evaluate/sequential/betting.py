"""Is a mean above m? Tests by betting, valid at every look (Waudby-Smith & Ramdas, arXiv:2010.09686, section 4: without replacement;
with unequal chances, arXiv:2305.06884).

T draws in random order out of `size` blocks, S independent runs (any leading axes), G candidate means.

A gambler who doubts that the mean of all blocks is at most m bets on each next block before seeing it. If m is right the wealth
has no trend, so it ever grows to 1/alpha with probability at most alpha (Ville), whenever and however often one looks. Nothing
is assumed of the blocks but that their order is random and that none lies below its floor.

Blocks may have weights: then each next block is drawn with a chance in proportion to its weight among those that are left, and the
mean is the weighted one.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elmwood.errors import BadInput

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

STAKE = 0.75  # of the wealth, at most, is lost on a block at its floor
PRIOR = 20.0  # blocks that the first guess of the mean is worth
TINY = 1e-6  # of the distance from floor to ceiling: below it a bet would magnify rounding
GRID = 50  # candidate means in one round of the search for a limit
ROUNDS = 4  # each narrows the search to one step of the one before


class Draws(NamedTuple):
    """What has been seen of a population, in the order of drawing."""

    value_T: Floats  # differences, each at or above its floor
    size: int  # blocks in the population
    low: float  # no value of the population is below
    high: float  # none is above
    shift_T: Floats | float = 0.0  # what a control variate adds to each value; of mean zero over the blocks that were left
    weight_T: Floats | float = 1.0  # of the blocks drawn; all blocks together weigh `size`

    @property
    def values(self) -> Floats:
        return np.asarray(self.value_T, np.float64)


def wealth(drawn: Draws, mean: ArrayLike, low_T: Floats | float | None = None) -> Floats:
    """log wealth after each draw against "the mean of all blocks is at most `mean`" [..., T]; infinite once that is impossible.

    Bets are aGRAPA's: the plug-in of growth-optimal ones, from earlier draws alone. `mean` broadcasts against the leading axes.
    `low_T`: floors of the shifted values at each draw, where a control variate moves them.
    """
    value = drawn.values
    shifted = value + drawn.shift_T
    if shifted.shape[-1] > drawn.size:
        raise BadInput(f"{shifted.shape[-1]} draws from {drawn.size} blocks: each is drawn once")
    low = np.asarray(drawn.low if low_T is None else low_T, np.float64)
    left = conditional(value, drawn.size, mean, drawn.weight_T)
    scale = max(drawn.high - drawn.low, 1e-12)
    room = np.maximum(left - low, TINY * scale)
    bet = np.clip(guess(shifted, left, low), 0.0, STAKE / room)
    with np.errstate(divide="ignore"):
        growth = np.log1p(np.maximum(bet * (shifted - left), -1.0))
    weight_T = np.broadcast_to(drawn.weight_T, value.shape)
    undrawn = np.maximum(drawn.size - np.cumsum(weight_T, axis=-1), 0)
    rest = drawn.size * np.asarray(mean, np.float64)[..., None] - np.cumsum(weight_T * value, axis=-1)  # what the others add up to
    refuted = np.maximum.accumulate(rest < undrawn * drawn.low - TINY * scale, axis=-1)
    return np.where(refuted, np.inf, np.cumsum(growth, axis=-1))


def conditional(value: Floats, size: int, mean: ArrayLike, weight_T: Floats | float = 1.0) -> Floats:
    """Mean of the blocks still undrawn before each draw, were `mean` the mean of all [..., T]."""
    weight_T = np.broadcast_to(weight_T, value.shape)
    before = np.cumsum(weight_T * value, axis=-1) - weight_T * value
    left_T = size - (np.cumsum(weight_T, axis=-1) - weight_T)
    return (size * np.asarray(mean, np.float64)[..., None] - before) / np.maximum(left_T, 1e-12)


def guess(value: Floats, left: Floats, low: Floats) -> Floats:
    """aGRAPA's bet for each draw from those before it: (mean - m) / (variance + (mean - m)^2) [..., T].

    The first guess is that nothing is to be gained, and that values spread by a third of the way down to the floor; the draws
    replace the latter within a few blocks.
    """
    count = np.arange(value.shape[-1])
    first, second = np.cumsum(value, axis=-1) - value, np.cumsum(value * value, axis=-1) - value * value
    gain = (first - count * left) / (count + PRIOR)
    centre = first / np.maximum(count, 1)
    variance = (np.square((left - low) / 3) + np.maximum(second - count * centre * centre, 0)) / (count + 1)
    return gain / np.maximum(variance + gain * gain, 1e-300)


# ---- what the wealth says -------------------------------------------------------------------------------------------


def average(log_wealth_VT: Floats) -> Floats:
    """log of the mean wealth of several gamblers on the same draws [V, ..., T] -> [..., T]: a gambler too."""
    return np.logaddexp.reduce(log_wealth_VT, axis=0) - np.log(len(log_wealth_VT))


def rejected(log_wealth_T: Floats, alpha: float) -> Ints:
    """How many draws it took to reach 1/alpha [...]; 0 where it never did."""
    hit_T = log_wealth_T >= -np.log(alpha)
    return np.where(hit_T.any(-1), hit_T.argmax(-1) + 1, 0)


def limit(bet: Callable[[Floats], Floats], alpha: float, low: float, high: float) -> float:
    """The end of a confidence interval: the means from `low` on, up to the last that is rejected before one that stands.

    `bet(mean_G)` gives log wealth against each mean [G, T]; `low` may be the greater end, for an upper limit. All that was ever
    rejected stays so, so the interval holds at all times at once. Ever finer grids, rounded towards `low`: never too narrow by that.
    """
    for _ in range(ROUNDS):
        mean_G = np.linspace(low, high, GRID)
        stands_G = rejected(bet(mean_G), alpha) == 0
        first = int(stands_G.argmax()) if stands_G.any() else GRID - 1
        if first == 0:
            return low
        low, high = float(mean_G[first - 1]), float(mean_G[first])
    return low
