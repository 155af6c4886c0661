"""Sums of rules that look at a whole tensor at once.

E experts, N numbers of a tensor
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from elmwood.merge.rules.base import Floats, Local, Rule, Settings
from elmwood.merge.statistics import Opened
from elmwood.merge.sums.reading import chance, check_finite, numbers_of
from elmwood.weights import exact
from elmwood.weights.experts import Source, Whole
from elmwood.weights.tensors import Bytes, Files, Place, decode


class Asked(NamedTuple):
    """One sum of a tensor."""

    rule: Rule
    begins: Settings
    weight_E: Floats


def whole_delta(one: Source, name: str, place: Place, seed_N: Floats, files: Files) -> Floats:
    """An expert's delta of a whole tensor, in its shape, float64. Raises BadInput."""
    raw = files.read(one.places[name], 0, one.reads(name, place.numbers)) if isinstance(one, Whole) else None
    value_N, delta_N = numbers_of(one, name, 0, place.numbers, 0, place, raw, seed_N)
    check_finite(value_N, one, name)
    return (value_N.astype(np.float64) - seed_N if delta_N is None else delta_N).reshape(place.shape)


def entire(
    name: str, place: Place, sources: Sequence[Source], asked: Sequence[Asked], statistics: Sequence[Opened], files: Files
) -> tuple[Bytes, list[list[Any]], list[list[int]]]:  # fmt: skip
    """The seed's bytes; for each sum its keys' whole numbers (or what a set of experts came to), and the bound of what each expert added.

    In memory: the seed, one delta, and sixteen bytes for each number of each field. Raises BadInput."""
    raw = files.read(place, 0, place.numbers)
    seed_N = decode(raw, place.dtype).astype(np.float64)
    sums: list[list[Any]] = [_nothing(one.rule, place) for one in asked]
    reach = [[0] * len(sources) for _ in asked]
    for e, source in enumerate(sources):
        mine = [one for one in asked if one.rule.sums and one.weight_E[e] and (one.rule.needs or source.has(name))]
        if not mine:
            continue
        delta = whole_delta(source, name, place, seed_N, files)
        for number, one in enumerate(asked):
            if one in mine:
                local = Local(chance=_drawn(source, name, place, one.begins), statistic=_left(statistics, e, name))
                parts = one.rule.part(delta, float(one.weight_E[e]), local, one.begins)
                reach[number][e] = _add(sums[number], parts)
    for number, one in enumerate(asked):
        if one.rule.together:

            def deltas() -> Iterator[Floats]:
                return (whole_delta(source, name, place, seed_N, files) for source in sources)

            sums[number] = [one.rule.together(deltas, one.weight_E, one.begins)]
    return raw, sums, reach


def _nothing(rule: Rule, place: Place) -> list[Any]:
    """Two whole numbers for each number of each field."""
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


def _drawn(source: Source, name: str, place: Place, begins: Settings) -> Callable[[], Floats]:
    return lambda: chance(source.digest, name, begins, 0, place.numbers)().reshape(place.shape)


def _left(statistics: Sequence[Opened], e: int, name: str) -> Callable[[str], Floats | None]:
    """What an expert left of its text, of this tensor."""
    return lambda kind: getattr(statistics[e], kind)(name) if statistics else None
