"""One expert's numbers, from the bytes of its file or its factors.

N numbers of a block of one tensor
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from elmwood.errors import BadInput
from elmwood.merge.rules.base import Floats, Settings
from elmwood.weights import exact
from elmwood.weights.experts import Source, Whole
from elmwood.weights.tensors import Place, decode


def numbers_of(
    one: Source, name: str, first: int, last: int, at: int, place: Place, raw: Any, seed_N: Floats | None, bits: bool = False
) -> tuple[Any, Floats | None]:
    """What a linear rule adds: an expert's own numbers, or its delta; and the delta where that is the same.
    `bits`: numbers that are bf16 may come as their bits."""
    if isinstance(one, Whole):
        mine = one.places[name]
        mine_N = raw[at * mine.width : (at + last - first) * mine.width]
        if bits and mine.dtype == "BF16" and mine_N.size == 2 * (last - first):
            return mine_N.view("<u2"), None
        value_N = decode(mine_N, mine.dtype)
        if value_N.size < last - first:  # rows the expert does not have are the seed's
            assert seed_N is not None
            value_N = np.concatenate([value_N, seed_N[value_N.size :]])
        return value_N, None
    if not one.has(name):
        zero_N = np.zeros(last - first)
        return zero_N, zero_N
    delta_N = one.delta(name, first, last, place.shape[-1])
    return delta_N, delta_N


def check_finite(value_N: Floats, one: Source, name: str) -> None:
    """Raises BadInput for a number that is not."""
    if not exact.reach(value_N) < np.inf:
        raise BadInput(f"expert {one.digest[:8]}: {name} holds a number that is not finite: its training went astray; leave it out")


def chance(digest: str, name: str, begins: Settings, first: int, count: int) -> Callable[[], Floats]:
    """Uniform numbers for a part of an expert's tensor: by what they are for, not by when they are drawn."""

    def draw() -> Floats:
        key = hashlib.sha256(f"{digest} {name} {begins.get('rng_seed', 0.0)}".encode()).digest()
        source = np.random.Philox(key=np.frombuffer(key[:16], np.uint64))
        source.advance(first // 4)  # four numbers to a step
        raw_N = source.random_raw(count + first % 4)[first % 4 :]
        return (raw_N >> np.uint64(11)) * 2.0**-53

    return draw
