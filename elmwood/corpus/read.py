"""Read documents from sources, one at a time. What cannot be read is counted with its reason and never a crash."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from elmwood.corpus.formats import IMPORTERS, KEPT, LARGEST, File, Importer, too_long
from elmwood.corpus.kinds import kind
from elmwood.corpus.sources import SAMPLE, Reason, Source, files, parse_source, walk
from elmwood.corpus.unpack import DAMAGED, RATIO, Bomb, Window, text_encoding
from elmwood.errors import BadCorpus, BadInput
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

    @classmethod
    def of(
        cls, field: str = "text", encoding: str = "utf-8", follow_links: bool = False, largest_document: int | str = LARGEST
    ) -> "Reading":
        """From options as they are typed. Raises BadInput."""
        largest = parse_count(largest_document)
        if not 1 <= largest < 2**31:
            raise BadInput(f"largest-document is {largest}: choose a number of bytes from 1 to 2G, such as 64M")
        return cls(field, text_encoding(encoding), follow_links, largest)


def read(source: str, rejected: Counter[str], *, field: str = "text", reading: Reading | None = None) -> Iterator[Document]:
    """The documents of one source, streamed; `field` holds the text in JSON, tables, Parquet, Arrow and data sets.

    `rejected` counts what was left out, by reason. Raises BadCorpus when the source does not exist or has no document; UnknownName.
    """
    before = rejected.copy()
    reading = reading or Reading(field)
    empty = True
    for item in _texts(source, reading):
        found = _document(item, reading)
        if isinstance(found, Reason):
            rejected[found] += found.documents  # the key is the first Reason that is equal, with its place
        else:
            empty = False
            yield found
    if empty:
        new = sorted((reason, count) for reason, count in (rejected - before).items())
        reasons = "; ".join(f"{count} × {reason}{_where(reason)}" for reason, count in new)
        raise BadCorpus(
            f"{source}: a corpus needs text, and there is no document here ({reasons or 'it is empty'}); "
            "check the path, --field and --encoding"
        )


def _where(reason: str) -> str:
    place = getattr(reason, "place", "")
    return f" ({place})" if place else ""


def places(rejected: Counter[str]) -> dict[str, str]:
    """The first file that was left out, by reason."""
    return {str(reason): reason.place for reason in sorted(rejected) if isinstance(reason, Reason) and reason.file}


def _texts(source: str, reading: Reading) -> Iterator[Any]:
    """What importers yield, unchecked: mappings, or a Reason."""
    if source.startswith("datasets:") and not parse_source(source).root.name:
        yield from _dataset(source, reading.field)
        return
    parsed = parse_source(source)
    own: Importer | None = lookup({}, parsed.importer, "importer") if parsed.importer else None
    for path, odd in sorted(walk(source, reading.follow_links)):
        name = parsed.name(path)
        if odd:
            yield Reason.of(odd, name, file=True)
            continue
        for item in _file(File(path, name, reading.field, reading.encoding, reading.largest), own):
            if isinstance(item, Reason):
                yield Reason.of(item, ", ".join(filter(None, (name, item.place))), documents=item.documents, file=item.file)
            else:
                yield item


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
