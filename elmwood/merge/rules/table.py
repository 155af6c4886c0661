"""The table of merge rules. Each is finish(sum over experts of part(expert)), or a set of experts looked at together."""

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import numpy as np

from elmwood.errors import BadInput, UnknownName
from elmwood.merge.rules.base import Floats, Local, Rule, Settings, Shape, check_settings
from elmwood.merge.rules.elementwise import (
    add_curvature,
    add_direction,
    divide_by_curvature,
    drop,
    drop_by_rank,
    elect_sign,
    erase_minority,
    scale,
    shift_seed,
    shrink_to_seed,
    span,
    trim,
    vote_by_energy,
    vote_by_rank,
    weigh_by_fisher,
)
from elmwood.merge.rules.matrices import (
    flatten_spectrum,
    join_singular_vectors,
    normal_shapes,
    regress,
    select_and_vote,
    solve,
    weigh_by_delta,
)
from elmwood.merge.rules.spherical import average_directions, find_karcher_mean, follow_arc
from elmwood.registry import lookup

SUM = ("sum",)
BALLOT = ("plus", "minus", "plus_weight", "minus_weight")
CUT = {"density": 0.9, "gamma": 0.01, "across": 0.0}  # across 1: shares of the whole model instead of each tensor
ADD, VOTE = {"scale": 1.0, "normalise": 0.0}, {"scale": 1.0, "normalise": 1.0}
SCALE, RIDGE, NORMAL = {"scale": 1.0}, {"scale": 1.0, "ridge": 1e-6}, ("gram", "gram_delta")
DRAWN = {"density": 0.5, "epsilon": 0.15, "rng_seed": 0.0}
KARCHER = {"deltas": 0.0, "iterations": 10.0, "tolerance": 1e-5}
MATRIX: dict[str, Any] = {"entire": True, "matrices": True, "shapes": normal_shapes}
APART = re.compile(r"embed|wte|wpe|lm_head")  # matrices that multiply no activations, or have words for rows


def _densest(settings: Settings) -> tuple[float, float]:
    return settings["density"], 0.0


def _crumbs(settings: Settings) -> tuple[float, float]:
    top = min(settings["gamma"], 1 - settings["density"])
    return settings["density"] + top, top


Rules = dict[str, Rule]

RULES: Rules = {
    "average": Rule("arXiv:2203.05482", SUM, scale, shift_seed, {}, VOTE, linear=True, signed=True),
    "task_arithmetic": Rule("arXiv:2212.04089", SUM, scale, shift_seed, {}, ADD, linear=True, signed=True),
    "ties": Rule("arXiv:2306.01708", BALLOT, trim, elect_sign, {"density": 0.2, "across": 0.0}, VOTE, ballot=True, ranks=_densest),
    "dare": Rule("arXiv:2311.03099", SUM, drop, shift_seed, {"density": 0.5, "rng_seed": 0.0}, ADD, signed=True),
    "dare_ties": Rule("arXiv:2311.03099", BALLOT, drop, elect_sign, {"density": 0.5, "rng_seed": 0.0}, VOTE, ballot=True),
    "breadcrumbs": Rule("arXiv:2312.06795", SUM, trim, shift_seed, CUT, ADD, ranks=_crumbs, signed=True),
    "breadcrumbs_ties": Rule("arXiv:2312.06795", BALLOT, trim, elect_sign, CUT, VOTE, ballot=True, ranks=_crumbs),
    "della": Rule("arXiv:2406.11617", SUM, drop_by_rank, shift_seed, DRAWN, ADD, entire=True, signed=True),
    "della_ties": Rule("arXiv:2406.11617", BALLOT, vote_by_rank, elect_sign, DRAWN, VOTE, entire=True),
    "sce": Rule("arXiv:2408.07990", ("sum", *BALLOT), vote_by_energy, erase_minority, {}, SCALE, entire=True),
    "sce_select": Rule("arXiv:2408.07990", (), scale, shift_seed, {"density": 0.1}, ADD, entire=True, together=select_and_vote),
    "model_stock": Rule("arXiv:2403.19522", ("sum", "direction"), add_direction, shrink_to_seed, {}, {}, entire=True),
    # on the sphere
    "slerp": Rule("Shoemake 1985", SUM, scale, span, {"deltas": 0.0, "straight": 0.9995}, {}, linear=True, share=follow_arc),
    "nuslerp": Rule("Shoemake 1985", SUM, scale, span, {"deltas": 1.0, "straight": 1.0}, {}, linear=True, share=follow_arc),
    "multislerp": Rule("mergekit", SUM, scale, span, {"deltas": 1.0}, {}, linear=True, share=average_directions),
    "karcher": Rule("Karcher 1977", SUM, scale, span, KARCHER, {}, linear=True, share=find_karcher_mean),
    # with statistics that the experts left
    "fisher": Rule(
        "arXiv:2111.09832", ("fisher", "sum"), weigh_by_fisher, divide_by_curvature, {"floor": 1e-6}, SCALE, entire=True, needs="fisher"
    ),
    "uncertainty": Rule(
        "arXiv:2310.12808", ("fisher", "sum"), add_curvature, divide_by_curvature, {"prior": 1.0}, SCALE, entire=True, needs="fisher"
    ),
    "regmean": Rule("arXiv:2212.09849", NORMAL, regress, solve, {"alpha": 0.9}, RIDGE, needs="gram", **MATRIX),
    # of whole matrices
    "wudi": Rule("arXiv:2503.08099", NORMAL, weigh_by_delta, solve, {}, RIDGE, **MATRIX),
    "iso_c": Rule("arXiv:2502.04959", SUM, scale, flatten_spectrum, {}, SCALE, entire=True, matrices=True, signed=True),
    "tsv": Rule(
        "arXiv:2412.00081",
        (),
        scale,
        shift_seed,
        {"rank": 0.0},
        ADD,
        entire=True,
        matrices=True,
        signed=True,
        together=join_singular_vectors,
    ),
}


