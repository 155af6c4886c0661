"""The outer step: deltas -> the next version of the weights, the same bytes in any order of arrival and on any machine.

A version is its parent plus a step of 8 bits a value (compress.py), so whoever has the parent needs no more than that. What the codes of a
step leave out is added to the next step. Sums are integers (weights/exact.py), products of the same float64 numbers everywhere, and a
step is added in float32. One tensor at a time is in memory, of each delta.

N values of a tensor, P proposals
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput
from elmwood.outer.compress import Sent, bytes_of, expand, header_of, shrink
from elmwood.records import OuterStep
from elmwood.weights import exact
from elmwood.weights.tensors import Files, StoredTensor, decode, pack_header, places

Floats = NDArray[np.floating[Any]]
Doubles = NDArray[np.float64]
OUTER = OuterStep(rate=0.7, momentum=0.5, stale=0.5, most_stale=2, apart=False)
_EMBEDS = re.compile(r"embed|lm_head|wte|wpe")
STEP = "int8"  # form of steps
LEAST = 3  # proposals whose median says something


class Part(NamedTuple):
    """One accepted proposal."""

    values: Callable[[str], Floats]  # name of a tensor -> its delta [N]
    weight: float
    scale: float = 1.0  # of its delta: its norm was cut


def weight_of(tokens: int, staleness: int, outer: OuterStep) -> float:
    """Raises BadInput where it is too far behind."""
    if not 0 <= staleness <= outer.most_stale:
        raise BadInput(f"a delta is {staleness} versions behind, {outer.most_stale} are taken: train from the newest version")
    return tokens / (1 + outer.stale * staleness)


# ---- one tensor ------------------------------------------------------------------------------------------------------


def mean(values: Sequence[Floats], weights: Sequence[float], scales: Sequence[float]) -> Doubles:
    """sum w s d / sum w."""
    total_N, whole = np.zeros(values[0].size, np.int64), math.fsum(weights)
    for value_N, weight, scale in zip(values, weights, scales, strict=True):
        exact.add(total_N, value_N, weight * scale / whole)
    return exact.value(total_N)


def mean_apart(values: Sequence[Floats], weights: Sequence[float], scales: Sequence[float]) -> Doubles:
    """The mean direction, with the mean norm: plain averages of nearly orthogonal deltas are much shorter than each of them."""
    norms = [math.sqrt(exact.inner(value_N, value_N)) for value_N in values]
    whole = math.fsum(weights)
    total_N = np.zeros(values[0].size, np.int64)
    for value_N, weight, norm in zip(values, weights, norms, strict=True):
        if norm:
            exact.add(total_N, value_N, weight / whole / norm)
    direction_N = exact.value(total_N)
    length = math.sqrt(exact.inner(direction_N, direction_N))
    wanted = math.fsum(weight * scale * norm for weight, scale, norm in zip(weights, scales, norms, strict=True)) / whole
    return direction_N * (wanted / length) if length > 1e-12 else np.zeros_like(direction_N)


def median(values: Sequence[Floats], scales: Sequence[float]) -> Doubles:
    """Of each coordinate: what fewer than half of the senders cannot move beyond what the others sent."""
    return np.median(np.stack([value_N.astype(np.float64) * scale for value_N, scale in zip(values, scales, strict=True)]), axis=0)


def average(name: str, shape: Sequence[int], parts: Sequence[Part], outer: OuterStep, how: str) -> Doubles:
    """The mean delta of a tensor."""
    values = [part.values(name) for part in parts]
    scales = [part.scale for part in parts]
    if how == "median":
        return median(values, scales)
    apart = outer.apart and len(shape) == 2 and not _EMBEDS.search(name)
    return (mean_apart if apart else mean)(values, [part.weight for part in parts], scales)


def move(velocity_N: Floats, mean_N: Doubles, outer: OuterStep) -> tuple[Doubles, Doubles]:
    """What a Nesterov step (arXiv:2311.08105) adds to a tensor, and its velocity after that."""
    moved_N = outer.momentum * velocity_N.astype(np.float64) + mean_N
    return outer.rate * (mean_N + outer.momentum * moved_N), moved_N


# ---- all of them -----------------------------------------------------------------------------------------------------


class File(NamedTuple):
    """A file and its sha256 in hex."""

    path: Path
    sha: str


class Written(NamedTuple):
    """A version as files: the weights, what the next step needs, and how the weights follow from those of the parent."""

    weights: File
    velocity: File
    error: File  # what the codes of all steps so far left out
    step: File


def shapes_of(weights: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a checkpoint. Raises BadInput where a dtype is none that trains."""
    found = places([weights])
    for place in found.values():
        _ = place.width
    return {name: place.shape for name, place in found.items()}


