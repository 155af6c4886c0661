"""The table of the kinds of records, and the functions that read them."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from elmwood.errors import BadRecord, NewerRecord
from elmwood.records.base import FORMAT, Record
from elmwood.records.merges import Merged, Mixture, State
from elmwood.records.models import Ensemble, Expert, Forest, Seed, Statistics
from elmwood.records.results import Comparison, Contest, Ledger, Score, Verdict
from elmwood.records.text import Corpus, Packing, Partition

KINDS: dict[str, type[Record]] = {
    cls.model_fields["kind"].default: cls
    for cls in (
        Corpus, Packing, Partition, Seed, Expert, Statistics, Forest, Ensemble, Score, Comparison, Contest, Verdict, Ledger, State, Merged,
        Mixture,
    )
}  # fmt: skip


def parse(data: bytes) -> Record:
    """Bytes -> record. Raises BadRecord, NewerRecord."""
    try:
        fields = json.loads(data)
        kind, version = fields["kind"], fields["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadRecord(f"not a record ({error}): expected a JSON object with 'kind' and 'format'") from error
    if isinstance(version, int) and version > FORMAT:
        raise NewerRecord(f"record format {version}, this elmwood reads up to {FORMAT}: upgrade elmwood")
    if kind not in KINDS:
        raise BadRecord(f"unknown record kind {kind!r}; have {', '.join(sorted(KINDS))}")
    try:
        record = KINDS[kind].model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or kind
        raise BadRecord(f"{kind} record: {where}: {first['msg']}") from error
    record.__dict__["digest"] = hashlib.sha256(data).hexdigest()  # of the saved bytes: JSON in an older form keeps it
    return record


_DIGEST = re.compile(r"^(sha256:)?[0-9a-f]{64}$")


def references(record: Record) -> Iterator[str]:
    """All digests that a record names, without repeats: bare hex for records, `sha256:…` for blobs."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            if _DIGEST.match(value):
                yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from walk(item)

    # the `order` of a contest looks like a digest but is none
    yield from dict.fromkeys(walk(record.model_dump(mode="json", exclude={"order"} if isinstance(record, Contest) else None)))
