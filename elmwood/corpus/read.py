"""Read documents from files and data sets, one at a time. What cannot be read is counted with its reason and never a crash.

A source is one string:
    sample                           the corpus that comes with elmwood
    datasets:NAME[:CONFIG[:SPLIT]]   a data set of the `datasets` library, streamed; the split is `train` unless given
    FILE.jsonl[.gz|.xz|.zst]         one JSON object per line
    FILE.parquet                     one document per row
    FILE                             any other file is one document
    FOLDER                           all of these below it, hidden ones excepted
    MODULE:FUNCTION:PATH             a file, or all files below a folder, read by an importer of your own

An importer is a function of a File that yields objects with the text in a field, or a Reason. IMPORTERS has one by ending.
"""

import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from elmwood.errors import BadCorpus
from elmwood.registry import lookup, require

SAMPLE = Path(__file__).parent / "sample" / "sample-corpus.jsonl.xz"
KEPT = ("source", "licence")  # fields kept as meta, for reports and credit; clustering never reads them
_WORD = re.compile(r"\w")
_OWN = re.compile(r"([\w.]+:\w+):(.+)")  # module:function:path
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)  # a file cut short or damaged


class Document(NamedTuple):
    """A text, and metadata from its source."""

    text: str
    meta: Mapping[str, str] = MappingProxyType({})

    @property
    def id(self) -> str:
        """The first 32 hex digits of the sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]


class Reason(str):
    """Why there is no document where one should be."""


class File(NamedTuple):
    """A file to import."""

    path: Path
    name: str  # its path in the folder that is the source, or its file name
    field: str  # the field that holds the text


Importer = Callable[[File], Iterator[Any]]


class Source(NamedTuple):
    """A source, taken apart."""

    root: Path  # a file or a folder; without meaning for a data set
    importer: str = ""  # module:function; empty: by the ending of each file
    dataset: str = ""  # NAME[:CONFIG[:SPLIT]]

    @property
    def repeatable(self) -> bool:
        """Whether the documents depend on the bytes of the files alone, so that a corpus made of them before can be reused."""
        return not self.importer and not self.dataset


def read(source: str, rejected: Counter[str], *, field: str = "text") -> Iterator[Document]:
    """The documents of one source, streamed; `field` holds the text in JSON lines, Parquet and data sets.

    `rejected` counts what was left out, by reason. Raises BadCorpus when the source does not exist or has no document; UnknownName.
    """
    before = rejected.copy()
    empty = True
    for item in _texts(source, rejected, field):
        if (document := _document(item, rejected, field)) is not None:
            empty = False
            yield document
    if empty:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted((rejected - before).items()))
        raise BadCorpus(
            f"{source}: a corpus needs text, and there is no document here ({reasons or 'it is empty'}); check the path and --field"
        )


def parse_source(source: str) -> Source:
    """Take a source apart."""
    if source == "sample":
        return Source(SAMPLE)
    if source.startswith("datasets:"):
        return Source(Path(), dataset=source.removeprefix("datasets:"))
    if (match := _OWN.fullmatch(source)) and not Path(source).exists():
        return Source(Path(match[2]), importer=match[1])
    return Source(Path(source))


def files(source: str) -> list[Path]:
    """The files of a source, sorted: none for a data set of the `datasets` library. Raises BadCorpus when it does not exist."""
    parsed = parse_source(source)
    if parsed.dataset or source == "datasets:":
        return []
    path = parsed.root
    if path.is_dir():
        visible = (file for file in path.rglob("*") if not any(part.startswith(".") for part in file.relative_to(path).parts))
        return sorted(file for file in visible if file.is_file())
    if not path.is_file():
        raise BadCorpus(f"{source}: no such file or folder; a corpus is a file, a folder, 'sample' or 'datasets:NAME'")
    return [path]


def _texts(source: str, rejected: Counter[str], field: str) -> Iterator[Any]:
    """What importers yield, unchecked: mappings, or a Reason."""
    if source.startswith("datasets:"):
        yield from _dataset(source, field)
        return
    parsed = parse_source(source)
    own: Importer | None = lookup({}, parsed.importer, "importer") if parsed.importer else None
    for path in files(source):
        name = path.relative_to(parsed.root).as_posix() if parsed.root.is_dir() else path.name
        importer = own or next(importer for ending, importer in IMPORTERS.items() if path.name.endswith(ending))
        try:
            yield from importer(File(path, name, field))
        except _BROKEN as error:
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, gzip.BadGzipFile):
                raise BadCorpus(f"{path}: cannot be read ({error.strerror}); give read permission or leave it out") from error
            rejected["damaged file"] += 1


def _document(item: Any, rejected: Counter[str], field: str) -> Document | None:
    """A document; None, with the reason counted, if there is none."""
    reason = ""
    if isinstance(item, Reason):
        reason = str(item)
    elif not isinstance(item, dict) or item.get(field) is None:
        reason = f"no field {field!r}"
    elif not isinstance(item[field], str):
        reason = f"field {field!r} is not text"
    elif not _WORD.search(item[field]):
        reason = "no words"
    elif not _encodes(item[field]):
        reason = "not UTF-8"
    if reason:
        rejected[reason] += 1
        return None
    meta = {name: item[name] for name in KEPT if isinstance(item.get(name), str) and _encodes(item[name])}
    return Document(item[field], meta)


def _encodes(text: str) -> bool:
    """JSON can hold half a surrogate pair, which UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open(path: Path) -> Any:
    """A binary file, decompressed as its ending says."""
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(path, compression="zstd"))  # type: ignore[type-var]  # a NativeFile reads as a RawIOBase does
    return path.open("rb")


