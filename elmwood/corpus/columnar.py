"""What a Parquet or Arrow file unpacks to, as its pages and buffers say, before any of it is unpacked.

The library allocates what a compressed page or buffer says of itself, and repeats a value that stands once in a dictionary for each row
that names it. The sums in a Parquet footer are another claim, which need not agree with the pages.
"""

import mmap
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from elmwood.corpus.unpack import RATIO, Bomb, first_bytes

LEVELS = 16  # bytes that an element of a list takes while its row is put together
OBJECT, STRUCT = 8, 64  # bytes of an element as a Python object, at least
PREFIXES = 7  # the encoding DELTA_BYTE_ARRAY: a text repeats the beginning of the one before it
CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 5: "lz4", 6: "zstd", 7: "lz4_raw"}
DEPTH = 9  # of structs and lists in one another; those in use have 6
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # what reading other bytes than expected ends in


# ---- Parquet: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift -----------------


class Chunk(NamedTuple):
    """A column in one row group, as the footer says."""

    begin: int  # its first page
    packed: int  # bytes
    values: int
    codec: int


class Group(NamedTuple):
    """A row group."""

    rows: int
    chunks: tuple[Chunk, ...]  # in the order of the leaves of the schema


class Pages(NamedTuple):
    """The pages of a column in one row group."""

    bytes: int  # unpacked, with the elements of lists
    longest: int  # of the largest page: no value is longer
    repeats: int  # bytes of one row at most, if it names the longest text of a dictionary in each of its elements


class Rows(NamedTuple):
    """How rows are read in bounded memory."""

    longest: int  # bytes of a value at most
    wary: frozenset[int]  # row groups in which a row may repeat more than is read
    texts: tuple[str, ...]  # in lists; read as dictionaries, which repeat nothing


def read_footer(path: Path) -> list[Group]:
    """The row groups of a Parquet file. pyarrow's own view of a column aborts the process where the footer is damaged.

    Raises ArrowInvalid.
    """
    with _mapped(path) as data:
        try:
            length = int.from_bytes(data[-8:-4], "little")
            footer, _ = _struct(data, max(0, len(data) - 8 - length))
            return [Group(group[3], tuple(map(_chunk, group[1]))) for group in footer[4]]
        except MALFORMED as error:
            raise pa.ArrowInvalid("damaged footer") from error


def _chunk(column: dict[int, Any]) -> Chunk:
    about = column[3]
    begin, dictionary = about[9], about.get(11, 0)
    return Chunk(dictionary if 0 < dictionary < begin else begin, about[7], about[5], about[4])


def check_pages(opened: pq.ParquetFile, path: Path, groups: Sequence[int], columns: Sequence[str], largest: int) -> Rows:
    """How these columns are to be read. Raises Bomb where they unpack to more than `largest` and than RATIO times the file, and
    ArrowInvalid for damage."""
    most, longest, rows, wary = max(largest, RATIO * path.stat().st_size), 0, 0, set()
    leaves = [(n, leaf) for n in range(len(opened.schema)) if _is_below((leaf := opened.schema.column(n)).path, columns)]
    footer = read_footer(path)
    with _mapped(path) as data:
        for group in groups:
            if group >= len(footer) or any(n >= len(footer[group].chunks) for n, _ in leaves):
                raise pa.ArrowInvalid("a row group without these columns")
            found = [_pages(data, footer[group].chunks[n], leaf) for n, leaf in leaves]
            rows += footer[group].rows
            if max(rows, sum(one.bytes for one in found)) > most:
                raise Bomb(most)
            if sum(one.repeats for one in found) > most:
                wary.add(group)
            longest = max([longest, *(one.longest for one in found)])
    texts = (leaf.path for _, leaf in leaves if leaf.max_repetition_level and leaf.physical_type == "BYTE_ARRAY")
    return Rows(longest, frozenset(wary), tuple(texts))


