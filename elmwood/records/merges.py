"""Records of merges and mixtures."""

from typing import Literal

from pydantic import Field

from elmwood.records.base import Blob, Digest, Files, Frozen, Record
from elmwood.records.models import Point, Recipe


class Share(Frozen):
    """The weight of an expert in a merge, for some tensors. Several values are interpolated over the layers."""

    tensors: str = ""  # part of the tensor's name; empty: all tensors
    layers: tuple[int, int] | None = None  # from, and up to but excluding; None: all, and tensors outside of layers
    values: tuple[float, ...] = Field(min_length=1)


class Contribution(Frozen):
    """The part of one expert in a sum."""

    expert: Digest
    weight: tuple[Share, ...]  # the first that matches a tensor applies
    whole: bool  # a full checkpoint; else an adapter
    reach: int  # bound on the magnitude of the integers it added (of wide sums: 2^22 times that), to detect overflow in advance
    statistics: Digest | None = None  # those that the rule used


class State(Record):
    """The unfinished sum of some experts under a merge rule. States add and subtract exactly, in any order."""

    kind: Literal["state"] = "state"
    seed: Digest
    method: str
    settings: dict[str, float]  # of the rule, as far as they affect the sum
    part: tuple[int, int] = (0, 1)  # (i, n): the i-th of n parts of each tensor's blocks
    contributions: tuple[Contribution, ...]  # sorted by expert
    files: Files  # sums.safetensors: "<tensor>|<field>" int64, in units of 2^-44


class Merged(Record):
    """Experts of one seed merged to a single checkpoint, or adapters merged to a single adapter."""

    kind: Literal["merged"] = "merged"
    seed: Digest
    method: str
    settings: dict[str, float]
    contributions: tuple[Contribution, ...]
    files: Files  # a transformers checkpoint folder with a model card, or a PEFT adapter folder
    error: float | None = None  # adapters only: relative Frobenius distance from the exact sum of the experts' deltas
    layers: dict[str, Digest] = {}  # layers taken from different merges: number of the layer, or "outside" -> Merged


class Gates(Frozen):
    """The initial gates of a mixture: a row of the table of gates, and its settings."""

    kind: str = "random"
    top_k: int = Field(2, gt=0)
    scale: float = Field(1.0, ge=0)  # factor of all rows
    seed_bias: float | None = None  # added to the logit of the seed's own feed-forward block; None: it is not an expert
    rng_seed: int = 0


class Mixture(Record):
    """Experts of one seed as the experts of mixture-of-experts layers (BTX, arXiv:2403.07816)."""

    kind: Literal["mixture"] = "mixture"
    seed: Digest
    forest: Digest
    experts: tuple[Digest, ...]  # in the order of every layer; the seed's digest is its own feed-forward block
    gates: Gates
    layout: Literal["checkpoint", "low-rank"] = "checkpoint"
    method: str = "average"  # of the shared tensors: a row of the table of merge rules, or "seed"
    settings: dict[str, float] = {}
    contributions: tuple[Contribution, ...] = ()  # to the shared tensors; empty if these are the seed's
    parent: Digest | None = None  # the mixture that this one was tuned from, or had an expert more than it
    removed: tuple[Digest, ...] = ()  # experts that were removed, in this order
    data: tuple[Blob, ...] = ()  # the shards it was tuned on
    recipe: Recipe | None = None
    curve: tuple[Point, ...] = ()
    files: Files  # checkpoint: a transformers folder; low-rank: mixture.safetensors and mixture.json, without the seed
