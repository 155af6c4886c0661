"""Deltas in few bytes: 8 or 4 bits a value, or the largest 3.1 % of each chunk with two bits each. A file is safetensors.

    int8   value = scale * code, code from -127 to 127, a scale for each BLOCK values          8.125 bits a value
    int4   the same from -7 to 7, two codes in a byte                                          4.125
    top    KEPT of each CHUNK values: 12 bits of place, a sign, one of two sizes of the chunk  0.45  (arXiv:2508.15706 sends half of that)

Sizes follow from the form and the shapes alone, so that a file is refused by its length before it is opened.

N values of a tensor, B blocks, C chunks, K values kept of a chunk
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput, Damaged
from elmwood.store.headers import read_header
from elmwood.weights.tensors import pack_header

Floats = NDArray[np.floating[Any]]
Arrays = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]

BLOCK = 256  # values that share a scale
CHUNK, KEPT = 4096, 128  # 12 bits say a place in a chunk
FORMS = ("int8", "int4", "top")
_DTYPES = {"int8": "I8", "uint8": "U8", "float32": "F32"}


class Sent(NamedTuple):
    """A delta as it was sent: a file whose header was checked."""

    path: Path
    form: str
    shapes: Shapes
    places: dict[str, tuple[str, tuple[int, ...], int, int]]  # part of a tensor -> dtype, shape, first and last byte

    def values(self, name: str) -> NDArray[np.float32]:
        """The delta of a tensor [N]. Raises BadInput where a scale is not finite or a place stands twice."""
        return expand({part: self._read(f"{name}|{part}") for part in PARTS[self.form]}, self.form, math.prod(self.shapes[name]), name)

    def _read(self, key: str) -> NDArray[Any]:
        dtype, shape, first, last = self.places[key]
        with self.path.open("rb") as file:
            file.seek(first)
            raw = file.read(last - first)
        return np.frombuffer(raw, {"I8": "i1", "U8": "u1", "F32": "<f4"}[dtype]).reshape(shape)


# ---- one tensor ------------------------------------------------------------------------------------------------------

PARTS = {"int8": ("code", "scale"), "int4": ("code", "scale"), "top": ("place", "code", "scale")}


def shrink(value_N: Floats, form: str) -> Arrays:
    """The parts of a tensor's delta. Raises BadInput where a value is not finite."""
    value_N = np.ascontiguousarray(value_N.reshape(-1), np.float32)
    if not np.isfinite(value_N).all():
        raise BadInput("a delta holds NaN or infinity: training diverged; take a smaller learning rate")
    return _top(value_N) if form == "top" else _codes(value_N, 127 if form == "int8" else 7)


def expand(parts: Arrays, form: str, numbers: int, name: str = "") -> NDArray[np.float32]:
    """The values [N] of a tensor. Raises BadInput."""
    scale = parts["scale"]
    if not (np.isfinite(scale).all() and (scale >= 0).all()):
        raise BadInput(f"{name}: a scale is negative, NaN or infinite: the whole proposal is dropped")
    if form == "top":
        return _from_top(parts, numbers, name)
    code = parts["code"]
    if form == "int4":
        code = np.stack([code & 15, code >> 4], 1).reshape(-1).astype(np.int8) - 8
    value_BK = code.reshape(-1, BLOCK).astype(np.float32) * scale[:, None]
    return value_BK.reshape(-1)[:numbers]


def _codes(value_N: NDArray[np.float32], most: int) -> Arrays:
    value_BK = _rows(value_N, BLOCK)
    scale_B = (np.abs(value_BK).max(1, initial=0) / np.float32(most)).astype(np.float32)
    safe_B = np.where(scale_B > 0, scale_B, 1)
    code_BK = np.clip(np.rint(value_BK / safe_B[:, None]), -most, most).astype(np.int8)
    if most == 127:
        return {"code": code_BK.reshape(-1), "scale": scale_B}
    low, high = ((code_BK.reshape(-1)[place::2] + 8).astype(np.uint8) for place in (0, 1))
    return {"code": low | high << 4, "scale": scale_B}


