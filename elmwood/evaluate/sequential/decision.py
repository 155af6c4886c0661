"""Is B better than A? Draw blocks in random order until the answer is known: better, not better by the least effect, or undecided.

B blocks that the change can touch, T of them drawn so far, F features known of every block before drawing, C models whose columns
are known, N tokens. A difference is A's loss minus B's, bits per byte: above zero, B is better.

Two bettors (betting.py) are valid at every block: one bets that B is better, the other that B is not better by the least effect. Their
answer is about these blocks: the answer of a full run. Blocks that the change cannot touch differ by exactly zero, so they are counted
and never drawn.

A change that moves little weight changes the loss little. So a block is drawn with a probability proportional to the share of the
weight that moves in it, and its difference is divided by that share: the mean stays the same, its range and its variance shrink.

With features, half of each bettor's wealth bets on the differences minus a prediction from earlier draws (a control variate). That
leaves the mean unchanged, whatever the prediction, and removes the variance that it explains.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from elmwood.errors import BadInput
from elmwood.evaluate.sequential.betting import Draws, average, draws_to_reject, limit, wealth
from elmwood.records import Frozen

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]
Some = Floats | float
Outcome = Literal["better", "not better", "undecided"]

FIRST = 100  # draws before the first prediction; it is fitted again at each doubling
FAINT = 0.02  # share of the weight; blocks in which less moves are drawn as if this much did
ROUNDING = 1e-9  # of the distance from floor to ceiling
RIDGE = 0.02  # of the features' own variance
BATCH = 32  # blocks drawn before the first look
EVEN = np.log(1e-9)  # log weight; weights that sum to one up to rounding leave no rest
GROWTH = 8  # a later batch is one part in this many of the blocks drawn so far


class StoppingRule(Frozen):
    """When to stop: the two thresholds, and how often each answer may be wrong."""

    alpha: float = Field(0.05, gt=0, lt=1)  # probability of "better" although the mean is at most `better`
    beta: float = Field(0.1, gt=0, lt=1)  # probability of "not better" although the mean is at least `worthless`
    better: float = 0.0  # bits per byte
    worthless: float = 0.002  # the least effect worth having; another precision or machine changes about as much
    cap: int = Field(5000, gt=0)  # blocks; beyond it the answer is "undecided"


class Population(NamedTuple):
    """All blocks, before any is drawn."""

    low_B: Floats  # lower bounds of the differences, bits per byte
    high_B: Floats  # upper bounds
    total: int  # including blocks that the change cannot touch
    feature_BF: Floats | None = None
    proven_low: bool = False  # the bound is certain; otherwise differences are clipped there, and the test is of the clipped mean
    proven_high: bool = False
    scale_B: Floats | None = None  # probability of being drawn, over that of the mean block; None: all equal

    @property
    def share(self) -> float:
        """Share of all blocks that the change can touch."""
        return len(self.low_B) / self.total


class Finding(NamedTuple):
    """An answer, or none yet. Effects are means over the blocks that the change can touch; times `share`, over all blocks."""

    outcome: Outcome
    drawn: int  # blocks
    size: int  # that the change can touch
    total: int
    effect: float  # mean difference of the drawn blocks, bits per byte; exact when all are drawn
    low: float  # the interval holds at all times: below with error alpha, above with error beta
    high: float
    clipped: int  # drawn blocks beyond a bound that is not proven
    clip_effect: float  # mean of the drawn blocks minus their clipped mean
    estimand: str  # "mean", or "clipped mean" where the side that decides is bounded by a clip
    for_T: Floats  # log wealth of the bettor on "better"
    against_T: Floats  # log wealth of the bettor on "not better by the least effect"
    moved: float = 1.0  # share of the weight that differs in these blocks

    @property
    def share(self) -> float:
        return self.size / self.total


# ---- before drawing -------------------------------------------------------------------------------------------------


def population(
    floor_B: Floats, ceiling_B: Floats, total: int, *, clip: float | None = 0.5, moved_B: Floats | None = None,
    feature_BF: Floats | None = None,
) -> Population:  # fmt: skip
    """Certain bounds where they are tighter than the clip (bits per byte, chosen before looking at the data).

    `moved_B`: the share of the weight that moves in each block; the clip is for a block where all of it moves, and proportionally less
    for the others. Raises BadInput where nothing can be drawn or a difference has no bound.
    """
    if not len(floor_B):
        raise BadInput("the change touches no block of this holdout, so there is nothing to test: compare two models that differ on it")
    if clip is not None and not 0 < clip < np.inf:
        raise BadInput(f"the clip is {clip} bits per byte: choose a finite number above zero, such as 0.5")
    low_B, high_B = np.asarray(floor_B, np.float64), np.asarray(ceiling_B, np.float64)
    if clip is None and not (np.isfinite(low_B).all() and np.isfinite(high_B).all()):
        raise BadInput(
            "a difference has no certain bound where the changed model has not been scored: give a clip, such as 0.5 bits per byte"
        )
    if (low_B > high_B + ROUNDING).any():
        raise BadInput("a floor lies above its ceiling: the bounds are of other blocks, or of other models")
    share_B = np.ones(len(low_B)) if moved_B is None else np.maximum(moved_B, FAINT)
    high_B, at_B = np.maximum(low_B, high_B), np.full(len(low_B), np.inf) if clip is None else clip * share_B
    proven_low, proven_high = bool((low_B >= -at_B).all()), bool((high_B <= at_B).all())
    scale_B = None if moved_B is None else share_B / share_B.mean()
    return Population(np.clip(low_B, -at_B, at_B), np.clip(high_B, -at_B, at_B), total, feature_BF, proven_low, proven_high, scale_B)


def per_byte(nats_B: Floats, bytes_B: Ints) -> Floats:
    """Nats of blocks -> bits per mean byte [B]: their mean is all bits over all bytes, although block sizes differ a little."""
    return np.asarray(nats_B, np.float64) / (np.log(2) * np.mean(bytes_B, dtype=np.float64))


def find_touched(weight_a_NE: Floats, weight_b_NE: Floats, block_N: Ints, blocks: int) -> Bools:
    """Blocks with a token for which the two mixtures of the same E models have different weights [B]; elsewhere they agree exactly."""
    changed_N = (np.asarray(weight_a_NE) != weight_b_NE).any(1)
    return np.bincount(block_N, changed_N, blocks) > 0


def worst(loglik_NC: Floats, weight_NC: Floats) -> Floats:
    """Lower bound of a mixture's log-likelihood of each token when only some of its models are known [N], nats: log sum_c w_c p_c.

    The probabilities of the unknown models are at least zero. Minus infinity where no known model has weight. Entries without weight may
    be NaN.
    """
    weight_NC = np.asarray(weight_NC, np.float64)
    loglik_NC = np.where(weight_NC > 0, np.asarray(loglik_NC, np.float64), -np.inf)  # stored columns are in half precision
    peak_N = loglik_NC.max(1, initial=-np.inf)
    peak_N = np.where(np.isfinite(peak_N), peak_N, 0)
    with np.errstate(divide="ignore"):
        return peak_N + np.log((weight_NC * np.exp(loglik_NC - peak_N[:, None])).sum(1))


def best(loglik_NC: Floats, weight_NC: Floats) -> Floats:
    """Upper bound [N], nats: the probabilities of the unknown models are at most one."""
    with np.errstate(divide="ignore"):
        rest_N = np.log(np.maximum(1 - np.asarray(weight_NC, np.float64).sum(1), 0))
    return np.minimum(np.logaddexp(worst(loglik_NC, weight_NC), np.where(rest_N < EVEN, -np.inf, rest_N)), 0)


# ---- drawing --------------------------------------------------------------------------------------------------------


def decide(draw: Callable[[Ints], Floats], order_B: Ints, blocks: Population, rule: StoppingRule) -> Finding:
    """Draw until the answer is known or the cap is reached. `draw(places)` -> differences of those blocks, bits per byte.

    `order_B` is a random order of the blocks' places (error_budget.py). Drawing in batches only delays a look, so the error bounds hold.
    Raises BadInput where the order is of other blocks.
    """
    if sorted(order_B) != list(range(len(blocks.low_B))):
        raise BadInput(f"the order has {len(order_B)} places for {len(blocks.low_B)} blocks: list each block once")
    most = min(rule.cap, len(order_B))
    value_T = np.zeros(0)
    while len(value_T) < most:
        size = min(max(BATCH, len(value_T) // GROWTH), most - len(value_T))
        value_T = np.concatenate([value_T, draw(order_B[len(value_T) : len(value_T) + size])])
        if _Bets(value_T, order_B, blocks, rule).outcome != "undecided":
            break
    return look(value_T, order_B, blocks, rule)


def look(value_T: Floats, order_B: Ints, blocks: Population, rule: StoppingRule) -> Finding:
    """The answer after these draws. The first bettor to reach its threshold decides; when all blocks are drawn, the mean itself does."""
    value_T = np.asarray(value_T, np.float64)
    bets = _Bets(value_T, order_B, blocks, rule)
    whole, outcome = bets.whole, bets.outcome
    proven = {"better": blocks.proven_low, "not better": blocks.proven_high}.get(outcome, blocks.proven_low and blocks.proven_high)
    raw_T = value_T / bets.scale_T
    beyond_T = np.abs(bets.kept_T - raw_T) > ROUNDING * (bets.high - bets.low)
    exact = whole and not beyond_T.any()
    effect, kept = bets.mean(raw_T), bets.mean(bets.kept_T)
    return Finding(
        outcome=outcome,
        drawn=len(value_T),
        size=len(order_B),
        total=blocks.total,
        effect=effect,
        # all means up to rule.better are rejected together, and the search rounds down
        low=kept if whole else max(limit(bets.above, rule.alpha, bets.low, bets.high), rule.better if outcome == "better" else -np.inf),
        high=kept if whole else limit(bets.below, rule.beta, bets.high, bets.low),
        clipped=int(beyond_T.sum()),
        clip_effect=effect - kept,
        estimand="mean" if proven or exact else "clipped mean",
        for_T=bets.for_T,
        against_T=bets.against_T,
    )


class _Bets:
    """The bettors on some draws: on the differences over their probabilities and, with features, on those minus a prediction."""

    def __init__(self, value_T: Floats, order_B: Ints, blocks: Population, rule: StoppingRule):
        place_T = order_B[: len(value_T)]
        scale_B = np.ones(len(order_B)) if blocks.scale_B is None else blocks.scale_B
        self.scale_T = scale_B[place_T]
        self.kept_T = np.clip(value_T, blocks.low_B[place_T], blocks.high_B[place_T]) / self.scale_T
        self.size, self.whole = len(order_B), len(value_T) == len(order_B)
        low_B, high_B = blocks.low_B / scale_B, blocks.high_B / scale_B
        self.low, self.high = float(low_B.min()), float(high_B.max())
        self.shifts: list[tuple[Some, Some, Some]] = [(0.0, self.low, self.high)]
        if blocks.feature_BF is not None and len(value_T) > FIRST:
            self.shifts.append(predict(self.kept_T, place_T, np.asarray(blocks.feature_BF, np.float64), scale_B, (low_B, high_B)))
        self.for_T, self.against_T = self.above(np.array(rule.better)), self.below(np.array(rule.worthless))
        self.outcome = self._outcome(int(draws_to_reject(self.for_T, rule.alpha)), int(draws_to_reject(self.against_T, rule.beta)), rule)

    def mean(self, value_T: Floats) -> float:
        """The mean of all blocks, exact when all are drawn; otherwise undrawn blocks count as the mean of the drawn ones."""
        seen = float((self.scale_T * value_T).sum())
        return (seen + max(self.size - float(self.scale_T.sum()), 0.0) * float(value_T.mean()) * (not self.whole)) / self.size

    def _outcome(self, first: int, second: int, rule: StoppingRule) -> Outcome:
        """Draws until "better" and "not better" (0: not yet) -> the first of them; by the mean where both or all blocks are in."""
        if self.whole or first == second != 0:
            return "better" if self.mean(self.kept_T) >= rule.worthless else "not better"
        if first and (not second or first < second):
            return "better"
        return "not better" if second else "undecided"

    def above(self, mean: Floats) -> Floats:
        """log wealth against "at most this mean"."""
        return self._together([(self._draws(1, shift), low) for shift, low, _ in self.shifts], mean)

    def below(self, mean: Floats) -> Floats:
        """log wealth against "at least this mean"."""
        return self._together([(self._draws(-1, shift), -high) for shift, _, high in self.shifts], -mean)

    def _draws(self, sign: int, shift_T: Some) -> Draws:
        low, high = (self.low, self.high) if sign > 0 else (-self.high, -self.low)
        return Draws(sign * self.kept_T, self.size, low, high, sign * shift_T, self.scale_T)

    def _together(self, drawn: list[tuple[Draws, Some]], mean: Floats) -> Floats:
        return average(np.stack([wealth(one, mean, low_T) for one, low_T in drawn]))


def predict(
    kept_T: Floats, place_T: Ints, feature_BF: Floats, scale_B: Floats, bounds: tuple[Floats, Floats]
) -> tuple[Floats, Floats, Floats]:
    """For each draw, the shift by a prediction from the draws before it [T], and the resulting floor and ceiling [T], [T].

    Ridge regression, fitted at FIRST draws and again at each doubling; no shift before that. The shift is the mean prediction of the
    undrawn blocks, weighted by their probabilities, minus that of the drawn block: zero on average over the draw.
    """
    spread_F = feature_BF.std(0)
    feature_BF = (feature_BF - feature_BF.mean(0)) / np.where(spread_F > 0, spread_F, 1)
    size, length, (low_B, high_B) = len(feature_BF), len(kept_T), bounds
    shift_T, low_T, high_T = np.zeros(length), np.full(length, low_B.min()), np.full(length, high_B.max())
    start = FIRST
    while start < length:
        end = min(2 * start, length)
        guess_B = feature_BF @ _ridge(feature_BF[place_T[:start]], kept_T[:start])
        drawn_T, weight_T = guess_B[place_T[:end]], scale_B[place_T[:end]]
        gone_T, sum_T = np.cumsum(weight_T) - weight_T, np.cumsum(weight_T * drawn_T) - weight_T * drawn_T
        left_T = (float((scale_B * guess_B).sum()) - sum_T) / np.maximum(size - gone_T, 1e-12)
        shift_T[start:end] = (left_T - drawn_T)[start:]
        low_T[start:end] = (low_B - guess_B).min() + left_T[start:]
        high_T[start:end] = (high_B - guess_B).max() + left_T[start:]
        start = end
    return shift_T, low_T, high_T


def _ridge(feature_TF: Floats, value_T: Floats) -> Floats:
    centred_TF = feature_TF - feature_TF.mean(0)
    gram_FF = centred_TF.T @ centred_TF + RIDGE * len(value_T) * np.eye(feature_TF.shape[1])
    return np.linalg.solve(gram_FF, centred_TF.T @ (value_T - value_T.mean()))