def read_lines(file: File) -> Iterator[Any]:
    """JSON lines. A line that is not JSON, such as the last one of a truncated file, is a reason."""
    with _open(file.path) as opened:
        for number, line in enumerate(opened):
            if not line.strip():
                continue
            try:
                yield json.loads(line.removeprefix(b"\xef\xbb\xbf").decode() if number == 0 else line.decode())
            except UnicodeDecodeError:
                yield Reason("not UTF-8")
            except (ValueError, RecursionError):
                yield Reason("not JSON")


def read_rows(file: File) -> Iterator[Any]:
    """Rows of a Parquet file, a thousand at a time."""
    with pq.ParquetFile(file.path) as opened:
        names = set(opened.schema_arrow.names)
        columns = [name for name in (file.field, *KEPT) if name in names]
        if file.field not in names:
            yield from ({} for _ in range(opened.metadata.num_rows))
            return
        for batch in opened.iter_batches(batch_size=1000, columns=columns):
            yield from batch.to_pylist()


def read_whole(file: File) -> Iterator[Any]:
    """A text file as one document, with its name as the source."""
    with file.path.open("rb") as opened:
        if b"\0" in (head := opened.read(8192)):
            yield Reason("not text")
            return
        try:
            yield {file.field: (head + opened.read()).decode("utf-8-sig"), "source": file.name}
        except UnicodeDecodeError:
            yield Reason("not UTF-8")


IMPORTERS: dict[str, Importer] = {  # ending -> importer; the first that fits
    ".jsonl": read_lines,
    ".jsonl.gz": read_lines,
    ".jsonl.xz": read_lines,
    ".jsonl.zst": read_lines,
    ".parquet": read_rows,
    "": read_whole,
}


def _dataset(source: str, field: str) -> Iterator[Any]:
    """Rows of a data set, streamed."""
    datasets = require("datasets", "datasets")
    parts = source.split(":")[1:]
    if not parts[0] or len(parts) > 3:
        raise BadCorpus(f"{source!r} is not a data set: write datasets:NAME, datasets:NAME:CONFIG or datasets:NAME:CONFIG:SPLIT")
    name, config, split = [*parts, "", ""][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        columns = [column for column in (field, *KEPT) if column in (rows.column_names or ())]
        yield from rows.select_columns(columns) if columns else rows
    except (OSError, ValueError, RuntimeError) as error:
        raise BadCorpus(f"{source}: {error}; check the name, the split and the network") from error
