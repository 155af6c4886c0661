"""The header of a GGUF file, walked before the library reads it. Free of torch.

The library makes an object for each value of an array, as many as the file says, also beyond its end: eight bytes of a stranger's file
would keep it busy for ever. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import BinaryIO

KEYS, TENSORS = 1 << 12, 1 << 17  # the most of a file
NAME = 1 << 16  # bytes of a name
VALUES = 1 << 22  # of all arrays; the largest vocabularies in use take 1.5 million
DIMENSIONS = 4
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its type
STRING, ARRAY = 8, 9


def check_header(path: Path) -> None:
    """Raises ValueError, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        magic, version, tensors, keys = struct.unpack("<4sIQQ", _take(file, 24))
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it begins like no little-endian GGUF file of version 2 or 3")
        if keys > KEYS or tensors > TENSORS:
            raise ValueError(f"it speaks of {keys} keys and {tensors} tensors, and {KEYS} and {TENSORS} are read at most")
        left = VALUES
        for _ in range(keys):
            _skip(file, _length(file, NAME), size)
            left -= _skip_value(file, _number(file, "<I"), left, size)
        for _ in range(tensors):
            _skip(file, _length(file, NAME), size)
            if (dimensions := _number(file, "<I")) > DIMENSIONS:
                raise ValueError(f"a tensor of it has {dimensions} dimensions, and {DIMENSIONS} are read at most")
            _skip(file, 8 * dimensions + 12, size)  # with its type and its place


def _skip_value(file: BinaryIO, kind: int, left: int, size: int) -> int:
    """Go past the value of a key; how many values of arrays it has."""
    if kind != ARRAY:
        _skip_one(file, kind, size)
        return 0
    kind, count = _number(file, "<I"), _number(file, "<Q")
    if count > left:
        raise ValueError(f"its arrays have more than {VALUES} values")
    if kind in SIZES:
        _skip(file, SIZES[kind] * count, size)
        return count
    for _ in range(count):
        _skip_one(file, kind, size)
    return count


def _skip_one(file: BinaryIO, kind: int, size: int) -> None:
    if kind not in SIZES and kind != STRING:
        raise ValueError(f"a value of it is of type {kind}, which is not read here")
    _skip(file, _length(file, size) if kind == STRING else SIZES[kind], size)


def _length(file: BinaryIO, most: int) -> int:
    if (length := _number(file, "<Q")) > most:
        raise ValueError(f"a text of it has {length} bytes")
    return length


def _number(file: BinaryIO, form: str) -> int:
    return int(struct.unpack(form, _take(file, struct.calcsize(form)))[0])


def _take(file: BinaryIO, count: int) -> bytes:
    if len(found := file.read(count)) < count:
        raise ValueError("it is cut short")
    return found


def _skip(file: BinaryIO, count: int, size: int) -> None:
    if file.tell() + count > size:
        raise ValueError("it is cut short")
    file.seek(count, 1)
