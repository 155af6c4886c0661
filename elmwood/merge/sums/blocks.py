"""What is read when, and the deltas of some experts block by block.

N values of a block of one tensor; E experts
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from elmwood.merge.rules.base import Floats
from elmwood.weights.experts import Doubles, Source, Whole, delta, read_values, refuse_nonfinite
from elmwood.weights.tensors import BLOCK, PIECE, Bytes, ReadAhead, Request, StoredTensor, decode

ALL = (0, 1)  # the part that is the whole
Span = tuple[int, int]


def span_of(values: int, part: tuple[int, int]) -> Span:
    """The values of a tensor that the (i, n)-th part of the work has: whole blocks, in about equal shares."""
    mine, of = part
    blocks = -(-values // BLOCK)
    return min(values, blocks * mine // of * BLOCK), min(values, blocks * (mine + 1) // of * BLOCK)


def pieces_of(span: Span) -> Iterator[Span]:
    """A span in pieces that are read at once."""
    for first in range(*span, PIECE):
        yield first, min(span[1], first + PIECE)


def step_of(name: str, seed: StoredTensor | None, group: Sequence[Source], first: int, last: int) -> list[Request]:
    """What to read of a piece: the seed's values, where they are called for, and those of full experts."""
    step: list[Request] = [(seed, first, last)] if seed else []
    for one in group:
        if isinstance(one, Whole):
            known = one.reads(name, last)
            step.append((one.places[name], min(first, known), known))
    return step


def seed_values(raw: Bytes, place: StoredTensor, at: int, end: int) -> Doubles:
    """Values of the seed, from the bytes of a piece."""
    return decode(raw[at * place.width : end * place.width], place.dtype).astype(np.float64)


class Deltas(NamedTuple):
    """A block of a tensor: the seed's values, and the deltas of some experts."""

    first: int
    seed_N: Doubles
    delta_EN: list[Doubles]


def read_deltas(name: str, place: StoredTensor, group: Sequence[Source], spans: Sequence[Span], reader: ReadAhead) -> Iterator[Deltas]:
    """Block by block over these spans, none longer than a piece. Raises BadInput where a value is not finite."""
    plan = [step_of(name, place, group, *span) for span in spans]
    for (first, last), raws in zip(spans, reader.stream(plan), strict=True):
        for at in range(0, last - first, BLOCK):
            end = min(last - first, at + BLOCK)
            seed_N = seed_values(raws[0], place, at, end)
            rest = iter(raws[1:])
            yield Deltas(first + at, seed_N, [_delta(one, name, first + at, first + end, place, rest, at, seed_N) for one in group])


def _delta(one: Source, name: str, first: int, last: int, place: StoredTensor, rest: Iterator[Any], at: int, seed_N: Doubles) -> Doubles:
    raw = next(rest) if isinstance(one, Whole) else None
    delta_N = delta(one, read_values(one, name, first, last, place, raw, at, seed_N), seed_N)
    refuse_nonfinite(delta_N, one, name)
    return delta_N


def share_of_tensors(names: Sequence[str], name: str, part: tuple[int, int]) -> bool:
    """Whether a tensor that is summed whole belongs to this part of the work."""
    return names.index(name) % part[1] == part[0]


def magnitudes(deltas: Sequence[Doubles]) -> list[Floats]:
    """In place."""
    return [np.abs(delta_N, out=delta_N) for delta_N in deltas]