def _top(value_N: NDArray[np.float32]) -> Arrays:
    """Places ascend. The smaller half of the kept magnitudes become their mean, the larger half theirs."""
    value_CK = _rows(value_N, CHUNK)
    size_CK = np.abs(value_CK)
    place_CK = np.sort(np.argpartition(-size_CK, KEPT - 1, axis=1)[:, :KEPT], axis=1)
    kept_CK = np.take_along_axis(value_CK, place_CK, 1)
    order_CK = np.argsort(np.abs(kept_CK), axis=1, kind="stable")
    large_CK = np.zeros(kept_CK.shape, bool)
    np.put_along_axis(large_CK, order_CK[:, KEPT // 2 :], True, 1)
    sorted_CK = np.take_along_axis(np.abs(kept_CK), order_CK, 1)
    scale_C2 = np.stack([sorted_CK[:, : KEPT // 2].mean(1), sorted_CK[:, KEPT // 2 :].mean(1)], 1).astype(np.float32)
    code_CK = (kept_CK < 0).astype(np.uint8) | large_CK.astype(np.uint8) << 1
    four_CK = code_CK.reshape(len(code_CK), -1, 4)
    packed_CK = four_CK[..., 0] | four_CK[..., 1] << 2 | four_CK[..., 2] << 4 | four_CK[..., 3] << 6
    pair_CK2 = place_CK.reshape(len(place_CK), -1, 2).astype(np.uint32)
    both_CK = pair_CK2[..., 0] | pair_CK2[..., 1] << 12
    bytes_CK = np.stack([both_CK & 255, both_CK >> 8 & 255, both_CK >> 16], -1).astype(np.uint8)
    return {"place": bytes_CK.reshape(len(place_CK), -1), "code": packed_CK.astype(np.uint8), "scale": scale_C2}


def _from_top(parts: Arrays, numbers: int, name: str) -> NDArray[np.float32]:
    chunks = len(parts["scale"])
    three = parts["place"].reshape(chunks, -1, 3).astype(np.uint32)
    both = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
    place_CK = np.stack([both & 4095, both >> 12], -1).reshape(chunks, KEPT)
    if chunks and not (np.diff(place_CK.astype(np.int64), axis=1) > 0).all():
        raise BadInput(f"{name}: the places of a chunk do not ascend: the whole proposal is dropped")
    code_CK = np.stack([parts["code"] >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(chunks, KEPT)
    size_CK = np.take_along_axis(parts["scale"], (code_CK >> 1).astype(np.int64), 1)
    value_CK = np.zeros((chunks, CHUNK), np.float32)
    np.put_along_axis(value_CK, place_CK.astype(np.int64), np.where(code_CK & 1, -size_CK, size_CK), 1)
    return value_CK.reshape(-1)[:numbers]


def _rows(value_N: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """[N] as rows of `width`, the last one filled with zeros."""
    return np.pad(value_N, (0, -len(value_N) % width)).reshape(-1, width)


# ---- a file ----------------------------------------------------------------------------------------------------------


def layout(shapes: Shapes, form: str) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of each part, in the order of the file. Raises BadInput."""
    if form not in FORMS:
        raise BadInput(f"there is no form {form!r} of deltas; have {', '.join(FORMS)}")
    found: list[tuple[str, str, tuple[int, ...], int]] = []
    for name, shape in sorted(shapes.items()):
        count = math.prod(shape)
        blocks, chunks = -(-count // BLOCK), -(-count // CHUNK)
        sizes: dict[str, tuple[str, tuple[int, ...]]]
        if form == "top":
            sizes = {"place": ("U8", (chunks, KEPT * 3 // 2)), "code": ("U8", (chunks, KEPT // 4)), "scale": ("F32", (chunks, 2))}
        else:
            codes = ("I8", (blocks * BLOCK,)) if form == "int8" else ("U8", (blocks * BLOCK // 2,))
            sizes = {"code": codes, "scale": ("F32", (blocks,))}
        found += [(f"{name}|{part}", dtype, rows, math.prod(rows) * (4 if dtype == "F32" else 1)) for part, (dtype, rows) in sizes.items()]
    return found


def size_of(shapes: Shapes, form: str) -> int:
    """Bytes of a file."""
    return len(header_of(shapes, form)) + sum(entry[3] for entry in layout(shapes, form))


def header_of(shapes: Shapes, form: str) -> bytes:
    """The first bytes of a file; the parts of each tensor follow, by name."""
    return pack_header(layout(shapes, form), _about(form))


def bytes_of(parts: Arrays, form: str) -> bytes:
    """The bytes of a tensor in a file."""
    return b"".join(parts[part].tobytes() for part in PARTS[form])


def write_delta(path: Path, delta: Mapping[str, Floats], shapes: Shapes, form: str) -> dict[str, NDArray[np.float32]]:
    """Write a delta; what the other side reads of it, by tensor [N]. Raises BadInput."""
    read = {}
    with path.open("wb") as file:
        file.write(header_of(shapes, form))
        for name, shape in sorted(shapes.items()):
            parts = shrink(delta[name], form)
            file.write(bytes_of(parts, form))
            read[name] = expand(parts, form, math.prod(shape), name)
    return read


def open_delta(path: Path, shapes: Shapes, form: str) -> Sent:
    """A file from elsewhere, its length and header checked, no value read. Raises BadInput, Damaged."""
    entries, wanted = layout(shapes, form), size_of(shapes, form)
    if (size := path.stat().st_size) != wanted:
        raise BadInput(f"a delta of this form has {wanted} bytes, this one {size}: send what `elmwood star join` makes")
    top = read_header(path)
    places = {}
    for name, dtype, shape, _ in entries:
        entry = top.tensors.get(name)
        if entry is None or entry["dtype"] != dtype or tuple(entry["shape"]) != shape:
            raise BadInput(f"the delta has no {dtype} tensor {name!r} of shape {list(shape)}: it is of another model or form")
        first, last = entry["data_offsets"]
        places[name] = (dtype, shape, top.begin + first, top.begin + last)
    if len(top.tensors) != len(entries) or top.metadata != _about(form):
        raise Damaged("the delta has tensors or facts that none has: it is of another model or form")
    return Sent(path, form, dict(shapes), places)


def _about(form: str) -> dict[str, str]:
    return {"elmwood": json.dumps({"delta": form}, separators=(",", ":"))}
