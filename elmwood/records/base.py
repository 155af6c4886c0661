"""What every record is: a frozen value with one JSON spelling, named by the digest of its content."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, StringConstraints

FORMAT = 1  # raised when a change of the records would be misread by an older elmwood

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]  # of a record
Blob = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]  # of bytes in the store
Files = dict[str, Blob]  # relative path -> bytes: a folder, as other tools read it


class Frozen(BaseModel):
    """A value: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def canonical(value: Frozen) -> bytes:
    """The one JSON spelling of a value: sorted keys, no spaces, UTF-8; what has its default is left out.

    So a field that is added later, with a default, changes the name of nothing there is; and a default never changes.
    """
    plain = value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Record):
        plain |= {"kind": value.kind, "format": value.format}
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(*values: Any) -> str:
    """sha256 (hex) of JSON values and records: the name of a task is the fingerprint of its inputs."""
    plain = [json.loads(canonical(value)) if isinstance(value, Frozen) else value for value in values]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


# kind -> the HTML that notebooks show of such a record; `elmwood.report.notebook` fills it
displays: "dict[str, Callable[[Any], str]]" = {}


class Record(Frozen):
    """A value with a kind and a digest. `format` is the record format it was written in."""

    kind: str
    format: int = FORMAT

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(canonical(self)).hexdigest()

    def _repr_html_(self) -> str | None:
        draw = displays.get(self.kind)
        return draw(self) if draw else None  # None: the notebook shows the text

    def model_copy(self, **changes: Any) -> Self:
        """As pydantic's, but the copy works out its own digest."""
        copy = super().model_copy(**changes)
        copy.__dict__.pop("digest", None)
        return copy
