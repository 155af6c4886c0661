"""Records of models: recipes, seeds, experts, forests and ensembles."""

import math
from typing import Literal

from pydantic import Field, field_validator

from elmwood.records.base import Blob, Digest, Files, Frozen, Record

DECAY = 0.2  # share of the steps after the warm-up in which a WSD schedule comes down (arXiv:2404.06395 finds 10-20 % enough)


class Recipe(Frozen):
    """How a model is trained: everything that determines the resulting bytes, and nothing else."""

    method: Literal["full", "lora", "qlora", "dora", "router"] = "full"
    steps: int = Field(gt=0)
    batch: int = Field(8, gt=0)  # sequences per optimiser step
    length: int = Field(256, gt=1)  # tokens per sequence
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = Field(0.05, ge=0, le=1)  # as a share of the steps
    final: float = Field(0.1, ge=0, le=1)  # learning rate at the end, as a share of the peak
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # gradients are clipped to this norm
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"
    accumulate: int = Field(1, gt=0)  # passes per step, whose gradients are added
    checkpointing: bool = False  # recompute activations in the backward pass instead of storing them
    checkpointed: float = Field(1.0, gt=0, le=1)  # with checkpointing: the share of the layers that do so, counted from the first
    patience: int | None = None  # stop after so many validations without improvement, and keep the best weights; None: never stop early
    rank: int = Field(16, gt=0)  # adapters only
    alpha: float | None = None  # adapters only; None: rank-stabilised, the scale of arXiv:2312.03732
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"  # adapters only: endings of module names
    late: float = Field(1.0, gt=0, le=1)  # adapters only: the share of the layers with adapters, counted from the last
    together: int = Field(1, gt=0)  # adapters trained at once over one base; changes the order of float sums
    tuned: Literal["routers", "norms", "shared", "everything"] = (
        "routers"  # router only: what is trained; each value includes those before it
    )
    balance: float = Field(0.0, ge=0)  # router only: weight of the load-balancing loss
    rng_seed: int = 0
    threads: int = 1  # CPU threads; part of the recipe because they change the order of float sums

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length

    @property
    def stable(self) -> int:
        """Steps before the learning rate comes down, for the schedule `wsd`."""
        warm = math.ceil(self.warmup * self.steps)
        return warm + math.floor((1 - DECAY) * (self.steps - warm))


class Point(Frozen):
    """One point of a training curve."""

    step: int
    tokens: int
    loss: float  # nats per token, mean over the steps since the last point
    validation: float | None = None  # on training documents set aside, if the recipe has patience


class Shape(Frozen):
    """The size of a model trained from scratch (a Llama with tied embeddings)."""

    layers: int = Field(gt=0)
    width: int = Field(gt=0)
    heads: int = Field(gt=0)
    feed_forward: int = Field(gt=0)
    vocabulary: int = Field(gt=0)
    context: int = Field(gt=1)  # positions


Use = Literal["generate", "lora", "full", "merge"]


class Portion(Frozen):
    """One of several corpora, and the share of the training rows that are cut from it."""

    corpus: Digest
    weight: float = Field(gt=0, lt=1)


class Seed(Record):
    """The shared starting LM: a transformers checkpoint folder with a tokenizer.json."""

    kind: Literal["seed"] = "seed"
    name: str
    architecture: str  # transformers class name
    parameters: int = Field(ge=0)
    vocabulary: int = Field(gt=0)
    context: int = Field(gt=0)  # positions the model was built for
    separator: int = Field(ge=0)  # token id before each document
    files: Files
    hub: str | None = None  # "id@revision" if the weights are in the hub's cache instead of the store
    source: str | None = None  # "id@revision" on a hub that the files were copied from
    changes: tuple[str, ...] = ()  # what import changed, in sentences; none: the files are as they were given
    licence: str | None = None
    corpus: Digest | None = None  # that it was trained on from scratch; of several the first
    plan: Digest | None = None  # by which several machines went on from another seed
    mix: tuple[Portion, ...] = ()  # all corpora it was trained on, where they are several
    recipe: Recipe | None = None
    run: str | None = None  # the beginning of the task's name, for a run that keeps checkpoints as seeds
    step: int | None = Field(None, gt=0)  # of the recipe's steps, for a seed that was kept before the last one
    curve: tuple[Point, ...] = ()
    grown_from: Digest | None = None  # the merge, or the expert, whose weights it has: the next round of branching begins there
    limits: dict[Use, str] = {}  # what it cannot be used for, and why, as found at its import; a claim, which only ever refuses


