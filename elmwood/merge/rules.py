"""The table of merge rules. Each is finish(sum over experts of part(expert)): one number or a few per parameter, that add.

N numbers of one tensor (or a block of it), F fields of a state. `delta` is expert minus seed (the task vector).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput, UnknownName

Floats = NDArray[np.floating[Any]]
Settings = Mapping[str, float]


class Local(NamedTuple):
    """What a rule knows of one expert's tensor beside a block of it."""

    low: float = 0.0  # magnitudes below are trimmed
    high: float = np.inf  # and those from here on
    chance: Callable[[], Floats] = lambda: np.empty(0)  # uniform numbers [N], the same for an expert wherever it is read


class Total(NamedTuple):
    """What is known of a sum beside its numbers."""

    weight: float  # of all experts together
    whole: float  # of those that were added as themselves, not as deltas


class Rule(NamedTuple):
    """A row: where it comes from, what it adds, how it ends, its settings with their defaults."""

    paper: str
    fields: tuple[str, ...]
    part: Callable[[Floats, float, Local, Settings], tuple[Floats, ...]]  # (delta_N, weight, ...) -> one array for each field
    finish: Callable[[tuple[Floats, ...], Floats, Total, Settings], Floats]  # (sum_N for each field, seed_N, ...) -> theta_N
    begins: Mapping[str, float]  # settings that decide the state
    ends: Mapping[str, float]  # settings that finishing takes: they can be changed without reading experts again
    linear: bool = False  # the part is weight * delta, so that full experts can be added without subtracting the seed
    ranks: Callable[[Settings], tuple[float, float]] | None = None  # shares of magnitudes: kept, and cut off at the top


# ---- parts: from one expert -------------------------------------------------------------------------------------


def scaled(delta_N: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Weight times delta."""
    return (delta_N * weight,)


def dropped(delta_N: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Each number kept with probability `density`, and made larger by as much (DARE, arXiv:2311.03099)."""
    return (np.where(local.chance() < settings["density"], delta_N * (weight / settings["density"]), 0.0),)


def cut(delta_N: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Without the smallest and the largest magnitudes (breadcrumbs, arXiv:2312.06795)."""
    return (np.where(_kept(delta_N, local), delta_N * weight, 0.0),)


def voted(trimmed_N: Floats, weight: float) -> tuple[Floats, ...]:
    """A ballot: what speaks for plus, what for minus, and with what weight."""
    plus_N, minus_N = np.maximum(trimmed_N, 0), np.minimum(trimmed_N, 0)
    return plus_N, minus_N, (trimmed_N > 0) * weight, (trimmed_N < 0) * weight


def trimmed(delta_N: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """The ballot of what is left of delta after trimming (TIES, arXiv:2306.01708)."""
    return voted(cut(delta_N, weight, local, settings)[0], weight)


def drawn(delta_N: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """The ballot of what chance leaves of delta (DARE with TIES, arXiv:2311.03099)."""
    return voted(dropped(delta_N, weight, local, settings)[0], weight)


def _kept(delta_N: Floats, local: Local) -> NDArray[np.bool_]:
    magnitude_N = np.abs(delta_N).astype(np.float32)
    kept_N = magnitude_N >= local.low
    return kept_N if local.high == np.inf else kept_N & (magnitude_N < local.high)


# ---- ends: from the sums of all ---------------------------------------------------------------------------------


def shifted(sums: tuple[Floats, ...], seed_N: Floats, total: Total, settings: Settings) -> Floats:
    """seed + scale * sum / divisor: the weights together where `normalise` is on, else 1. Divided last, so that it is rounded once."""
    divisor = total.weight if settings["normalise"] else 1.0
    own = divisor - settings["scale"] * total.whole  # of the seed: what was added as a whole holds it already
    theta_N = sums[0] * settings["scale"]
    if own:
        theta_N += seed_N * own
    theta_N /= divisor
    return theta_N


def elected(sums: tuple[Floats, ...], seed_N: Floats, total: Total, settings: Settings) -> Floats:
    """The side with more mass wins (plus, where they are equal); the mean of those on it (TIES, arXiv:2306.01708)."""
    plus_N, minus_N, plus_weight_N, minus_weight_N = sums
    wins_N = plus_N + minus_N >= 0
    mass_N = np.where(wins_N, plus_N, minus_N)
    if settings["normalise"]:
        weight_N = np.where(wins_N, plus_weight_N, minus_weight_N)
        np.divide(mass_N, weight_N, out=mass_N, where=weight_N != 0)
    mass_N *= settings["scale"]
    mass_N += seed_N
    return mass_N


# ---- the table --------------------------------------------------------------------------------------------------

SUM = ("sum",)
BALLOT = ("plus", "minus", "plus_weight", "minus_weight")
CUT = {"density": 0.9, "gamma": 0.01, "across": 0.0}  # across 1: shares of the whole model instead of each tensor
ADD, VOTE = {"scale": 1.0, "normalise": 0.0}, {"scale": 1.0, "normalise": 1.0}


def _densest(settings: Settings) -> tuple[float, float]:
    return settings["density"], 0.0


def _crumbs(settings: Settings) -> tuple[float, float]:
    top = min(settings["gamma"], 1 - settings["density"])
    return settings["density"] + top, top


RULES: dict[str, Rule] = {
    "average": Rule("arXiv:2203.05482", SUM, scaled, shifted, {}, VOTE, linear=True),
    "task_arithmetic": Rule("arXiv:2212.04089", SUM, scaled, shifted, {}, ADD, linear=True),
    "ties": Rule("arXiv:2306.01708", BALLOT, trimmed, elected, {"density": 0.2, "across": 0.0}, VOTE, ranks=_densest),
    "dare": Rule("arXiv:2311.03099", SUM, dropped, shifted, {"density": 0.5, "rng_seed": 0.0}, ADD),
    "dare_ties": Rule("arXiv:2311.03099", BALLOT, drawn, elected, {"density": 0.5, "rng_seed": 0.0}, VOTE),
    "breadcrumbs": Rule("arXiv:2312.06795", SUM, cut, shifted, CUT, ADD, ranks=_crumbs),
    "breadcrumbs_ties": Rule("arXiv:2312.06795", BALLOT, trimmed, elected, CUT, VOTE, ranks=_crumbs),
}


def settle(name: str, given: Settings) -> tuple[Rule, dict[str, float], dict[str, float]]:
    """A rule by name, with its settings of beginning and end. Raises UnknownName, BadInput."""
    if name not in RULES:
        raise UnknownName(f"no merge rule {name!r}; have {', '.join(sorted(RULES))}")
    rule = RULES[name]
    if unknown := set(given) - set(rule.begins) - set(rule.ends):
        raise BadInput(f"{name} has no setting {sorted(unknown)[0]!r}; it has {', '.join([*rule.begins, *rule.ends])}")
    if not 0 < given.get("density", 1.0) <= 1:
        raise BadInput(f"density {given['density']}: the share of numbers kept is above 0 and at most 1")
    begins = {key: float(given.get(key, value)) for key, value in rule.begins.items()}
    return rule, begins, {key: float(given.get(key, value)) for key, value in rule.ends.items()}
