"""The base of all records: a frozen value with one canonical JSON form, named by the digest of its content."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, StringConstraints

from elmwood.errors import BadRecord

FORMAT = 1  # increased when an older elmwood would misread new records

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]  # of a record
Blob = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]  # of bytes in the store
Files = dict[str, Blob]  # relative path -> blob: a folder that other tools can read


class Frozen(BaseModel):
    """A value: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def canonical(value: Frozen) -> bytes:
    """The canonical JSON of a value: sorted keys, no spaces, UTF-8, without fields that have their default.

    So adding a field with a default changes no existing digest. For the same reason, a default must never change. Raises BadRecord.
    """
    plain = value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Record):
        plain |= {"kind": value.kind, "format": value.format}
    try:
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise BadRecord(
            f"{type(value).__name__} holds NaN, infinity or text that is none: JSON has no such value, so it is not written"
        ) from error


def fingerprint(*values: Any) -> str:
    """sha256 (hex) of JSON values and records. Tasks are named by the fingerprint of their inputs."""
    plain = [json.loads(canonical(value)) if isinstance(value, Frozen) else value for value in values]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


# kind -> the HTML that notebooks show of such a record; `elmwood.report.notebook` fills it
displays: "dict[str, Callable[[Any], str]]" = {}


class Record(Frozen):
    """A value with a kind and a digest. `format` is the format of records it was written in."""

    kind: str
    format: int = FORMAT

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(canonical(self)).hexdigest()

    def _repr_html_(self) -> str | None:
        draw = displays.get(self.kind)
        return draw(self) if draw else None  # None: the notebook shows the text

    def model_copy(self, **changes: Any) -> Self:
        """As in pydantic, but the copy computes its own digest."""
        copy = super().model_copy(**changes)
        copy.__dict__.pop("digest", None)
        return copy
