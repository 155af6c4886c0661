"""Read the documents of one file, streamed. A reader yields one mapping per document, or the Reason why there is none.

At most one line, row or whole document is in memory at a time, of at most `largest` bytes.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from elmwood.corpus.columnar import check_buffers, check_pages, open_arrow, read_footer, weigh, weight
from elmwood.corpus.kinds import looks_like_json
from elmwood.corpus.sources import Reason
from elmwood.corpus.unpack import BLOCK, HEAD, lines, open_utf8, skip_line
from elmwood.units import short

KEPT = ("source", "licence")  # fields kept as meta, for reports and credit; clustering never reads them
ROWS = 8  # of a Parquet file in memory: each may be as long as `largest`, and packs to almost nothing
_GAP = re.compile(r"[\s,]*")
LARGEST = 64_000_000  # bytes of a document, and of the line or row that holds it, unless said otherwise


class File(NamedTuple):
    """A file to import."""

    path: Path
    name: str  # its path in the folder that is the source, or its file name
    field: str  # the field that holds the text
    encoding: str = "utf-8"
    largest: int = LARGEST
    start: int = 0  # a part of it: JSON lines that begin at these bytes, or these row groups of a Parquet file
    end: int = 0  # 0: all of it


Importer = Callable[[File], Iterator[Any]]


def too_long(largest: int) -> str:
    return f"longer than {short(largest)}B"


# ---- JSON -------------------------------------------------------------------------------------------------------


def read_json(file: File) -> Iterator[Any]:
    """JSON lines, an array, or one object. A line that is not JSON, such as the last one of a truncated file, is a reason."""
    with open_utf8(file.path, file.encoding, file.largest) as opened:
        yield from _lines(opened, file) if file.end or by_line(opened.peek(HEAD)[:HEAD]) else _values(opened, file)


def by_line(head: bytes) -> bool:
    """Whether JSON that begins so has a value on each line."""
    first, *others = [line for line in head.splitlines() if line.strip()][:2] or [b""]
    if not first.lstrip().startswith((b"[", b"{")):
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError) as error:
        if others and getattr(error, "pos", 0) < len(first.rstrip().decode(errors="replace")):
            return first.lstrip().startswith(b"{")  # damaged before its end: a value over several lines goes on at its end
        long = not others and len(head) >= HEAD
        return first.lstrip().startswith(b"{") and (long or (first.strip() != b"{" and not looks_like_json(head.decode(errors="replace"))))
    return first.lstrip().startswith(b"{") or bool(others)


def _lines(opened: io.BufferedReader, file: File) -> Iterator[Any]:
    where = "line {}"
    if file.start:
        opened.seek(file.start - 1)
        skip_line(opened)  # to the first line that begins in this part
        where = f"line {{}} from byte {file.start}"
    before = opened.tell() if file.end else 0
    for number, line in enumerate(lines(opened, file.largest), 1):
        if file.end:
            if before >= file.end:
                return
            before = opened.tell()
        if line is None:
            yield Reason.of(too_long(file.largest), where.format(number))
        elif line.strip():
            try:
                yield json.loads(line.decode())
            except UnicodeDecodeError:
                yield Reason.of("not UTF-8", where.format(number))
            except (ValueError, RecursionError):
                yield Reason.of("not JSON", where.format(number))


def _values(opened: io.BufferedReader, file: File) -> Iterator[Any]:
    """The elements of an array, or values one after the other. Nothing can be read after one that is not JSON."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode  # bytes that are not UTF-8 are found in the texts
    scan = json.JSONDecoder().raw_decode
    text, place, ended = decode(opened.read(BLOCK)).lstrip(), 0, False
    if array := text.startswith("["):
        place = 1
    while True:
        place = _GAP.match(text, place).end()  # type: ignore[union-attr]  # it matches everywhere
        if array and text.startswith("]", place):
            return
        try:
            value, place = scan(text, place)
        except (ValueError, RecursionError):  # incomplete, or not JSON
            text, place = text[place:], 0
            if ended or len(text) > file.largest:
                if text or array:
                    yield Reason.of("not JSON" if ended else too_long(file.largest))
                return
            more = opened.read(max(BLOCK, len(text)))  # twice as much each time, so the time is linear
            text, ended = text + decode(more, not more), not more
        else:
            yield value


# ---- tables -----------------------------------------------------------------------------------------------------


class _TooLong(Exception):
    pass


def read_table(file: File) -> Iterator[Any]:
    """Rows of a CSV file. The delimiter is a tab in .tsv, else the one of `,`, `;`, tab and `|` that the first line has most of."""
    csv.field_size_limit(2**31 - 1)  # ours is the bound
    with open_utf8(file.path, file.encoding, file.largest) as opened:
        head = first_line(opened.peek(HEAD))
        delimiter = "\t" if ".tsv" in file.path.suffixes[-2:] else max(",;\t|", key=head.count)
        bounded = _Bounded(opened, file.largest)
        rows = csv.reader(bounded, delimiter=delimiter)
        try:
            names = next(rows, [])
            for row in rows:
                bounded.used = 0
                if len(row) == len(names):
                    yield dict(zip(names, row, strict=True))
                elif row:
                    yield Reason.of("a row with more or fewer columns than the first", f"line {rows.line_num}")
        except _TooLong:
            yield Reason.of(too_long(file.largest), f"line {rows.line_num}; nothing was read after it", file=True)
        except csv.Error as error:
            yield Reason.of("damaged file", f"line {rows.line_num}: {error}", file=True)


