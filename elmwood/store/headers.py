"""The header of a safetensors file, checked before anything else of the file is used. Free of torch.

A file is 8 bytes (the length of the header), the header (a JSON object: name -> dtype, shape, data_offsets) and the values, one tensor
after another (https://huggingface.co/docs/safetensors). Files come from strangers: every reader of the package looks at the header here
first, so that all of them accept and refuse the same files.
"""

import json
import math
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.numpy
from numpy.typing import NDArray

from elmwood.errors import Damaged
from elmwood.records.plain_json import parse_json

# Bytes of a header. A tensor takes some 120 bytes of it, so the largest checkpoints in one file (90,000 tensors) would need 11 MB, and
# one shard of them needs 0.2 MB.
LARGEST = 32 << 20
DIMENSIONS = 16  # of a tensor; models have at most 5
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64,
}  # fmt: skip


class Header(NamedTuple):
    """The beginning of a safetensors file: its bytes, what it says, and where the values begin."""

    raw: bytes
    tensors: dict[str, dict[str, Any]]  # in the order of the header
    metadata: dict[str, str]

    @property
    def begin(self) -> int:
        return len(self.raw)


def read_header(path: Path) -> Header:
    """The header of a file whose every tensor lies where the header says, without overlap or gap. Raises Damaged."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise Damaged(f"{path} is no regular file: fetch it again")
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else about.st_size
            if length > about.st_size - 8:
                raise Damaged(f"{path} is no safetensors file, or was cut short: fetch it again")
            if length > LARGEST:
                raise Damaged(f"{path}: its header has {length} bytes, and {LARGEST} are read at most: split the checkpoint into shards")
            raw = file.read(length)
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror}): fetch it again") from error
    try:
        if raw[:1] != b"{":
            raise ValueError("it is no JSON object")
        tensors = parse_json(raw, LARGEST)
        metadata = _metadata(tensors)
        _check_tensors(tensors, about.st_size - 8 - length)
    except ValueError as error:
        raise Damaged(f"{path}: its header is damaged ({error}): fetch it again") from error
    return Header(start + raw, tensors, metadata)


def check_headers(paths: Iterable[Path]) -> None:
    """Look at the headers of files that a library opens next. Raises Damaged."""
    for path in paths:
        read_header(path)


def sort_metadata(path: Path) -> None:
    """Put the metadata of a file into the order of their names. The library that wrote them has another order in every process."""
    top = read_header(path)
    header = {"__metadata__": dict(sorted(top.metadata.items()))} | top.tensors
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(top.raw) - 8)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(raw)
    read_header(path)


def load_arrays(path: Path, *needed: str) -> dict[str, NDArray[Any]]:
    """The tensors of a small file, among them the needed ones. Raises Damaged."""
    held = read_header(path).tensors
    if absent := [name for name in needed if name not in held]:
        raise Damaged(f"{path} has no tensor {absent[0]!r}: fetch it again")
    if strange := [name for name, one in held.items() if one["dtype"] in _NOT_IN_NUMPY]:
        raise Damaged(f"{path}: {strange[0]!r} has the dtype {held[strange[0]]['dtype']}, which is not read here: fetch it again")
    return safetensors.numpy.load_file(path)


_NOT_IN_NUMPY = {name for name in BITS if name[:2] in {"F4", "F6", "F8", "BF"}}


def _metadata(tensors: dict[str, Any]) -> dict[str, str]:
    """Take the metadata out of a header. Raises ValueError."""
    metadata = tensors.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no table of texts")
    return metadata


def _check_tensors(tensors: dict[str, Any], size: int) -> None:
    """Whether the tensors fill `size` bytes of values. Raises ValueError."""
    spans = []
    for name, entry in tensors.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name[:80]!r} needs a dtype, a shape and data_offsets, and nothing else")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            raise ValueError(f"{name[:80]!r} has the unknown dtype {str(dtype)[:80]!r}")
        if not _are_counts(shape) or len(shape) > DIMENSIONS or math.prod(max(1, n) for n in shape) >= 1 << 56:
            raise ValueError(f"{name[:80]!r} has the shape {str(shape)[:80]}")
        if not _are_counts(offsets) or len(offsets) != 2:
            raise ValueError(f"{name[:80]!r} has the data_offsets {str(offsets)[:80]}")
        if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * BITS[dtype]:
            raise ValueError(f"{name[:80]!r} has the shape {shape} of {dtype} and the data_offsets {str(offsets)[:80]}")
        spans.append((*offsets, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise ValueError(f"{name[:80]!r} begins at byte {first} of the values, where the one before it ends at {end}")
        end = last
    if end != size:
        raise ValueError(f"it speaks of {end} bytes of values, the file has {size}")


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 1 << 62 for one in value)