def on(rule: Rule, name: str, shape: Shape) -> Rule:
    """The rule that merges this tensor: where one is for matrices alone, all else is averaged."""
    return RULES["average"] if rule.matrices and (len(shape) != 2 or APART.search(name)) else rule


def open_rules(names: Iterable[str]) -> Rules:
    """The table, with those of these rules that are 'module:function': a Rule, or a function (`rule_of`).

    Only for names typed by the user of this machine: it imports the module. Raises UnknownName, BadInput.
    """
    return RULES | {name: rule_of(lookup(RULES, name, "merge rule"), name) for name in names if ":" in name}


def rule_of(given: Rule | Callable[..., Floats], name: str) -> Rule:
    """A Rule as it is; a function (delta_N, weight, **settings) -> what an expert adds, as the rule that adds it to the seed.

    The settings are keyword arguments with numbers as defaults. Raises BadInput.
    """
    if isinstance(given, Rule):
        return given
    if not callable(given):
        raise BadInput(f"merge rule {name} is a {type(given).__name__}: write a function (delta_N, weight, **settings), or a Rule")
    _, _, *others = inspect.signature(given).parameters.values()
    begins = {one.name: one.default for one in others}
    if wrong := next((key for key, value in begins.items() if not isinstance(value, int | float)), None):
        raise BadInput(f"merge rule {name}: its setting {wrong!r} has no number as a default: give it one")

    @wraps(given)
    def part(delta_N: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
        part_N = np.asarray(given(delta_N, weight, **settings), np.float64)
        if part_N.shape != delta_N.shape:
            raise BadInput(f"merge rule {name} makes shape {part_N.shape} of {delta_N.shape}: it works element by element")
        return (part_N,)

    return Rule((inspect.getdoc(given) or name).partition("\n")[0], SUM, part, shift_seed, begins, ADD, signed=True)


def code_of(name: str, rules: Rules) -> list[str]:
    """What names the code of a rule that is none of the table, so that another version of it is another task; nothing for those of it."""
    if name in RULES:
        return []
    sources = [_source(inspect.unwrap(value)) if callable(value) else repr(value) for value in find_rule(name, rules)]
    return [hashlib.sha256("\n".join(sources).encode()).hexdigest()]


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed at a prompt, or compiled
        return repr(getattr(getattr(function, "__code__", None), "co_code", function.__qualname__))


def find_rule(name: str, rules: Rules) -> Rule:
    """Raises UnknownName."""
    if name not in rules and ":" in name:
        raise UnknownName(f"merge rule {name!r} is not elmwood's own: to run its code, name it with --method {name}")
    if name not in rules:
        raise UnknownName(f"no merge rule {name!r}; have {', '.join(sorted(rules))}")
    return rules[name]


def settle(name: str, given: Settings, rules: Rules = RULES) -> tuple[Rule, dict[str, float], dict[str, float]]:
    """A rule by name, with its settings of beginning and end. Raises UnknownName, BadInput."""
    rule = find_rule(name, rules)
    if unknown := set(given) - set(rule.begins) - set(rule.ends):
        raise BadInput(f"{name} has no setting {sorted(unknown)[0]!r}; it has {', '.join([*rule.begins, *rule.ends])}")
    check_settings(given)
    if {"density", "epsilon"} <= rule.begins.keys():
        density, epsilon = (given.get(key, rule.begins[key]) for key in ("density", "epsilon"))
        if density < 1 and not 0 < density - epsilon <= density + epsilon <= 1:
            raise BadInput(
                f"density {density:g} with epsilon {epsilon:g}: chances from {density - epsilon:g} to {density + epsilon:g}; "
                "they must lie above 0 and reach 1 at most: change one of them"
            )
    begins = {key: float(given.get(key, value)) for key, value in rule.begins.items()}
    return rule, begins, {key: float(given.get(key, value)) for key, value in rule.ends.items()}