def first_line(head: bytes) -> str:
    return (head.splitlines() or [b""])[0].decode(errors="replace")


class _Bounded:
    """Lines for the CSV reader, which joins those of a quoted field: all of one row together are bounded."""

    def __init__(self, opened: io.BufferedReader, largest: int):
        self.lines, self.largest, self.used = lines(opened, largest), largest, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.used += len(line or b"")
            if line is None or self.used > self.largest:
                raise _TooLong
            yield line.decode(errors="surrogateescape").replace("\0", "")


# ---- Parquet and Arrow ------------------------------------------------------------------------------------------


def read_parquet(file: File) -> Iterator[Any]:
    """Rows of a Parquet file. Raises Bomb."""
    with pq.ParquetFile(file.path) as opened:
        names = opened.schema_arrow.names
        columns = _columns(names, file.field)
        if not set(columns) - set(KEPT) - {file.field} and file.field not in names:
            if not file.start:
                yield Reason.of(f"no field {file.field!r}", f"columns {', '.join(names)}", documents=max(1, opened.metadata.num_rows))
            return
        groups = range(file.start, file.end or opened.num_row_groups)
        how = check_pages(opened, file.path, groups, columns, file.largest)
    rows = max(1, min(ROWS, file.largest // max(1, how.longest)))
    for wary, run in groupby(groups, how.wary.__contains__):
        with pq.ParquetFile(file.path, read_dictionary=how.texts if wary else None) as opened:
            for some in ([group] for group in run) if wary else [list(run)]:
                for batch in opened.iter_batches(batch_size=1 if wary else rows, row_groups=some, columns=columns, use_threads=False):
                    yield from _rows(batch, file.largest)


def cut_groups(path: Path, size: int) -> list[tuple[int, int]]:
    """Row groups of a Parquet file, in runs of about `size` bytes. Raises ArrowInvalid."""
    ends, packed, groups = [0], 0, read_footer(path)
    for number, group in enumerate(groups, 1):
        packed += sum(chunk.packed for chunk in group.chunks)
        if packed >= size or number == len(groups):
            ends.append(number)
            packed = 0
    return list(pairwise(ends)) or [(0, 0)]


def read_arrow(file: File) -> Iterator[Any]:
    """Rows of an Arrow file or stream. A file is read as the stream that it holds. Raises Bomb."""
    check_buffers(file.path, file.largest)
    with pa.memory_map(str(file.path)) as source:
        opened = pa.ipc.open_stream(open_arrow(source, file.path))
        names = opened.schema.names
        columns = _columns(names, file.field)
        for batch in opened:
            if not columns or columns == list(KEPT):
                yield Reason.of(f"no field {file.field!r}", f"columns {', '.join(names)}", documents=max(1, batch.num_rows))
            else:
                yield from _rows(batch.select(columns), file.largest)


def _columns(names: list[str], field: str) -> list[str]:
    """The columns that hold the text and the meta."""
    wanted = [field] if field in names else [part if part in names else part.partition(".")[0] for part in field.split(",")]
    return [name for name in dict.fromkeys([*wanted, *KEPT]) if name in names]


def _rows(batch: pa.RecordBatch, largest: int) -> Iterator[Any]:
    """Rows, each converted when it is asked for. One that is not UTF-8 loses only itself."""
    try:
        _validate(batch)
    except pa.ArrowException:
        yield Reason.of("damaged row", documents=max(1, batch.num_rows))
        return
    heavy = sum(map(weigh, batch.columns)) > largest
    for n in range(batch.num_rows):
        try:
            if heavy and any(weight(column[n]) > largest for column in batch.columns):
                yield Reason(too_long(largest))
            else:
                yield {name: column[n].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        except UnicodeDecodeError:
            yield Reason("not UTF-8")
        except (pa.ArrowException, ValueError, OverflowError):  # a date beyond the calendar, say
            yield Reason("damaged row")


def _validate(batch: pa.RecordBatch) -> None:
    """Check that all offsets lie inside; texts that are not UTF-8 are found when they are converted. Raises ArrowException."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        pa.Table.from_batches([batch]).cast(pa.schema([pa.field(one.name, _bare(one.type)) for one in batch.schema])).validate(full=True)


def _bare(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in place of texts."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.binary() if pa.types.is_string(kind) else pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(one.name, _bare(one.type)) for one in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(_bare(kind.value_type))
    return kind


# ---- text -------------------------------------------------------------------------------------------------------


def read_whole(file: File) -> Iterator[Any]:
    """A text file as one document, with its name as the source."""
    with open_utf8(file.path, file.encoding, file.largest) as opened:
        text = opened.read(file.largest + 1)
    if len(text) > file.largest:
        yield Reason.of(too_long(file.largest), file=True)
        return
    yield {file.field: text.decode(), "source": file.name}


IMPORTERS: dict[str, Importer] = {  # kind (kinds.py) -> its reader
    "JSON": read_json,
    "table": read_table,
    "Parquet": read_parquet,
    "Arrow": read_arrow,
    "text": read_whole,
}
