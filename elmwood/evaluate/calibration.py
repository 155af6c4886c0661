"""Settings of an ensemble, chosen on the tune half. No model runs: a candidate costs one pass over the columns.

N scored tokens, E experts, C = E + 1 candidates (the seed last)
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.route import Router, Routing, Signals, best_of, remember, router_of, weights
from elmwood.evaluate.losses import mix

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

COLDEST, WARMEST = 1e-3, 10.0  # temperatures searched; squared distances of unit vectors lie in [0, 4]
SHARPEST, FLATTEST = 0.3, 300.0  # of likelihoods of whole texts, which differ by many nats
MEMORIES = (0.03, 0.1, 0.3, 1.0)  # first values of two settings, tried with each other
DECAYS = (1.0, 0.99, 0.98, 0.96, 0.92, 0.85)
WIDTH = 3.0  # the search around a value goes from a third of it to three times as much
GRID = 9  # values tried before the search narrows down
SAMPLE = 40_000  # tokens the search looks at, evenly spread; what it finds is weighed on all
STEPS = 8  # golden sections: each leaves 0.62 of the interval
ANY, ANY_NATS = 0.1, 10.0  # a single candidate is the same at every temperature


class Calibration(NamedTuple):
    """An ensemble's settings, and its loss on the tokens they were chosen on."""

    routing: Routing
    nats: float  # per token


class TuneTokens:
    """Tokens to choose settings on: a loss for any settings with one router and one top-k.

    Where only the nearest experts and the seed can have weight, the others are left out from the start. Arrays are kept column by column,
    and twice: of all tokens, and of every `step`-th, on which settings are searched.
    """

    def __init__(self, loglik_NC: Floats, dist2_NE: Floats | None, document_N: Ints, router: Router, top_k: int):
        self.every = max(1, -(-len(loglik_NC) // SAMPLE))

        def remembered(decay: float) -> Floats:
            return remember(loglik_NC, decay, document_N)

        if dist2_NE is not None and router.monotone and top_k < dist2_NE.shape[1]:
            near_Nk = np.nonzero(best_of(-dist2_NE, top_k))[1].reshape(-1, top_k)
            some_NC = np.column_stack([near_Nk, np.full(len(near_Nk), dist2_NE.shape[1])])
            near2_NE: Floats | None = np.take_along_axis(dist2_NE, near_Nk, 1)
            given_NC = np.take_along_axis(loglik_NC, some_NC, 1)
            self.memory = cache(lambda decay: np.take_along_axis(remembered(decay), some_NC, 1))
        else:
            near2_NE, given_NC, self.memory = dist2_NE, loglik_NC, cache(remembered)
        self.columns = cache(lambda step: (_columns(given_NC, step), None if near2_NE is None else _columns(near2_NE, step)))
        self.memories = cache(lambda decay, step: _columns(self.memory(decay), step))

    def loss(self, routing: Routing, step: int | None = None) -> float:
        """Nats per token over every `step`-th token."""
        step = step or self.every
        loglik_NC, dist2_NE = self.columns(step)
        memory_NC = self.memories(routing.fading, step) if router_of(routing).memory else None
        return -float(mix(loglik_NC, weights(Signals(dist2_NE, memory_NC), routing)).mean())

    def search(self, routing: Routing, name: str, grid: Floats, log: bool = True) -> Routing:
        """The same settings with the best value of one of them."""

        def at(x: float) -> Routing:
            changed: dict[str, Any] = {name: float(np.exp(x)) if log else float(x)}
            return replace(routing, **changed)

        return at(minimise(lambda x: self.loss(at(x)), np.log(grid) if log else grid))

    def ties(self, routing: Routing) -> Floats:
        """Seed distances at which the seed is as good as the best expert, for an even choice of tokens; none where all is unknown."""
        dist2_NE = self.columns(self.every)[1]
        if dist2_NE is not None:
            level_N = np.asarray(dist2_NE.min(1), np.float64)
        else:
            memory_NC = self.memories(routing.fading, self.every)
            level_N = memory_NC[:, -1] - memory_NC[:, :-1].max(1)
        level_N = level_N[np.isfinite(level_N)]
        if not len(level_N):
            return level_N
        levels = np.unique(np.quantile(level_N, np.linspace(0.02, 0.98, GRID)))
        return levels if len(levels) > 2 else levels.mean() + np.linspace(-1, 1, GRID)  # an expert that is equally near to all text


def calibrate(loglik_NC: Floats, dist2_NE: Floats | None, document_N: Ints, top_k: int, router: str = "centroid") -> Calibration:
    """The settings of a router with the least loss on these tokens (those of the tune half), with the seed as a candidate or without.

    Coordinate search: temperature without the seed, the seed's distance at that temperature, temperature again. Where the memory
    fades, its weight and decay are then tried on a grid, and each setting is searched once more around what was found.
    """
    begin = Routing(router, top_k, ANY)
    row = router_of(begin)
    begin = begin if row.distances else replace(begin, temperature=ANY_NATS)
    tuning = TuneTokens(loglik_NC, dist2_NE if row.distances else None, document_N, row, top_k)
    coldest, warmest = (COLDEST, WARMEST) if row.distances else (SHARPEST, FLATTEST)
    grid = np.geomspace(coldest, warmest, GRID)

    def temper(routing: Routing) -> Routing:
        single = (top_k == 1 and row.memory != "fading") or (loglik_NC.shape[1] == 2 and routing.seed_distance is None)
        return routing if single else tuning.search(routing, "temperature", grid)

    bare = temper(begin)
    found = [bare]
    if len(levels := tuning.ties(bare)):
        found.append(temper(tuning.search(bare, "seed_distance", levels, log=False)))
    if row.memory == "fading":
        found = [_refine(tuning, one) for one in found]
    made = [Calibration(one, tuning.loss(one, 1)) for one in found]
    return min(made, key=lambda one: one.nats)


def _refine(tuning: TuneTokens, routing: Routing) -> Routing:
    """Memory and decay from their grid, then every setting around its value."""
    tried = [replace(routing, memory=memory, decay=decay) for memory in MEMORIES for decay in DECAYS]
    best = min(tried, key=tuning.loss)
    around = np.geomspace(1 / WIDTH, WIDTH, 5)
    best = tuning.search(best, "temperature", best.temperature * around)
    if best.seed_distance is not None:
        best = tuning.search(best, "seed_distance", best.seed_distance + np.linspace(-0.4, 0.4, 5), log=False)
    best = tuning.search(best, "memory", best.memory * around)
    return min((replace(best, decay=decay) for decay in DECAYS), key=tuning.loss)


def _columns(values_NX: Floats, step: int) -> Floats:
    """Every `step`-th row, column by column in memory: half the time of a loss, whose sums run over few candidates."""
    return np.asfortranarray(values_NX[::step], np.float64)


def minimise(function: Callable[[float], float], grid: Floats) -> float:
    """The best of an ascending grid, then golden sections between its neighbours. Never worse than the grid."""
    values = [function(float(x)) for x in grid]
    best = int(np.argmin(values))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    found = {float(grid[best]): values[best]}
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    found |= {x: function(x) for x in (left, right) if x not in found}
    for _ in range(STEPS):
        if found[left] <= found[right]:
            high, right = right, left
            left = high - ratio * (high - low)
        else:
            low, left = left, right
            right = low + ratio * (high - low)
        found |= {x: function(x) for x in (left, right) if x not in found}
    return min(found, key=lambda x: found[x])
