"""Settings of an ensemble, chosen on the tune half. No model runs: a candidate costs one pass over the columns.

N scored tokens, K experts, E = K + 1 candidates (the seed last), S columns of a router's signal: squared distances to the K
experts, or what each of the E candidates, the seed included, said of the text so far (route.posterior_scores, nats)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.route import ROUTERS, candidates, gate
from elmwood.evaluate.losses import mix
from elmwood.registry import lookup

Floats = NDArray[np.floating]

COLDEST, WARMEST = 1e-3, 10.0  # temperatures searched; squared distances of unit vectors lie in [0, 4]
SHARPEST, FLATTEST = 0.3, 300.0  # of likelihoods of whole texts, which differ by many nats
GRID = 9  # values tried before the search narrows down
SAMPLE = 40_000  # tokens the search looks at, evenly spread; what it finds is weighed on all
STEPS = 8  # golden sections: each leaves 0.62 of the interval
ANY = 0.1  # top-1 is the same at every temperature


class Fit(NamedTuple):
    """An ensemble's settings, and its loss on the tokens they were chosen on."""

    router: str
    top_k: int
    temperature: float
    seed_distance: float | None  # None: without the seed as a candidate it was better
    nats: float  # per token


def weights(signal_NS: Floats, router: str, top_k: int, temperature: float, seed_distance: float | None) -> Floats:
    """Weight of each expert, and of the seed in the last column (zero where it is no candidate) [N, E]."""
    row = lookup(ROUTERS, router, "router")
    if row.signal != "loglik":
        score_NE = row(candidates(signal_NS, seed_distance))
    elif seed_distance is None:
        score_NE = row(signal_NS[:, :-1])
    else:  # the seed begins behind by its distance, in nats
        score_NE = row(np.column_stack([signal_NS[:, :-1], signal_NS[:, -1] - seed_distance]))
    weight_NE = gate(score_NE, temperature, top_k)
    return weight_NE if seed_distance is not None else np.pad(weight_NE, ((0, 0), (0, 1)))


def fit(loglik_NE: Floats, signal_NS: Floats, top_k: int, router: str = "centroid") -> Fit:
    """The temperature and the seed's distance with the least loss on these tokens (those of the tune half).

    Coordinate search: temperature without the seed, then the seed's distance at that temperature, then temperature again.
    """
    every = -(-len(loglik_NE) // SAMPLE)
    by_loglik = lookup(ROUTERS, router, "router").signal == "loglik"
    coldest, warmest = (SHARPEST, FLATTEST) if by_loglik else (COLDEST, WARMEST)

    def loss(temperature: float, seed_distance: float | None, step: int = every) -> float:
        return -float(mix(loglik_NE[::step], weights(signal_NS[::step], router, top_k, temperature, seed_distance)).mean())

    def temper(seed_distance: float | None) -> float:
        if top_k == 1:
            return ANY
        grid = np.linspace(np.log(coldest), np.log(warmest), GRID)
        return float(np.exp(minimise(lambda log: loss(float(np.exp(log)), seed_distance), grid)))

    bare = temper(None)
    tie_N = signal_NS[:, -1] - signal_NS[:, :-1].max(1) if by_loglik else signal_NS.min(1)  # where the seed is as good as the best
    levels = np.quantile(tie_N, np.linspace(0.02, 0.98, GRID))
    level = minimise(lambda distance: loss(bare, distance), np.unique(levels))
    settings = ((bare, None), (temper(level), level))
    fits = [Fit(router, top_k, temperature, distance, loss(temperature, distance, 1)) for temperature, distance in settings]
    return min(fits, key=lambda one: one.nats)


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
