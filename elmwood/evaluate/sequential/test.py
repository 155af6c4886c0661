"""Is B better than A? Draw blocks in random order until the answer is known: better, not better by the least effect, or undecided.

B blocks that the change can touch, T of them drawn so far, F features known of every block before anything is drawn, C models
whose columns are known, N tokens. A difference is A's loss minus B's, bits per byte: above zero, B is better.

Two gamblers (betting.py) may be looked at after every block: one doubts that B is better, one that it is better by the least
effect. What they say is about these blocks: what the full run would have said. Blocks that the change cannot touch differ by
exactly zero, so they are counted and never drawn.

Where a change moves little weight it changes little. So blocks are drawn with chances in proportion to the share of the weight that
moves in them, and a difference counts over that share: the mean stays what it was, and both its range and its spread shrink.

With features, half of each gambler's money goes to one who bets on the differences less a prediction from earlier draws: that
leaves the mean as it is, whatever the prediction, and takes out the variance it explains.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from elmwood.errors import BadInput
from elmwood.evaluate.sequential.betting import Draws, average, limit, rejected, wealth
from elmwood.records import Frozen

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]
Some = Floats | float
Outcome = Literal["better", "not better", "undecided"]

FIRST = 100  # draws before anything is predicted, and again at each doubling
FAINT = 0.02  # share of the weight: blocks in which less moves are drawn as if so much did
ROUNDING = 1e-9  # of the distance from floor to ceiling
RIDGE = 0.02  # of the features' own variance
BATCH = 32  # blocks drawn before the first look
EVEN = np.log(1e-9)  # weights that add up to one but for rounding leave no rest
GROWTH = 8  # later batches are this part of what has been drawn


class Rule(Frozen):
    """What is asked, and how often it may be answered wrongly."""

    alpha: float = Field(0.05, gt=0, lt=1)  # "better" though the mean is at most `better`
    beta: float = Field(0.1, gt=0, lt=1)  # "not better" though the mean is at least `worthless`
    better: float = 0.0  # bits per byte
    worthless: float = 0.002  # the least effect worth having; about what another precision or machine may change
    cap: int = Field(5000, gt=0)  # blocks, then it stays undecided


class Population(NamedTuple):
    """All blocks there are, before any is drawn."""

    low_B: Floats  # no difference lies below, bits per byte
    high_B: Floats  # nor above
    total: int  # with those the change cannot touch
    feature_BF: Floats | None = None
    proven_low: bool = False  # by mathematics; otherwise differences are clipped there, and the clipped mean is what is judged
    proven_high: bool = False
    scale_B: Floats | None = None  # chance of being drawn, over that of the mean block; None: all alike

    @property
    def share(self) -> float:
        """How many of all blocks the change can touch."""
        return len(self.low_B) / self.total


class Finding(NamedTuple):
    """An answer, or none yet. Effects are means over the blocks that the change can touch; times `share`, over all."""

    outcome: Outcome
    drawn: int  # blocks
    size: int  # that the change can touch
    total: int
    effect: float  # mean difference of the drawn blocks, bits per byte; of all where all are drawn
    low: float  # the interval: below with error alpha, above with error beta, however often one looked
    high: float
    clipped: int  # drawn blocks beyond a bound that is not proven
    clip_effect: float  # mean of the drawn blocks, less their mean as clipped
    estimand: str  # "mean", or "clipped mean" where the side that decides is bounded by a clip
    for_T: Floats  # log wealth of the gambler who says "better"
    against_T: Floats  # log wealth of the one who says "not better by the least effect"
    moved: float = 1.0  # share of the weight that differs in these blocks

    @property
    def share(self) -> float:
        return self.size / self.total


# ---- before drawing -------------------------------------------------------------------------------------------------


def population(
    floor_B: Floats, ceiling_B: Floats, total: int, *, clip: float | None = 0.5, moved_B: Floats | None = None,
    feature_BF: Floats | None = None,
) -> Population:  # fmt: skip
    """Bounds from mathematics where they are tighter than the clip (bits per byte, chosen before looking). `moved_B`: the share of the
    weight that moves in each block; the clip is for a block where all of it does, and in proportion for the others. Raises BadInput."""
    if not len(floor_B):
        raise BadInput("the change touches no block: the two models are the same on this holdout, so there is nothing to test")
    if clip is not None and not clip > 0:
        raise BadInput(f"the clip is {clip}: differences are bounded by a clip above zero")
    low_B, high_B = np.asarray(floor_B, np.float64), np.asarray(ceiling_B, np.float64)
    if clip is None and not (np.isfinite(low_B).all() and np.isfinite(high_B).all()):
        raise BadInput("mathematics bounds no difference where nothing is known of the changed model: state a clip")
    if (low_B > high_B + ROUNDING).any():
        raise BadInput("a floor lies above its ceiling: the bounds are of other blocks, or of other models")
    share_B = np.ones(len(low_B)) if moved_B is None else np.maximum(moved_B, FAINT)
    high_B, at_B = np.maximum(low_B, high_B), np.full(len(low_B), np.inf) if clip is None else clip * share_B
    proven_low, proven_high = bool((low_B >= -at_B).all()), bool((high_B <= at_B).all())
    scale_B = None if moved_B is None else share_B / share_B.mean()
    return Population(np.clip(low_B, -at_B, at_B), np.clip(high_B, -at_B, at_B), total, feature_BF, proven_low, proven_high, scale_B)


def per_byte(nats_B: Floats, bytes_B: Ints) -> Floats:
    """Nats of blocks -> bits per mean byte [B]: their plain mean is all bits over all bytes, though sizes differ by some."""
    return np.asarray(nats_B, np.float64) / (np.log(2) * np.mean(bytes_B, dtype=np.float64))


def touched(weight_a_NE: Floats, weight_b_NE: Floats, block_N: Ints, blocks: int) -> Bools:
    """Blocks with a token that the two mix in different shares of the same E models [B]; in all others they agree exactly."""
    changed_N = (np.asarray(weight_a_NE) != weight_b_NE).any(1)
    return np.bincount(block_N, changed_N, blocks) > 0


def worst(loglik_NC: Floats, weight_NC: Floats) -> Floats:
    """Least log-likelihood a mixture can give each token, knowing only some of its models [N], nats: log sum_c w_c p_c, for no other
    model gives less than nothing. Minus infinity where none that is known has weight; what has no weight may be NaN."""
    weight_NC = np.asarray(weight_NC, np.float64)
    loglik_NC = np.where(weight_NC > 0, loglik_NC, -np.inf)
    peak_N = loglik_NC.max(1, initial=-np.inf)
    peak_N = np.where(np.isfinite(peak_N), peak_N, 0)
    with np.errstate(divide="ignore"):
        return peak_N + np.log((weight_NC * np.exp(loglik_NC - peak_N[:, None])).sum(1))


def best(loglik_NC: Floats, weight_NC: Floats) -> Floats:
    """The greatest it can be [N], nats: the others give at most one."""
    with np.errstate(divide="ignore"):
        rest_N = np.log(np.maximum(1 - np.asarray(weight_NC, np.float64).sum(1), 0))
    return np.minimum(np.logaddexp(worst(loglik_NC, weight_NC), np.where(rest_N < EVEN, -np.inf, rest_N)), 0)


# ---- drawing --------------------------------------------------------------------------------------------------------


def decide(draw: Callable[[Ints], Floats], order_B: Ints, blocks: Population, rule: Rule) -> Finding:
    """Draw until the answer is known, or the cap is reached. `draw(places)` -> differences of those blocks, bits per byte.

    `order_B` is a random order of the blocks' places (budget.py). A batch is only a look that comes later, so errors stay bounded.
    """
    if sorted(order_B) != list(range(len(blocks.low_B))):
        raise BadInput(f"the order has {len(order_B)} places for {len(blocks.low_B)} blocks: each block stands in it once")
    most = min(rule.cap, len(order_B))
    value_T = np.zeros(0)
    while len(value_T) < most:
        size = min(max(BATCH, len(value_T) // GROWTH), most - len(value_T))
        value_T = np.concatenate([value_T, draw(order_B[len(value_T) : len(value_T) + size])])
        if _Bets(value_T, order_B, blocks, rule).outcome != "undecided":
            break
    return look(value_T, order_B, blocks, rule)


def look(value_T: Floats, order_B: Ints, blocks: Population, rule: Rule) -> Finding:
    """What the first draws say. Whichever gambler was first decides; where all blocks are drawn there is no doubt, and size does."""
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
        # means up to rule.better were rejected together, and the search rounds down
        low=kept if whole else max(limit(bets.above, rule.alpha, bets.low, bets.high), rule.better if outcome == "better" else -np.inf),
        high=kept if whole else limit(bets.below, rule.beta, bets.high, bets.low),
        clipped=int(beyond_T.sum()),
        clip_effect=effect - kept,
        estimand="mean" if proven or exact else "clipped mean",
        for_T=bets.for_T,
        against_T=bets.against_T,
    )


class _Bets:
    """The gamblers on some draws, each difference over its chance: plain and, where there are features, with predicted ones too."""

    def __init__(self, value_T: Floats, order_B: Ints, blocks: Population, rule: Rule):
        place_T = order_B[: len(value_T)]
        scale_B = np.ones(len(order_B)) if blocks.scale_B is None else blocks.scale_B
        self.scale_T = scale_B[place_T]
        self.kept_T = np.clip(value_T, blocks.low_B[place_T], blocks.high_B[place_T]) / self.scale_T
        self.size, self.whole = len(order_B), len(value_T) == len(order_B)
        low_B, high_B = blocks.low_B / scale_B, blocks.high_B / scale_B
        self.low, self.high = float(low_B.min()), float(high_B.max())
        self.shifts: list[tuple[Some, Some, Some]] = [(0.0, self.low, self.high)]
        if blocks.feature_BF is not None and len(value_T) > FIRST:
            self.shifts.append(predicted(self.kept_T, place_T, np.asarray(blocks.feature_BF, np.float64), scale_B, (low_B, high_B)))
        self.for_T, self.against_T = self.above(np.array(rule.better)), self.below(np.array(rule.worthless))
        self.outcome = self._outcome(int(rejected(self.for_T, rule.alpha)), int(rejected(self.against_T, rule.beta)), rule)

    def mean(self, value_T: Floats) -> float:
        """An estimate of the mean of all blocks, which it is where all are drawn: those drawn, and the others as these on average."""
        seen = float((self.scale_T * value_T).sum())
        return (seen + max(self.size - float(self.scale_T.sum()), 0.0) * float(value_T.mean()) * (not self.whole)) / self.size

    def _outcome(self, first: int, second: int, rule: Rule) -> Outcome:
        """Draws that "better" and "not better" took (0: not yet) -> who was first; the effect's size where that is no answer."""
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


def predicted(
    kept_T: Floats, place_T: Ints, feature_BF: Floats, scale_B: Floats, bounds: tuple[Floats, Floats]
) -> tuple[Floats, Floats, Floats]:
    """For each draw, what a prediction from the draws before adds to it [T], and the floor and ceiling that leaves [T], [T].

    Ridge regression, fitted anew at FIRST draws and each doubling; before that nothing is predicted. What is added is the mean
    prediction of the blocks that were left, by their chances, less that of the block drawn: nothing, on average over the draw.
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
