"""Sums of rules that look at a whole tensor at once.

E experts, N values of a tensor
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from elmwood.merge.rules.base import Floats, Local, Rule, Settings, chance
from elmwood.merge.statistics import ExpertStatistics
from elmwood.weights import exact
from elmwood.weights.experts import Source, read_delta, refuse_nonfinite
from elmwood.weights.tensors import Bytes, Files, StoredTensor, decode


class TensorSum(NamedTuple):
    """One sum of a tensor."""

    rule: Rule
    begins: Settings
    weight_E: Floats


def whole_delta(one: Source, name: str, place: StoredTensor, seed_N: Floats, files: Files) -> Floats:
    """An expert's delta of a whole tensor, in its shape, float64. Raises BadInput."""
    delta_N = read_delta(one, name, place, 0, place.numbers, seed_N, files)
    refuse_nonfinite(delta_N, one, name)
    return delta_N.reshape(place.shape)


def sum_whole(
    name: str, place: StoredTensor, sources: Sequence[Source], asked: Sequence[TensorSum], statistics: Sequence[ExpertStatistics],
    files: Files,
) -> tuple[Bytes, list[list[Any]], list[list[int]]]:  # fmt: skip
    """The seed's bytes; for each sum the integers of its fields (or the delta of a rule that looks at all experts together), and the bound
    of what each expert added.

    In memory: the seed, one delta, and sixteen bytes for each value of each field. Raises BadInput."""
    raw = files.read(place, 0, place.numbers)
    seed_N = decode(raw, place.dtype).astype(np.float64)
    sums: list[list[Any]] = [_nothing(one.rule, place) for one in asked]
    reach = [[0] * len(sources) for _ in asked]
    for e, source in enumerate(sources):
        mine = [n for n, one in enumerate(asked) if one.rule.sums and one.weight_E[e] and (one.rule.needs or source.has(name))]
        if not mine:
            continue
        delta = whole_delta(source, name, place, seed_N, files)
        for number in mine:
            rule, begins, weight_E = asked[number]
            local = Local(chance=_chance(source, name, place, begins), statistic=_statistic(statistics, e, name))
            reach[number][e] = _add(sums[number], rule.part(delta, float(weight_E[e]), local, begins))
    for number, one in enumerate(asked):
        if one.rule.together:

            def deltas() -> Iterator[Floats]:
                return (whole_delta(source, name, place, seed_N, files) for source in sources)

            sums[number] = [one.rule.together(deltas, one.weight_E, one.begins)]
    return raw, sums, reach


def _nothing(rule: Rule, place: StoredTensor) -> list[Any]:
    """Two integers for each value of each field."""
    return [np.zeros(math.prod(size), np.int64) for size in rule.sizes(place.shape) for _ in "ab"] if rule.sums else []


def _add(sums: list[Any], parts: Sequence[Floats]) -> int:
    """Add one expert's fields; the bound of their magnitudes, in units of exact.WIDER."""
    bound = 0
    for field, part in enumerate(parts):
        bound = max(bound, exact.bound(exact.reach(part.reshape(-1)) / exact.WIDER))
        high_N, low_N = exact.wide(part.reshape(-1))
        sums[2 * field] += high_N
        sums[2 * field + 1] += low_N
    return bound


def _chance(source: Source, name: str, place: StoredTensor, begins: Settings) -> Callable[[], Floats]:
    return lambda: chance(source.digest, name, begins, 0, place.numbers)().reshape(place.shape)


def _statistic(statistics: Sequence[ExpertStatistics], e: int, name: str) -> Callable[[str], Floats | None]:
    """What an expert left of its text, of this tensor."""
    return lambda kind: getattr(statistics[e], kind)(name) if statistics else None
