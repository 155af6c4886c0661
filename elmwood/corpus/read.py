"""Read documents from sources, one at a time. What cannot be read is counted with its reason and never a crash."""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from elmwood.corpus.formats import IMPORTERS, KEPT, LARGEST, File, Importer, by_line, cut_groups, too_long
from elmwood.corpus.kinds import kind
from elmwood.corpus.quality import parse_filters, unfit
from elmwood.corpus.sources import SAMPLE, Reason, Source, fetch, files, parse_source, remote, walk
from elmwood.corpus.unpack import DAMAGED, RATIO, Bomb, Window, byte_order_mark, first_bytes, packing, text_encoding
from elmwood.errors import BadCorpus, BadInput, copied_to
from elmwood.registry import lookup, require
from elmwood.units import parse_count

__all__ = ["KEPT", "SAMPLE", "Document", "File", "Reading", "Reason", "Source", "files", "parse_source", "read", "walk"]

_WORD = re.compile(r"\w")


class Document(NamedTuple):
    """A text, and metadata from its source."""

    text: str
    meta: Mapping[str, str] = MappingProxyType({})

    @property
    def id(self) -> str:
        """The first 32 hex digits of the sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]


class Reading(NamedTuple):
    """How sources are read."""

    field: str = "text"  # what holds the text: NAME, a dotted PATH into objects, or several of these with commas
    encoding: str = "utf-8"
    follow_links: bool = False
    largest: int = LARGEST  # bytes of a document, and of the line or row that holds it
    filters: tuple[str, ...] = ()  # of quality and language (quality.py)

    @classmethod
    def of(
        cls, field: str = "text", encoding: str = "utf-8", follow_links: bool = False, largest_document: int | str = LARGEST,
        filters: str = "",
    ) -> "Reading":  # fmt: skip
        """From options as they are typed. Raises BadInput."""
        largest = parse_count(largest_document)
        if not 1 <= largest < 2**31:
            raise BadInput(f"largest-document is {largest}: choose a number of bytes from 1 to 2G, such as 64M")
        return cls(field, text_encoding(encoding), follow_links, largest, parse_filters(filters))


class Part(NamedTuple):
    """A file of a source, or a part of one, or a whole data set: what one task reads."""

    source: str
    path: Path = Path()
    name: str = ""
    odd: str = ""  # why it is not read
    size: int = 0  # bytes of the file
    start: int = 0  # of a part (formats.File)
    end: int = 0
    url: str = ""  # where it is, in an object store
    version: str = ""  # of its content there


def read(source: str, rejected: Counter[str], *, field: str = "text", reading: Reading | None = None) -> Iterator[Document]:
    """The documents of one source, streamed; `field` holds the text in JSON, tables, Parquet, Arrow and data sets.

    `rejected` counts what was left out, by reason. Raises BadCorpus when the source does not exist or has no document; UnknownName.
    """
    before = rejected.copy()
    reading = reading or Reading(field)
    empty = True
    for found in chain.from_iterable(read_part(part, reading) for part in parts(source, reading)):
        if isinstance(found, Reason):
            rejected[found] += found.documents  # the key is the first Reason that is equal, with its place
        else:
            empty = False
            yield found
    if empty:
        refuse_empty(source, rejected - before)


def refuse_empty(source: str, rejected: Counter[str]) -> NoReturn:
    """Say why there is no document. Raises BadCorpus."""
    reasons = "; ".join(f"{count} × {reason}{_where(reason)}" for reason, count in sorted(rejected.items()))
    raise BadCorpus(
        f"{source}: a corpus needs text, and there is no document here ({reasons or 'it is empty'}); check the path, --field and --encoding"
    )


def _where(reason: str) -> str:
    place = getattr(reason, "place", "")
    return f" ({place})" if place else ""


def places(rejected: Counter[str]) -> dict[str, str]:
    """The first file that was left out, by reason."""
    return {str(reason): reason.place for reason in sorted(rejected) if isinstance(reason, Reason) and reason.file}


def parts(source: str, reading: Reading, size: int = 0) -> Iterator[Part]:
    """The parts of a source, in order. `size`: files above so many bytes are cut, where their kind allows it; 0: none. Raises BadCorpus."""
    parsed = parse_source(source)
    if parsed.dataset or source == "datasets:":
        yield Part(source)
        return
    if parsed.url:
        yield from (Part(source, Path(one.url), one.name, size=one.size, url=one.url, version=one.version) for one in remote(parsed.url))
        return
    for path, odd in sorted(walk(source, reading.follow_links)):
        whole = Part(source, path, parsed.name(path), odd, 0 if odd else path.stat().st_size)
        if 0 < size < whole.size and not parsed.importer:
            yield from (whole._replace(start=start, end=end) for start, end in _cuts(path, reading.encoding, size))
        else:
            yield whole


def _cuts(path: Path, encoding: str, size: int) -> list[tuple[int, int]]:
    """Where a file can be cut: plain JSON lines anywhere, Parquet between its row groups; [(0, 0)] for others."""
    try:
        found = kind(path, encoding)
        if found == "Parquet":
            return cut_groups(path, size)
        head = first_bytes(path)
        plain = not packing(first_bytes(path, unpack=False)) and (byte_order_mark(head) or encoding) in ("utf-8", "utf-8-sig")
        if found == "JSON" and plain and by_line(head):
            length = path.stat().st_size
            return [(start, min(start + size, length)) for start in range(0, length, size)]
    except (OSError, *DAMAGED):
        pass  # said when it is read
    return [(0, 0)]


def read_part(part: Part, reading: Reading, scratch: Path | None = None) -> Iterator[Document | Reason]:
    """The documents of a part, and the reasons for those that are not there. Files of object stores are copied to a folder in `scratch`.

    Raises BadCorpus, UnknownName.
    """
    if part.url:
        with tempfile.TemporaryDirectory(dir=scratch) as folder, copied_to(folder, part.url):
            path = Path(folder) / part.name.rpartition("/")[2]
            fetch(part.url, path)
            yield from read_part(part._replace(path=path, url=""), reading)
        return
    if part.odd:
        yield Reason.of(part.odd, part.name, file=True)
        return
    if not part.name:
        yield from (_document(item, reading) for item in _dataset(part.source, reading.field))
        return
    importer = parse_source(part.source).importer
    own: Importer | None = lookup({}, importer, "importer") if importer else None
    file = File(part.path, part.name, reading.field, reading.encoding, reading.largest, part.start, part.end)
    for item in _file(file, own):
        found = _document(item, reading)
        if isinstance(found, Reason):
            found = Reason.of(found, ", ".join(filter(None, (part.name, found.place))), documents=found.documents, file=found.file)
        yield found


def _file(file: File, own: Importer | None) -> Iterator[Any]:
    """What the importer of one file yields; a Reason at the place where a damaged one ends."""
    try:
        found = "" if own else kind(file.path, file.encoding)
        if isinstance(found, Reason):
            yield Reason.of(found, file=True)
            return
        yield from (own or IMPORTERS[found])(file)
    except Bomb:
        yield Reason.of(f"unpacks to more than {RATIO} times its size", file=True)
    except Window as error:
        yield Reason.of(str(error), file=True)
    except UnicodeDecodeError as error:
        yield Reason.of(f"not {error.encoding.upper()}", f"byte {error.start}", file=True)
    except (OSError, MemoryError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, DAMAGED):
            raise BadCorpus(f"{file.path}: cannot be read ({error.strerror}); give read permission or leave it out") from error
        yield Reason.of("damaged file", file=True)


def _document(item: Any, reading: Reading) -> Document | Reason:
    """A document, or why there is none."""
    if isinstance(item, Reason):
        return item
    text = text_of(item, reading.field)
    if text is None:
        return Reason.of(f"no field {reading.field!r}", f"fields {', '.join(map(str, item))}"[:200] if isinstance(item, dict) else "")
    if not isinstance(text, str):
        return Reason(f"field {reading.field!r} is not text")
    if not _WORD.search(text):
        return Reason("no words")
    if (size := _size(text)) is None:
        return Reason("not UTF-8")
    if size > reading.largest:
        return Reason(too_long(reading.largest))
    for name in reading.filters:
        if why := unfit(name, text):
            return Reason(f"{name}: {why}")
    return Document(text, {name: item[name] for name in KEPT if isinstance(item.get(name), str) and _size(item[name]) is not None})


def text_of(item: Any, field: str) -> Any:
    """The text in a field: None if there is none; what is not text is returned as it is.

    A field is a name; else a dotted path into objects; else several of these, with commas, whose texts are joined by empty lines.
    Chat messages become one text, by `transcript`.
    """
    value = _at(item, field)
    if value is None and "," in field:
        parts = [text_of(item, part.strip()) for part in field.split(",")]
        if any(part is not None and not isinstance(part, str) for part in parts):
            return parts
        return "\n\n".join(part for part in parts if part) or (None if all(part is None for part in parts) else "")
    return transcript(value) if isinstance(value, list | dict) else value


def _at(item: Any, path: str) -> Any:
    if not isinstance(item, dict):
        return None
    if path in item or "." not in path:
        return item.get(path)
    parts = path.split(".")
    heads = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    head = next((head for head in heads if head in item), None)
    return None if head is None else _at(item[head], path.removeprefix(f"{head}."))


def transcript(messages: Any) -> Any:
    """A conversation as plain text: `role: content` of each message, with empty lines between. What is no conversation stays as it is.

    A message has `role` and `content`, or `from` and `value`; content is text, or parts of which those with `text` count. Nothing of the
    seed's chat template is used: a corpus is built before a seed is chosen.
    """
    if isinstance(messages, dict):  # of columns, as `datasets` keeps a list of objects
        if not messages or not all(isinstance(column, list) for column in messages.values()):
            return messages
        messages = [dict(zip(messages, row, strict=False)) for row in zip(*messages.values(), strict=False)]
    if not all(isinstance(one, dict) and {"content", "value"} & set(one) for one in messages):
        return messages
    said = [(one.get("role", one.get("from")), _content(one.get("content", one.get("value")))) for one in messages]
    return "\n\n".join(f"{role}: {content}" if role else content for role, content in said if content)


def _content(content: Any) -> str:
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _size(text: str) -> int | None:
    """Bytes as UTF-8; None for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None


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
        yield from rows.select_columns(columns) if field in columns else rows
    except (OSError, ValueError, RuntimeError) as error:
        raise BadCorpus(f"{source}: {error}; check the name, the split and the network") from error