class Expert(Record):
    """A model branched from the seed (an ELM, arXiv:2208.03306), or a control trained on all domains (`domain` is None)."""

    kind: Literal["expert"] = "expert"
    seed: Digest
    partition: Digest | None = None
    domain: int | None = Field(None, ge=0)
    data: tuple[Blob, ...]  # the shards it was trained on
    recipe: Recipe
    files: Files  # full: a transformers checkpoint folder; lora: a PEFT adapter folder
    curve: tuple[Point, ...] = ()
    contributor: str | None = None
    probe: tuple[float, ...] = Field((), max_length=64)  # of a LoRA adapter: what it says after a fixed text, nats (lm/probe.py)


class Statistics(Record):
    """Statistics of an expert on its own text, with which others can merge it without that text."""

    kind: Literal["statistics"] = "statistics"
    expert: Digest
    rows: int = Field(gt=0)  # sequences of the expert's training text
    tokens: int = Field(gt=0)
    fisher: float = Field(ge=0)  # mean squared gradient over all parameters
    files: Files  # statistics.safetensors: "gram|<tensor>" [I, I], mean over tokens; "fisher|<tensor>", mean over rows


class Forest(Record):
    """A seed, a partition and a set of experts, sorted by digest so that sums do not depend on their order."""

    kind: Literal["forest"] = "forest"
    seed: Digest
    partition: Digest
    experts: tuple[Digest, ...]

    @field_validator("experts")
    @classmethod
    def _sorted(cls, experts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(experts)))


class Ensemble(Record):
    """A sparse mixture of a forest's next-token probabilities, or of its adapters' weights."""

    kind: Literal["ensemble"] = "ensemble"
    forest: Digest
    router: str = "centroid"
    top_k: int = Field(2, gt=0)
    temperature: float = Field(0.1, gt=0)
    seed_distance: float | None = None  # squared distance of the seed as a candidate; None: it is none
    # weights: one pass, with the adapters summed for each prompt; activated: outputs of experts that act from the end of the prompt on
    mixing: Literal["outputs", "weights", "activated"] = "outputs"
    block: int = Field(64, gt=0)  # `weights` and `activated`: tokens scored as after a prompt, before those read are the prompt of others
    memory: float = Field(0.1, ge=0)  # router `live`: weight of the log-likelihood of the text so far in a candidate's score
    decay: float = Field(0.98, gt=0, le=1)  # router `live`: factor of that log-likelihood after each token
    every: int = Field(1, gt=0)  # tokens between two searches for the nearest experts
    shortlist: int | None = Field(None, gt=0)  # nearest experts among which a token's are chosen between searches; None: top_k
    margin: float = Field(0.0, ge=0)  # squared distance by which a newcomer must be nearer than the expert whose place it takes
    sure: float | None = Field(None, gt=0.5, le=1)  # the weight at a search with which a candidate is alone until the next
    far: float | None = Field(None, gt=0)  # squared distance beyond which no expert is run, where the seed is a candidate
    aggregation: Literal["arithmetic", "geometric", "median"] = "arithmetic"  # mixing `outputs`: how probabilities become one
    bounded: tuple[Digest, ...] = ()  # mixing `outputs`: experts on probation, which move odds from the seed's by a bound at most
    bound: float = Field(2.0, gt=0)  # nats

    @property
    def is_sum(self) -> bool:
        """Whether its probabilities are the weighted sums of its candidates', so that their log-likelihoods say all of it."""
        return self.mixing == "outputs" and self.aggregation == "arithmetic" and not self.bounded
