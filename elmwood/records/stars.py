"""Records of one seed that several machines train together: a star and the versions of its weights, and the plan of trusted sites."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from elmwood.records.base import Blob, Digest, Frozen, Record
from elmwood.records.models import Recipe

# a public key, spelled so that nobody takes it for the digest of a record
Key = Annotated[str, StringConstraints(pattern=r"^ed25519:[0-9a-f]{64}$")]


class OuterStep(Frozen):
    """How deltas become the next version: v = momentum v + d; weights + rate (d + momentum v), d the mean delta (arXiv:2311.08105)."""

    rate: float = Field(gt=0, le=2)
    momentum: float = Field(ge=0, lt=1)
    stale: float = Field(ge=0)  # a delta weighs tokens / (1 + stale * versions that it is behind)
    most_stale: int = Field(ge=0)  # older ones are refused
    apart: bool  # of matrices that embed nothing: average norms and directions apart


class Star(Record):
    """The plan of a star: everything that decides what a proposal is, and what becomes of accepted ones."""

    kind: Literal["star"] = "star"
    name: str
    seed: Digest
    corpus: Digest
    recipe: Recipe  # of the inner steps; `steps`: of one machine over all versions, which the learning rate follows
    steps: int = Field(gt=0)  # inner steps of a proposal
    parts: int = Field(gt=0)  # document d belongs to part d modulo parts; one machine at a time has a part
    form: Literal["int8", "int4", "top"]  # of deltas as they are sent
    outer: OuterStep

    @property
    def tokens(self) -> int:
        """Of one proposal."""
        return self.steps * self.recipe.batch * self.recipe.length


class Fate(Frozen):
    """What became of a proposal."""

    proposal: str  # its id, which is that of its grant
    worker: Key
    blob: Blob | None = None  # the delta as sent; None: refused at the door
    base: int = Field(ge=0)  # the version it began at
    tokens: int = Field(ge=0)
    fate: Literal["applied", "rejected"]
    code: str = ""  # why it was rejected
    scale: float = Field(1.0, ge=0)  # of an applied one: the factor of its delta; below 1 its norm was cut to the median


class Version(Record):
    """One version of a star's weights. Each names its parent, so the chain can be computed again, to the same bytes."""

    kind: Literal["version"] = "version"
    star: Digest
    number: int = Field(ge=0)
    parent: Digest | None = None
    weights: Blob  # model.safetensors
    velocity: Blob | None = None  # of the outer step; None: zero
    step: Blob | None = None  # what the weights are the parent's plus, in 8 bits a value; None: nothing
    error: Blob | None = None  # what the codes of all steps so far left out, which the next step adds; None: zero
    how: Literal["start", "mean", "median", "none"] = "mean"
    fates: tuple[Fate, ...] = ()  # of all proposals decided since the parent, by id
    lost: int = Field(0, ge=0)  # tokens of grants that ended without a proposal since the parent


class Diloco(Record):
    """The plan of a seed that trusted sites train by DiLoCo (arXiv:2311.08105) or Streaming DiLoCo (arXiv:2501.18512)."""

    kind: Literal["diloco"] = "diloco"
    seed: Digest
    corpus: Digest
    recipe: Recipe  # of the inner steps; `batch`: rows of all sites together, `steps`: of one site over all rounds
    sites: int = Field(ge=2, le=16)
    steps: int = Field(gt=0)  # inner steps from one exchange of a weight to its next
    fragments: int = Field(1, gt=0)  # exchanged one after the other, each after steps / fragments more steps
    delay: int = Field(0, ge=0)  # inner steps during which an exchange goes on
    keep: float = Field(0.0, ge=0, lt=1)  # share of a site's own weights in what it goes on with after an exchange
    rate: float = Field(0.7, gt=0, le=2)  # of the outer step, as in `OuterStep`
    momentum: float = Field(0.9, ge=0, lt=1)

    @property
    def apart(self) -> int:
        """Inner steps of a round: from one exchange to the next."""
        return self.steps // self.fragments

    @property
    def tokens(self) -> int:
        """Of one site in one round."""
        return self.apart * self.recipe.batch // self.sites * self.recipe.length

    @property
    def rounds(self) -> int:
        return self.recipe.steps // self.apart
