"""The outer step: deltas -> the next version of the weights, the same bytes in any order of arrival and on any machine.

Sums are integers (weights/exact.py), products of the same float64 numbers everywhere. One tensor at a time is in memory, of each delta.

N values of a tensor, P proposals
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput
from elmwood.records import OuterStep
from elmwood.weights import exact
from elmwood.weights.tensors import Files, StoredTensor, decode, pack_header, places

Floats = NDArray[np.floating[Any]]
Doubles = NDArray[np.float64]
OUTER = OuterStep(rate=0.7, momentum=0.5, stale=0.5, most_stale=2, apart=False)
_EMBEDS = re.compile(r"embed|lm_head|wte|wpe")
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


def move(weight_N: Floats, velocity_N: Floats, mean_N: Doubles, outer: OuterStep) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The tensor and its velocity after one Nesterov step (arXiv:2311.08105)."""
    moved_N = outer.momentum * velocity_N.astype(np.float64) + mean_N
    after_N = weight_N.astype(np.float64) + outer.rate * (mean_N + outer.momentum * moved_N)
    return after_N.astype(np.float32), moved_N.astype(np.float32)


# ---- all of them -----------------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """Two files and their sha256 in hex."""

    weights: Path
    weights_sha: str
    velocity: Path
    velocity_sha: str


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


def step(weights: Path, velocity: Path | None, parts: Sequence[Part], outer: OuterStep, how: str, folder: Path) -> Written:
    """The next version, as two float32 files in `folder`. Raises BadInput where a value would not be finite."""
    if not parts:
        raise BadInput("an outer step needs a proposal: nothing was accepted in this round")
    if how == "median" and len(parts) < LEAST:
        raise BadInput(f"a median needs {LEAST} proposals and has {len(parts)}: wait for more machines, or use gates that look at losses")
    old, speed, files = places([weights]), places([velocity]) if velocity else {}, Files()
    entries = [(name, "F32", old[name].shape, 4 * old[name].numbers) for name in sorted(old)]
    header = pack_header(entries, {"format": "pt"})
    made, moved = folder / "model.safetensors", folder / "velocity.safetensors"
    shas = hashlib.sha256(header), hashlib.sha256(header)
    try:
        with made.open("wb") as weights_file, moved.open("wb") as velocity_file:
            outs = (weights_file, velocity_file)
            for out in outs:
                out.write(header)
            for name, _, shape, _ in entries:
                before_N = _tensor(files, old[name])
                speed_N = _tensor(files, speed[name]) if speed else np.zeros(before_N.size, np.float32)
                after = move(before_N, speed_N, average(name, shape, parts, outer, how), outer)
                for out, sha, value_N in zip(outs, shas, after, strict=True):
                    if not np.isfinite(value_N).all():
                        raise BadInput(f"{name} would hold NaN or infinity after this step: refuse the round")
                    raw = value_N.astype("<f4").tobytes()
                    sha.update(raw)
                    out.write(raw)
    finally:
        files.close()
    return Written(made, shas[0].hexdigest(), moved, shas[1].hexdigest())


def shifted(values: Mapping[str, Floats], delta: Callable[[str], Floats], share: float) -> Iterator[tuple[str, Floats]]:
    """Tensors moved by a share of a delta: what a gate computes the loss of."""
    for name, value_N in values.items():
        yield name, value_N + np.float32(share) * delta(name)
