"""Records of merges and mixtures."""

from typing import Literal

from pydantic import Field

from elmwood.records.base import Blob, Digest, Files, Frozen, Record
from elmwood.records.models import Point, Recipe


class Share(Frozen):
    """A weight in a merge, for the tensors it fits. Several values are a gradient over depth."""

    tensors: str = ""  # part of a tensor's name; empty: all
    layers: tuple[int, int] | None = None  # from, up to but without; None: all, and what stands outside of layers
    values: tuple[float, ...] = Field(min_length=1)


class Contribution(Frozen):
    """What one expert brought to a sum."""

    expert: Digest
    weight: tuple[Share, ...]  # the first that fits a tensor counts
    whole: bool  # a full checkpoint; otherwise an adapter
    reach: int  # no number it added is of a larger magnitude (wide ones: than 2^22 times it): so an overflow is seen before it happens
    statistics: Digest | None = None  # what the rule took from its text


class State(Record):
    """The sum of some experts under a merge rule, before it is finished: states add and subtract exactly, in any order."""

    kind: Literal["state"] = "state"
    seed: Digest
    method: str
    settings: dict[str, float]  # those that decide the sum
    part: tuple[int, int] = (0, 1)  # the (i, n)-th share of every tensor's blocks
    contributions: tuple[Contribution, ...]  # sorted by expert
    files: Files  # sums.safetensors: "<tensor>|<field>" int64, in units of 2^-44


class Merged(Record):
    """Experts of one seed as a single checkpoint, or adapters as a single adapter."""

    kind: Literal["merged"] = "merged"
    seed: Digest
    method: str
    settings: dict[str, float]
    contributions: tuple[Contribution, ...]
    files: Files  # a transformers checkpoint folder with a model card; of adapters merged to one, a PEFT adapter folder
    error: float | None = None  # of an adapter: relative Frobenius distance from the exact sum of the experts' deltas
    layers: dict[str, Digest] = {}  # where each layer was taken from a merge of its own: layer, or "outside" -> Merged


class Gates(Frozen):
    """How a mixture's experts are chosen at first: a row of the table of gates, and its settings."""

    kind: str = "random"
    top_k: int = Field(2, gt=0)
    scale: float = Field(1.0, ge=0)  # what all rows are multiplied by
    seed_bias: float | None = None  # added to the logit of the seed's own feed-forward; None: it is no expert
    rng_seed: int = 0


class Mixture(Record):
    """Experts of one seed as the experts of mixture-of-experts layers (BTX, arXiv:2403.07816)."""

    kind: Literal["mixture"] = "mixture"
    seed: Digest
    forest: Digest
    experts: tuple[Digest, ...]  # by their number in every layer; the seed's digest stands for its own feed-forward
    gates: Gates
    layout: Literal["checkpoint", "low-rank"] = "checkpoint"
    method: str = "average"  # of what all share: a row of the table of merge rules, or seed
    settings: dict[str, float] = {}
    contributions: tuple[Contribution, ...] = ()  # to what all share; none where it is the seed's
    parent: Digest | None = None  # the mixture this one was tuned from, or an expert was taken out of
    removed: tuple[Digest, ...] = ()  # experts that were taken out, the last one last
    data: tuple[Blob, ...] = ()  # the shards it was tuned on
    recipe: Recipe | None = None
    curve: tuple[Point, ...] = ()
    files: Files  # checkpoint: a transformers folder; low-rank: mixture.safetensors and mixture.json over the seed
