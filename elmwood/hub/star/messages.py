"""What a star and its machines say to one another: frozen values, unknown keys refused."""

from pydantic import Field

from elmwood.hub.messages.words import Natural
from elmwood.records import Blob, Digest, Fate, Frozen


class StarReply(Frozen):
    """The plan of a star, and where it is."""

    star: Digest  # of the record of the plan
    name: str
    version: Natural
    versions: Natural  # at the end
    head: Digest  # of the newest version's record
    beat_s: float
    live: Natural  # machines with a grant or a proposal
    waiting: Natural  # proposals
    granted: Natural  # tokens, as are the others
    applied: Natural
    rejected: dict[str, int]
    lost: Natural


class GrantReply(Frozen):
    """A slice of the text: batches from `first` of a part."""

    id: str
    base: Natural  # version
    part: Natural
    first: Natural
    tokens: Natural
    step: Natural


class Beat(Frozen):
    """A sign of life."""

    step: Natural


class Proposal(Frozen):
    """A finished grant."""

    grant: str = Field(max_length=20)
    base: Natural
    blob: Blob  # the delta, uploaded


class Receipt(Frozen):
    """What became of a proposal; `fate` is null while it waits."""

    proposal: str
    fate: Fate | None = None
