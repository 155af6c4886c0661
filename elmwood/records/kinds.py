"""The table of the kinds of records, and the functions that read them."""

import hashlib
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from elmwood.errors import BadRecord, NewerRecord
from elmwood.records.base import FORMAT, Record
from elmwood.records.merges import Merged, Mixture, State
from elmwood.records.models import Ensemble, Expert, Forest, Seed, Statistics
from elmwood.records.plain_json import parse_json
from elmwood.records.results import Comparison, Contest, Ledger, Score, Verdict
from elmwood.records.stars import Diloco, Star, Version
from elmwood.records.text import Corpus, Packing, Partition

KINDS: dict[str, type[Record]] = {
    cls.model_fields["kind"].default: cls
    for cls in (
        Corpus, Packing, Partition, Seed, Expert, Statistics, Forest, Ensemble, Score, Comparison, Contest, Verdict, Ledger, State, Merged,
        Mixture, Star, Version, Diloco,
    )
}  # fmt: skip


INTEGERS = 1 << 64  # numbers of a record are smaller: floats and int64 hold what they count
LARGEST = 64 << 20  # bytes of a record: a corpus of half a million shards


def parse(data: bytes) -> Record:
    """Bytes -> record. Raises BadRecord, NewerRecord."""
    try:
        fields = parse_json(data, LARGEST, integers=INTEGERS)
        kind, version = fields["kind"], fields["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadRecord(f"not a record ({error}): expected a JSON object with 'kind' and 'format'") from error
    if type(version) is not int or version < 1:
        raise BadRecord(f"not a record (its format is {_shorten(version)}): expected a whole number from 1")
    if version > FORMAT:
        raise NewerRecord(f"record format {_shorten(version)}, this elmwood reads up to {FORMAT}: upgrade elmwood")
    if not isinstance(kind, str) or kind not in KINDS:
        raise BadRecord(f"unknown record kind {_shorten(kind)}; have {', '.join(sorted(KINDS))}")
    try:
        record = KINDS[kind].model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or kind
        raise BadRecord(f"{kind} record: {_shorten(where)[1:-1]}: {first['msg']}") from error
    record.__dict__["digest"] = hashlib.sha256(data).hexdigest()  # of the saved bytes: JSON in an older form keeps it
    return record


def read_record(path: Path) -> Record:
    """The record in a file from elsewhere, named by its canonical digest however it is spelled, so that the store that adds it writes
    the bytes that this digest is of. Raises BadRecord, NewerRecord.
    """
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
            raise BadRecord(f"{path} is no regular file of at most {LARGEST} bytes: fetch it again")
        data = path.read_bytes()
    except OSError as error:
        raise BadRecord(f"{path} cannot be read ({error.strerror}): fetch it again") from error
    try:
        return parse(data).model_copy()
    except BadRecord as error:
        raise type(error)(f"{path}: {error}") from error


def _shorten(value: Any) -> str:
    """A stranger's value for a message: escaped, and not long."""
    return repr(value if isinstance(value, str | int) else type(value).__name__)[:100]


_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{64}")


def references(record: Record) -> Iterator[str]:
    """All digests that a record names, without repeats: bare hex for records, `sha256:…` for blobs."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            if _DIGEST.fullmatch(value):
                yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from walk(item)

    # the `order` of a contest looks like a digest but is none
    yield from dict.fromkeys(walk(record.model_dump(mode="json", exclude={"order"} if isinstance(record, Contest) else None)))
