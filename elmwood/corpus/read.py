"""Documents out of files and data sets, one at a time. What cannot be read is counted with its reason, never a crash.

A source is one string:
    sample                           the corpus that comes with elmwood
    datasets:NAME[:CONFIG[:SPLIT]]   a data set of the `datasets` library, streamed; the split is `train` unless given
    FILE.jsonl[.gz|.xz|.zst]         one JSON object a line
    FILE.parquet                     one row a document
    FILE                             any other file is one document
    FOLDER                           all of these below it, but nothing hidden
"""

import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from elmwood.errors import BadCorpus
from elmwood.registry import require

SAMPLE = Path(__file__).parent / "sample" / "sample-corpus.jsonl.xz"
LINES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
KEPT = ("source", "licence")  # fields carried along as meta: for reports and credit, never an input of clustering
_WORD = re.compile(r"\w")
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)  # a file cut short or damaged


class Document(NamedTuple):
    """A text and what its source says of it."""

    text: str
    meta: Mapping[str, str] = MappingProxyType({})

    @property
    def id(self) -> str:
        """32 hex digits of the text's sha256."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]


class Reason(str):
    """Why there is no document where one should be."""


def read(source: str, rejected: Counter[str], *, field: str = "text") -> Iterator[Document]:
    """The documents of one source, streamed; `field` holds the text in JSON lines, Parquet and data sets.

    `rejected` counts what was left out, by reason. Raises BadCorpus when the source does not exist or yields nothing.
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
            f"{source}: a corpus needs text, and no document was found here ({reasons or 'it is empty'}); check the path and --field"
        )


def files(source: str) -> list[Path]:
    """The files of a source, sorted: none for a data set of the `datasets` library. Raises BadCorpus when it does not exist."""
    if source == "sample":
        return [SAMPLE]
    if source.startswith("datasets:"):
        return []
    path = Path(source)
    if path.is_dir():
        visible = (file for file in path.rglob("*") if not any(part.startswith(".") for part in file.relative_to(path).parts))
        return sorted(file for file in visible if file.is_file())
    if not path.is_file():
        raise BadCorpus(f"{source}: no such file or folder; a corpus is a file, a folder, 'sample' or 'datasets:NAME'")
    return [path]


def _texts(source: str, rejected: Counter[str], field: str) -> Iterator[Any]:
    """Objects that should hold a text, before any check: fields, or a Reason."""
    if source.startswith("datasets:"):
        yield from _dataset(source, field)
        return
    root = Path(source)
    for path in files(source):
        try:
            if path.name.endswith(LINES):
                yield from _lines(path)
            elif path.suffix == ".parquet":
                yield from _rows(path, field)
            else:
                yield _whole(path, root, field)
        except _BROKEN as error:
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, gzip.BadGzipFile):
                raise BadCorpus(f"{path}: cannot be read ({error.strerror}); give read permission or leave it out") from error
            rejected["damaged file"] += 1


def _document(item: Any, rejected: Counter[str], field: str) -> Document | None:
    """A document, or None with its reason counted."""
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
    """JSON can spell half a surrogate pair, which no UTF-8 can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open(path: Path) -> Any:
    """A binary file whose lines can be read, decompressed as its name says."""
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(path, compression="zstd"))  # type: ignore[type-var]  # a NativeFile reads as a RawIOBase does
    return path.open("rb")


def _lines(path: Path) -> Iterator[Any]:
    """JSON lines. A line that is no JSON (the last one of a file cut short, say) is a reason."""
    with _open(path) as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                yield json.loads(line.removeprefix(b"\xef\xbb\xbf").decode() if number == 0 else line.decode())
            except UnicodeDecodeError:
                yield Reason("not UTF-8")
            except (ValueError, RecursionError):
                yield Reason("not JSON")


def _rows(path: Path, field: str) -> Iterator[Any]:
    """Rows of a Parquet file, a thousand at a time."""
    with pq.ParquetFile(path) as file:
        names = set(file.schema_arrow.names)
        columns = [name for name in (field, *KEPT) if name in names]
        if field not in names:
            yield from ({} for _ in range(file.metadata.num_rows))
            return
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            yield from batch.to_pylist()


def _whole(path: Path, root: Path, field: str) -> Any:
    """A file as one document, named by its place in the folder."""
    with path.open("rb") as file:
        if b"\0" in (head := file.read(8192)):
            return Reason("not text")
        try:
            text = (head + file.read()).decode("utf-8-sig")
        except UnicodeDecodeError:
            return Reason("not UTF-8")
    return {field: text, "source": path.relative_to(root).as_posix() if root.is_dir() else path.name}


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
