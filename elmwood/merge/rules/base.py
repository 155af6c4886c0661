"""What a merge rule is: finish(sum over experts of part(expert)), or a set of experts that is looked at together.

N values of one tensor (or a block of it), F fields of a state, E experts. `delta` is expert minus seed (the task vector).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.ranges import Between

Floats = NDArray[np.floating[Any]]
Settings = Mapping[str, float]
Shape = tuple[int, ...]

REVISION = 4  # raised when a mended rule gives other values: what was merged before is then merged anew


# settings with the values they may have, whatever rule they are of; others are any finite number
SWITCH, SHARE, FINITE = Between(0, 1), Between(0, 1), Between(-1e300, 1e300)
RANGES = {
    "density": Between(1e-9, 1), "gamma": SHARE, "epsilon": SHARE, "across": SWITCH, "normalise": SWITCH, "deltas": SWITCH,
    "straight": SHARE, "iterations": Between(0, 10_000), "tolerance": Between(0), "floor": Between(0), "prior": Between(0),
    "alpha": SHARE, "ridge": Between(0), "rank": Between(0), "rng_seed": Between(0, 2**53),
}  # fmt: skip


def check_settings(given: Settings) -> None:
    """Raises BadInput."""
    for name, value in given.items():
        RANGES.get(name, FINITE).check(name, value)


class Local(NamedTuple):
    """What a rule knows of one expert's tensor beside a block of it."""

    low: float = 0.0  # magnitudes below are trimmed
    high: float = np.inf  # and those from here on
    chance: Callable[[], Floats] = lambda: np.empty(0)  # uniform numbers [N], the same for an expert wherever it is read
    statistic: Callable[[str], Floats | None] = lambda kind: None  # what the expert left of its text: "gram" [I, I], "fisher" [N]


def chance(digest: str, name: str, begins: Settings, first: int, count: int) -> Callable[[], Floats]:
    """Uniform numbers for values `first` on of an expert's tensor: the same ones wherever and in whatever order they are drawn."""

    def draw() -> Floats:
        key = hashlib.sha256(f"{digest} {name} {begins.get('rng_seed', 0.0)}".encode()).digest()
        source = np.random.Philox(key=np.frombuffer(key[:16], np.uint64))
        source.advance(first // 4)  # four numbers to a step
        raw_N = source.random_raw(count + first % 4)[first % 4 :]
        return (raw_N >> np.uint64(11)) * 2.0**-53

    return draw


class Total(NamedTuple):
    """What is known of a sum beside its values."""

    weight: float  # of all experts together
    whole: float  # of those that were added as themselves, not as deltas
    squares: float = 0.0  # of the weights


class Rule(NamedTuple):
    """A row: where it comes from, what it adds, how it ends, its settings with their defaults."""

    paper: str
    fields: tuple[str, ...]
    part: Callable[[Floats, float, Local, Settings], tuple[Floats, ...]]  # (delta_N, weight, ...) -> one array for each field
    finish: Callable[[tuple[Floats, ...], Floats, Total, Settings], Floats]  # (sum_N for each field, seed_N, ...) -> theta_N
    begins: Mapping[str, float]  # settings that decide the state
    ends: Mapping[str, float]  # settings that finishing takes: they can be changed without reading experts again
    linear: bool = False  # the part is weight * delta, so that full experts can be added without subtracting the seed
    signed: bool = False  # a sum of weighted deltas, so that a weight below 0 subtracts; others divide by the weights, or choose among them
    ballot: bool = False  # the part is one array that votes: the four fields are made of it (exact.vote)
    ranks: Callable[[Settings], tuple[float, float]] | None = None  # shares of magnitudes: kept, and cut off at the top
    # part and finish take a whole tensor, in its shape; its sums are wide (exact.wide)
    entire: bool = False
    shapes: Callable[[Shape], Sequence[Shape]] | None = None  # of the fields, where they are not the tensor's own
    matrices: bool = False  # for the weights of linear layers alone; all else is averaged
    needs: str = ""  # the statistic that every expert must have left
    # a set: nothing is summed before the end. Either weights from the inner products of the experts, or all deltas, one after another
    share: Callable[[Floats, Floats, Settings], Floats] | None = None  # (inner_EE, weight_E, ...) -> weight_E
    together: Callable[[Callable[[], Iterator[Floats]], Floats, Settings], Floats] | None = None  # (deltas, weight_E, ...) -> delta

    @property
    def sums(self) -> bool:
        """Whether the state is a sum; else it is the set of its experts."""
        return self.share is None and self.together is None

    def stored(self) -> list[str]:
        """Names of the fields as a state holds them: wide ones in two parts."""
        return [key for field in self.fields for key in ((field, f"{field}.low") if self.entire else (field,))]

    def sizes(self, shape: Shape) -> list[Shape]:
        """The shapes of the fields of a tensor."""
        return list(self.shapes(shape)) if self.shapes else [shape] * len(self.fields)
