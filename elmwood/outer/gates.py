"""What is let into a round: norms, copies, losses. Numbers in, codes out; who is rejected is written into the version.

B blocks of text
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput

Floats = NDArray[np.floating[Any]]
SHARE = 0.2  # of a delta at which its loss is computed: of the whole one noise would hide what it is good for
BAND = (0.1, 5.0)  # norms that are taken, as multiples of the median
COPY, REPEAT = 0.99, 0.999  # cosines from which two deltas are one: of one round; of different rounds
SKETCH = 4096
MEMORY = 8  # versions whose deltas are remembered
ERRORS = 3.0  # standard errors by which a step must be worse to be undone
DOUBT = 2.0  # standard errors by which a delta must make held-out text worse to be refused
WRONGS = ("harm", "norm", "copy", "not-finite", "form")  # codes that say something of who sent it


class Facts(NamedTuple):
    """What is known of one proposal before losses."""

    id: str
    norm: float | None  # None: not finite, or not to be read


class Gains(NamedTuple):
    """How much lower the loss is with `SHARE` of a delta, nats per token of each block; positive is better."""

    own_B: Floats  # on text that it was trained on
    secret_B: Floats  # on held-out text that nobody knew of


def reference_norm(norms: Iterable[float], known: float | None = None) -> float | None:
    """The lower median of the norms of a round and of the last one; None where all are zero."""
    found = sorted(norm for norm in [*norms, *([known] if known else [])] if norm > 0 and math.isfinite(norm))
    return found[(len(found) - 1) // 2] if found else None


def judge_norms(facts: Sequence[Facts], known: float | None) -> tuple[dict[str, str], dict[str, float]]:
    """Code of each that is outside of the band, and the scale of each other: norms are cut to the median."""
    middle = reference_norm([one.norm for one in facts if one.norm is not None], known)
    codes, scales = {}, {}
    for one in facts:
        if one.norm is None or not math.isfinite(one.norm):
            codes[one.id] = "not-finite"
        elif not middle or not BAND[0] * middle <= one.norm <= BAND[1] * middle:
            codes[one.id] = "norm"
        else:
            scales[one.id] = min(1.0, middle / one.norm)
    return codes, scales


class Measured(NamedTuple):
    """What is kept of a delta. Inner products of sketches [SKETCH] are those of deltas, within about 1/64 of the norms: each value, with a
    sign of its own, is added to one of so many sums (arXiv:0902.2206)."""

    norm: float
    sketch: Floats


def measure(names: Iterable[str], deltas: Mapping[str, Callable[[str], Floats]]) -> dict[str, Measured]:
    """Of float32 deltas, by id; those that cannot be read, or are not finite, are left out. Each is read once, and one tensor of one of
    them is in memory."""
    squares, sketches = {id: list[float]() for id in deltas}, {id: np.zeros(SKETCH) for id in deltas}
    for name in sorted(names):
        sign_N = np.zeros(0, np.uint32)
        for id in list(squares):
            try:
                value_N = deltas[id](name).reshape(-1)
                squares[id].append(float(np.square(value_N, dtype=np.float64).sum()))
            except BadInput:
                squares[id] = [math.inf]
            if not math.isfinite(squares[id][-1]):
                del squares[id]
                continue
            if sign_N.size != value_N.size:  # the first of this tensor
                sign_N = np.random.default_rng(list(name.encode())).integers(0, 2, value_N.size, bool).astype(np.uint32) << np.uint32(31)
            signed_N = (value_N.view(np.uint32) ^ sign_N).view(np.float32)
            whole = value_N.size // SKETCH * SKETCH
            sketches[id] += signed_N[:whole].reshape(-1, SKETCH).sum(0, np.float64)
            sketches[id][: value_N.size - whole] += signed_N[whole:]
    return {id: Measured(math.sqrt(math.fsum(found)), sketches[id]) for id, found in squares.items()}


def sketch(names: Iterable[str], values: Callable[[str], Floats]) -> Floats:
    """Of one finite delta."""
    return measure(names, {"": values})[""].sketch


def find_copies(sketches: Mapping[str, Floats], step: Iterable[Floats] = (), earlier: Iterable[Floats] = ()) -> set[str]:
    """Of sketches by id in the order of arrival: those nearly parallel to an earlier one of the round or to the last step, or equal up to
    their norm to one that an earlier version applied. A machine's deltas of few steps are nearly parallel by themselves."""
    found, before, applied = set(), _units(step), _units(earlier)
    for id, given in sketches.items():
        for one in _units([given]):
            if any(float(one @ other) > COPY for other in before) or any(float(one @ other) > REPEAT for other in applied):
                found.add(id)
            before.append(one)
    return found


def _units(sketches: Iterable[Floats]) -> list[Floats]:
    """Those that are not zero, of length one."""
    return [one / norm for one in sketches if (norm := float(np.linalg.norm(one))) > 0]


def judge_gains(gains: Gains) -> str:
    """`harm` where the text that it says it was trained on does not get better by it, or held-out text gets worse beyond `DOUBT` standard
    errors; else nothing. Late in a run an honest delta gains hardly more than chance on text that it has not seen."""
    held_out = float(np.mean(gains.secret_B)) >= -DOUBT * _error(gains.secret_B)  # False of NaN
    return "" if held_out and float(np.mean(gains.own_B)) > 0 else "harm"


def _error(value_B: Floats) -> float:
    """The standard error of a mean."""
    return float(np.std(value_B, ddof=1)) / math.sqrt(len(value_B)) if len(value_B) > 1 else 0.0


def is_worse(before_B: Floats, after_B: Floats) -> bool:
    """Whether a step made the held-out loss higher by more than `ERRORS` standard errors of the paired difference, or not finite."""
    rise_B = np.asarray(after_B, float) - np.asarray(before_B, float)
    if not np.isfinite(rise_B).all():
        return True
    return bool(float(rise_B.mean()) > ERRORS * _error(rise_B) and rise_B.mean() > 0)


def most_guilty(gains: Mapping[str, Gains]) -> list[str]:
    """The proposals of a round that was undone, the one that helped held-out text least first."""
    return sorted(gains, key=lambda one: (float(np.mean(gains[one].secret_B)), one))