def _is_below(path: str, columns: Sequence[str]) -> bool:
    """Whether a leaf is one of these columns, or within one."""
    return any(path == name or path.startswith(f"{name}.") for name in columns)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _pages(data: mmap.mmap, chunk: Chunk, leaf: Any) -> Pages:
    place, end, size, longest, values, text = chunk.begin, min(chunk.begin + chunk.packed, len(data)), 0, 0, 0, 0
    lists, texts = leaf.max_repetition_level > 0, leaf.physical_type == "BYTE_ARRAY"
    while place < end:
        try:
            header, place = _struct(data, place)
            unpacked, packed = header[2], header[3]
            about = header.get(5) or header.get(8) or {}
            count = about.get(1, 0)
            if min(unpacked, packed, count) < 0:
                raise ValueError
        except MALFORMED as error:
            if values >= chunk.values:
                break  # old writers leave a few bytes after the last page
            raise pa.ArrowInvalid("damaged page header") from error
        if lists and texts and header.get(7):
            text = max(text, _longest_text(data[place : place + packed], chunk.codec, unpacked))
        if lists and texts and about.get(2 if 5 in header else 4) == PREFIXES:
            size += count * unpacked
        size, longest, place, values = size + unpacked, max(longest, unpacked), place + packed, values + count
    size += values * max(LEVELS, leaf.length or 0) if lists else 0
    return Pages(size, longest, values * text)


def _longest_text(page: bytes, codec: int, size: int) -> int:
    """The bytes of the longest text in the page of a dictionary, at most."""
    try:
        raw = pa.Codec(CODECS[codec]).decompress(page, size, asbytes=True) if codec else page
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return size
    place, longest = 0, 0
    while place + 4 <= len(raw):
        length = int.from_bytes(raw[place : place + 4], "little")
        place, longest = place + 4 + length, max(longest, length)
    return min(longest, size)