def read_tensors(path: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Each tensor [N] of a checkpoint, as float32."""
    files, found = Files(), places([path])
    try:
        for name, place in found.items():
            yield name, _tensor(files, place)
    finally:
        files.close()


def _tensor(files: Files, place: StoredTensor) -> NDArray[np.float32]:
    return decode(files.read(place, 0, place.numbers), place.dtype).astype(np.float32)


def step(
    weights: Path, velocity: Path | None, error: Path | None, parts: Sequence[Part], outer: OuterStep, how: str, folder: Path
) -> Written:  # fmt: skip
    """The next version, as files in `folder`, of float32 but for the step. Raises BadInput where a value would not be finite."""
    if not parts:
        raise BadInput("an outer step needs a proposal: nothing was accepted in this round")
    if how == "median" and len(parts) < LEAST:
        raise BadInput(f"a median needs {LEAST} proposals and has {len(parts)}: wait for more machines, or use gates that look at losses")
    shapes, old, files = shapes_of(weights), places([weights]), Files()
    speed, left = ((places([path]) if path else {}) for path in (velocity, error))
    headers = {"weights": _header(shapes), "velocity": _header(shapes), "error": _header(shapes), "step": header_of(shapes, STEP)}
    try:
        with Writing({folder / f"{kind}.safetensors": header for kind, header in headers.items()}) as writing:
            for name in sorted(shapes):
                before_N = _tensor(files, old[name])
                speed_N, left_N = (_tensor(files, kept[name]) if kept else np.zeros_like(before_N) for kept in (speed, left))
                wanted_N, moved_N = move(speed_N, average(name, shapes[name], parts, outer, how), outer)
                wanted_N += left_N
                if not np.isfinite(wanted_N).all():
                    raise BadInput(f"{name} would hold NaN or infinity after this step: refuse the round")
                codes = shrink(wanted_N, STEP)
                after_N = before_N + expand(codes, STEP, before_N.size, name)
                left_N = before_N + wanted_N - after_N
                writing.add(_raw(after_N), _raw(moved_N), _raw(left_N), bytes_of(codes, STEP))
    finally:
        files.close()
    return Written(*writing.files)


def follow(weights: Path, steps: Sequence[Sent], made: Path) -> File:
    """The weights that steps, one after another, make of those of a version. Raises BadInput."""
    shapes, old, files = shapes_of(weights), places([weights]), Files()
    try:
        with Writing({made: _header(shapes)}) as writing:
            for name in sorted(shapes):
                value_N = _tensor(files, old[name])
                for one in steps:
                    value_N = value_N + one.values(name)
                writing.add(_raw(value_N))
    finally:
        files.close()
    return writing.files[0]


class Writing:
    """Files that are written side by side, and hashed meanwhile. `files` is there at the end."""

    def __init__(self, headers: Mapping[Path, bytes]):
        self.around, self.shas = ExitStack(), [hashlib.sha256() for _ in headers]
        self.outs = [self.around.enter_context(path.open("wb")) for path in headers]
        self.add(*headers.values())

    def add(self, *raw: bytes) -> None:
        """The next bytes of each."""
        for out, sha, one in zip(self.outs, self.shas, raw, strict=True):
            out.write(one)
            sha.update(one)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.around.close()
        self.files = [File(Path(out.name), sha.hexdigest()) for out, sha in zip(self.outs, self.shas, strict=True)]


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    entries = [(name, "F32", shape, 4 * math.prod(shape)) for name, shape in sorted(shapes.items())]
    return pack_header(entries, {"format": "pt"})


def _raw(value_N: Floats) -> bytes:
    return value_N.astype("<f4").tobytes()


def shifted(values: Mapping[str, Floats], delta: Callable[[str], Floats], share: float) -> Iterator[tuple[str, Floats]]:
    """Tensors moved by a share of a delta: what a gate computes the loss of."""
    for name, value_N in values.items():
        yield name, value_N + np.float32(share) * delta(name)
