"""What everybody may read, and what maintainers decide."""

from typing import Annotated, Literal

from pydantic import Field

from elmwood.hub.messages.words import Finite, Id, MemberFault, Natural, Words
from elmwood.records import Digest, Frozen


class Member(Frozen):
    """An expert of a snapshot."""

    expert: Digest
    domain: Natural
    status: Literal["probation", "full"]
    account: Id
    since: Natural  # version of the snapshot that it came with


class Snapshot(Frozen):
    """The shared ensemble after an acceptance or a retirement, signed by the hub key. `parent`: sha256 of the canonical JSON before."""

    run: str
    version: Natural
    parent: Digest | None
    forest: Digest
    ensemble: Digest
    experts: tuple[Member, ...]
    added: Digest | None = None
    removed: tuple[Digest, ...] = ()


class Measurement(Frozen):
    """POST /v1/measurements (verifier keys): what a snapshot's ensemble loses on held-out text, bits per byte."""

    version: Natural
    bits_per_byte: Finite
    standard_error: Finite
    seed_bits_per_byte: Finite
    seed_error: Finite
    documents: Natural
    control_bits_per_byte: Finite | None = None  # dense at equal tokens
    control_error: Finite | None = None
    over_seed: Finite | None = None  # bits per byte better than the seed, paired over documents
    over_seed_error: Finite | None = None
    gain: Finite | None = None  # over the control, paired
    gain_error: Finite | None = None


class Retirement(Frozen):
    """POST /v1/experts/{digest}/retire (admin keys)"""

    reason: Literal["regression", "report", "better-expert", "copy", "withdrawn", "licence", "other"]
    detail: Words = ""
    compensate: bool = False  # take its credit back, by a further entry


class Reason(Frozen):
    """POST /v1/devices/{key}/block (admin keys)"""

    reason: Words


class Appeal(Frozen):
    """POST /v1/appeals: ask a person to look at a verdict."""

    submission: Id
    text: Words


class Decision(Frozen):
    """POST /v1/submissions/{id}/decide (admin keys): queue a quarantined submission again, or reject it."""

    outcome: Literal["verify-again", "reject"]
    code: MemberFault | None = None


class Event(Frozen):
    """A line of the log: ids only. `hash` is sha256 of the canonical JSON of all other fields, with the hash before in `previous`."""

    number: Annotated[int, Field(gt=0)]
    kind: str
    subject: str  # id or digest
    facts: dict[str, str | int | float | None] = {}
    at: Natural  # unix seconds, for people
    previous: str
    hash: Digest


class Credit(Frozen):
    """A line of the ledger, never changed: corrections are further lines."""

    number: Annotated[int, Field(gt=0)]
    account: Id
    amount: float  # bits per byte
    kind: Literal["gain", "compensation"]
    submission: Id
    verdict: Digest