def _struct(data: mmap.mmap, place: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol: number of a field -> value; and the place after it. Raises IndexError, ValueError."""
    if depth > DEPTH:
        raise ValueError
    found: dict[int, Any] = {}
    number = 0
    while byte := data[place]:
        place += 1
        if byte >> 4:
            number += byte >> 4
        else:
            number, place = _integer(data, place)
        found[number], place = _value(data, place, byte & 15, depth)
    return found, place + 1


def _value(data: mmap.mmap, place: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true and false, in the kind itself
        return kind == 1, place
    if kind == 3:
        return data[place], place + 1
    if kind in (4, 5, 6):
        return _integer(data, place)
    if kind == 7:
        return None, place + 8
    if kind == 8:
        length, place = _varint(data, place)
        return None, place + length
    if kind in (9, 10):
        return _list(data, place, depth)
    if kind == 12:
        return _struct(data, place, depth + 1)
    raise ValueError(kind)


def _list(data: mmap.mmap, place: int, depth: int) -> tuple[list[Any], int]:
    count, kind, place = data[place] >> 4, data[place] & 15, place + 1
    if count == 15:
        count, place = _varint(data, place)
    if count > len(data) - place:  # each takes a byte at least
        raise ValueError
    found = []
    for _ in range(count):
        value, place = _value(data, place, 3 if kind in (1, 2) else kind, depth + 1)
        found.append(value)
    return found, place


def _integer(data: mmap.mmap, place: int) -> tuple[int, int]:
    value, place = _varint(data, place)
    return (value >> 1) ^ -(value & 1), place


def _varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place + shift // 7 + 1
    raise ValueError


# ---- Arrow ------------------------------------------------------------------------------------------------------


def open_arrow(source: pa.MemoryMappedFile, path: Path) -> pa.MemoryMappedFile:
    """The stream in an Arrow file: all of it, or what stands between `ARROW1` and the footer."""
    source.seek(0 if first_bytes(path).startswith(b"\xff") else 8)
    return source


def check_buffers(path: Path, largest: int) -> None:
    """Raises Bomb where a batch unpacks to more than `largest` and than RATIO times the file, and ArrowInvalid for damage."""
    most, rows = max(largest, RATIO * path.stat().st_size), 0
    with pa.memory_map(str(path)) as source:
        messages = pa.ipc.MessageReader.open_stream(open_arrow(source, path))
        for message in messages:
            try:
                count, size = _unpacked(memoryview(message.metadata), memoryview(message.body) if message.body else memoryview(b""))
            except (struct.error, IndexError, ValueError) as error:
                raise pa.ArrowInvalid("damaged message") from error
            rows += count
            if max(size, rows) > most:
                raise Bomb(most)


def _unpacked(top: memoryview, body: memoryview) -> tuple[int, int]:
    """The rows that a message says it has, and the bytes that its buffers unpack to: Message, RecordBatch and DictionaryBatch of
    https://github.com/apache/arrow/blob/main/format/Message.fbs.
    """
    table = struct.unpack_from("<I", top, 0)[0]
    kind, batch = _field(top, table, 1), _field(top, table, 2)
    if not kind or not batch or top[kind] not in (2, 3):
        return 0, 0  # the schema
    batch = _follow(top, batch)
    if top[kind] == 2:
        batch = _follow(top, _field(top, batch, 1))
    rows = _field(top, batch, 0)
    count = struct.unpack_from("<q", top, rows)[0] if rows else 0
    if not _field(top, batch, 3):
        return count, 0  # not compressed: the file is what it takes
    return count, sum(_sizes(top, _follow(top, _field(top, batch, 2)), body))


def _sizes(top: memoryview, vector: int, body: memoryview) -> Iterator[int]:
    """Of each buffer, unpacked. -1 stands before one that is not compressed."""
    for n in range(struct.unpack_from("<I", top, vector)[0]):
        begin, length = struct.unpack_from("<qq", top, vector + 4 + 16 * n)
        if length >= 8 and begin >= 0:
            size = struct.unpack_from("<q", body, begin)[0]
            yield length if size < 0 else size


def _field(top: memoryview, table: int, number: int) -> int:
    """Where the field of a flatbuffers table is; 0: it has none."""
    about = table - struct.unpack_from("<i", top, table)[0]
    if about < 0:
        raise ValueError
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", top, about + place)[0] if place < struct.unpack_from("<H", top, about)[0] else 0
    return table + offset if offset else 0


def _follow(top: memoryview, place: int) -> int:
    if not place:
        raise ValueError
    return place + struct.unpack_from("<I", top, place)[0]


# ---- rows -------------------------------------------------------------------------------------------------------


def weight(value: pa.Scalar) -> float:
    """The bytes of all texts in a value, and of the elements of its lists; infinite for kinds that repeat what stands once."""
    if not value.is_valid:
        return 0
    match value:
        case pa.StringScalar() | pa.LargeStringScalar() | pa.BinaryScalar() | pa.LargeBinaryScalar() | pa.StringViewScalar():
            return len(value.as_buffer())
        case pa.DictionaryScalar() | pa.RunEndEncodedScalar() | pa.ExtensionScalar():
            return weight(value.value)
        case pa.ListScalar():
            return weigh(value.values)
        case pa.StructScalar():
            return sum(weight(one) for _, one in value.items())
    return OBJECT


def weigh(array: pa.Array) -> float:
    """`weight` of all values of an array."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return weigh(array.storage)
    if _is_text(kind):
        return OBJECT * len(array) + _sum(pc.binary_length(array))
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1] or b"", np.int32).reshape(-1, 4)[array.offset : array.offset + len(array)]
        return OBJECT * len(array) + int(views[:, 0].sum(dtype=np.int64))
    if pa.types.is_dictionary(kind):
        texts = _is_text(kind.value_type)
        return OBJECT * len(array) + _sum(pc.binary_length(array.dictionary).take(array.indices)) if texts else float("inf")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_map(kind):
        return OBJECT * len(array) + weigh(array.flatten())
    if pa.types.is_struct(kind):
        return STRUCT * len(array) + sum(map(weigh, array.flatten()))
    return float("inf") if pa.types.is_nested(kind) or pa.types.is_run_end_encoded(kind) else OBJECT * len(array)


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _sum(lengths: pa.Array) -> int:
    return int(pc.sum(lengths.cast(pa.int64())).as_py() or 0)
