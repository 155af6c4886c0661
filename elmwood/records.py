"""The nouns of the house: frozen records, each named by the digest of its content, each naming its inputs by digest.

A bare 64-digit hex string in a record is the digest of another record; `sha256:…` is the digest of a blob. So lineage
is a Merkle DAG that can be walked without knowing the kinds.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from elmwood.errors import BadRecord, NewerRecord

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


class Record(Frozen):
    """A value with a kind and a digest. `format` is the record format it was written in."""

    kind: str
    format: int = FORMAT

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(canonical(self)).hexdigest()

    def model_copy(self, **changes: Any) -> Self:
        """As pydantic's, but the copy works out its own digest."""
        copy = super().model_copy(**changes)
        copy.__dict__.pop("digest", None)
        return copy


# ---- text -------------------------------------------------------------------------------------------------------


class Shard(Frozen):
    """Documents in one Parquet file (zstd; columns id, text, meta)."""

    blob: Blob
    documents: int
    bytes: int  # of UTF-8 text


class Corpus(Record):
    """Documents read, cleaned of duplicates and split by content hash. Nobody trains on the holdout."""

    kind: Literal["corpus"] = "corpus"
    train: tuple[Shard, ...]
    holdout: tuple[Shard, ...]
    documents: int
    bytes: int
    holdout_share: float
    rejected: dict[str, int] = {}  # reason -> documents (or lines) left out
    licences: tuple[str, ...] = ()


class Packing(Record):
    """The tokens of shards under one tokenizer: little-endian memory maps, made once and found again."""

    kind: Literal["packing"] = "packing"
    shards: tuple[Blob, ...]
    tokenizer: Blob  # tokenizer.json
    separator: int  # token id that stands before each document
    tokens: tuple[Blob, ...]  # uint16 or uint32 [T]; none where there are no documents
    starts: tuple[Blob, ...]  # int64 [documents], where each begins
    dtype: Literal["<u2", "<u4"]
    count: int  # T


class Embedder(Frozen):
    """A fitted embedder: a row of the table of embedders, its settings and its files (safetensors + JSON)."""

    name: str
    dimension: int
    files: Files


class Domain(Frozen):
    """One discovered cluster. Its place in the partition is the row of its centroid."""

    name: str
    terms: tuple[str, ...] = ()
    train: tuple[Shard, ...] = ()
    holdout: tuple[Shard, ...] = ()
    examples: tuple[str, ...] = ()  # ids of the documents nearest the centroid
    origin: int | None = None  # its place in the partition's parent, if it was there or came out of one that was

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.train)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.train)


class Partition(Record):
    """All domains of a corpus, with the embedder and the centroids (c-BTM, arXiv:2303.14177)."""

    kind: Literal["partition"] = "partition"
    corpus: Digest
    embedder: Embedder
    centroids: Blob  # safetensors: "centroids" [K, D] float32
    domains: tuple[Domain, ...]
    method: str = "balanced"  # balanced | plain | random
    rng_seed: int = 0
    fit_sizes: tuple[int, ...] = ()  # documents per domain at the fit, where balance holds
    greedy_sizes: tuple[int, ...] = ()  # the same training documents, had each gone to its nearest centroid
    extra: dict[str, float] = {}  # measured facts, e.g. objective
    parent: Digest | None = None  # the partition this one revises: a domain was split, or domains were added


# ---- models -----------------------------------------------------------------------------------------------------


class Recipe(Frozen):
    """How a model is trained: everything that decides the bytes that come out, and nothing else."""

    method: Literal["full", "lora", "qlora", "dora", "router"] = "full"
    steps: int = Field(gt=0)
    batch: int = Field(8, gt=0)  # sequences per optimiser step
    length: int = Field(256, gt=1)  # tokens per sequence
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = Field(0.05, ge=0, le=1)  # share of the steps
    final: float = Field(0.1, ge=0, le=1)  # learning rate at the end, as a share of the peak
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # gradient norm
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"
    accumulate: int = Field(1, gt=0)  # passes the rows of a step are spread over; their gradients are added
    checkpointing: bool = False  # activations are computed again in the backward pass instead of kept
    patience: int | None = None  # checks of the validation loss without a better one before it stops; the best weights are kept
    rank: int = Field(16, gt=0)  # adapters only
    alpha: float | None = None  # adapters only; None: rank-stabilised, scale = sqrt-rank rule of arXiv:2312.03732
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"  # adapters only: module name endings
    late: float = Field(1.0, gt=0, le=1)  # adapters only: the share of the layers, the last ones, that has them
    together: int = Field(1, gt=0)  # adapters trained over one base at once: the order of float sums depends on it
    tuned: Literal["routers", "norms", "shared", "everything"] = "routers"  # router only: what is trained, each with those before it
    balance: float = Field(0.0, ge=0)  # router only: weight of the load-balancing loss
    rng_seed: int = 0
    threads: int = 1  # CPU threads: part of the recipe because the order of float sums depends on it

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length


class Point(Frozen):
    """One point of a training curve."""

    step: int
    tokens: int
    loss: float  # nats per token, mean over the steps since the last point
    validation: float | None = None  # on training documents set apart, where the recipe has patience


class Shape(Frozen):
    """The size of a model made from scratch (a Llama with tied embeddings)."""

    layers: int = Field(gt=0)
    width: int = Field(gt=0)
    heads: int = Field(gt=0)
    feed_forward: int = Field(gt=0)
    vocabulary: int = Field(gt=0)
    context: int = Field(gt=1)  # positions


class Seed(Record):
    """The shared starting LM: a transformers checkpoint folder with a tokenizer.json."""

    kind: Literal["seed"] = "seed"
    name: str
    architecture: str  # transformers class name
    parameters: int
    vocabulary: int
    context: int  # positions the model was built for
    separator: int  # token id that stands before each document
    files: Files
    hub: str | None = None  # "id@revision" where the weights stay in the hub's own cache instead of the store
    licence: str | None = None
    corpus: Digest | None = None  # trained from scratch on it
    recipe: Recipe | None = None
    curve: tuple[Point, ...] = ()


class Expert(Record):
    """A model branched from the seed (an ELM, arXiv:2208.03306), or a control trained on all domains (domain None)."""

    kind: Literal["expert"] = "expert"
    seed: Digest
    partition: Digest | None = None
    domain: int | None = None
    data: tuple[Blob, ...]  # the shards it was trained on
    recipe: Recipe
    files: Files  # full: a transformers checkpoint folder; lora: a PEFT adapter folder
    curve: tuple[Point, ...] = ()
    contributor: str | None = None


class Statistics(Record):
    """What an expert leaves beside its weights, so that others can merge it without its text."""

    kind: Literal["statistics"] = "statistics"
    expert: Digest
    rows: int  # of the expert's own training documents
    tokens: int
    fisher: float  # the mean squared gradient over all weights
    files: Files  # statistics.safetensors: "gram|<tensor>" [I, I], means over tokens; "fisher|<tensor>", means over rows


class Forest(Record):
    """A seed, a partition and a set of experts, sorted by digest so that order never changes a sum."""

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
    seed_distance: float | None = None  # the seed as a candidate at this squared distance; None: not a candidate
    mixing: Literal["outputs", "weights"] = "outputs"  # weights: adapters summed anew for each prompt, one pass
    block: int = Field(64, gt=0)  # mixing weights: tokens scored with the weights of the prompt before them


class Score(Record):
    """Log-likelihoods of held-out tokens under one model: scored once, by anyone, for everyone."""

    kind: Literal["score"] = "score"
    model: Digest
    holdout: str  # "holdout-" + fingerprint of its tokens and windows
    protocol: str
    loglik: Blob  # safetensors: "loglik" [N] float16 (float32 in older ones), nats; "windows", which, where it is not all
    tokens: int
    nats: float  # minus the sum
    windows: int | None = None  # how many of the holdout's; None: all


class Row(Frozen):
    """One line of a comparison. Losses are bits per byte on the test half of the holdout."""

    name: str
    bits_per_byte: float
    standard_error: float
    perplexity: float  # per token
    gain: float | None = None  # bits per byte better than the strongest dense control, paired
    gain_error: float | None = None  # its standard error
    domains: tuple[float | None, ...] = ()  # bits per byte per domain; None where the test half has no document of it
    macro: float | None = None  # mean of `domains`: each counts alike, however much text it has
    batch: int | None = None  # sequences per step
    steps: int | None = None
    tokens: int | None = None  # further training tokens, all machines together
    machine_seconds: float | None = None  # summed over machines
    wall_seconds: float | None = None  # if every machine works at once
    role: Literal["seed", "control", "result", "bound"] = "result"


class Comparison(Record):
    """A table of models on one holdout: the result and every control beside it."""

    kind: Literal["comparison"] = "comparison"
    forest: Digest | None = None
    controls: tuple[Digest, ...] = ()  # the other models of the table, for the lineage
    holdout: str
    rows: tuple[Row, ...]
    routing: tuple[tuple[float, ...], ...] = ()  # [domain of the document][expert] mean weight; the last column is the seed
    fitted: dict[str, float] = {}  # temperature, seed distance, ... chosen on the tune half
    chosen: str | None = None  # name of the row with the least loss on the tune half: the result, before the test half was seen
    growth: tuple[tuple[float, float], ...] = ()  # bits per byte and its error with 1, 2, ... experts, in the order chosen on the tune half


class Contest(Record):
    """Whether one model is better than another, and how surely: blocks drawn until it was known."""

    kind: Literal["contest"] = "contest"
    a: Digest
    b: Digest
    names: tuple[str, str]  # what they were called
    holdout: str
    protocol: str
    split: str = "gate"
    outcome: Literal["better", "not better", "undecided"]
    estimand: str  # "mean", or "clipped mean"
    effect: float  # bits per byte that b is better by, over the blocks in which it can differ
    low: float
    high: float
    drawn: int  # blocks
    touched: int  # in which the two can differ
    blocks: int
    moved: float = 1.0  # share of the weight that differs, mean over these
    alpha: float
    beta: float
    min_effect: float
    cap: int
    clip: float
    clipped: int = 0
    clip_effect: float = 0.0
    order: str  # what the order of drawing was made from
    wealth: tuple[tuple[int, float, float], ...] = ()  # draws, and log10 wealth of "better" and of "not better by min_effect"


class Check(Frozen):
    """One question a submission was asked."""

    name: str
    value: float | None  # None: not measured, which is a failure
    threshold: float | None
    side: Literal["at least", "at most"]  # the value must be
    passed: bool


class Verdict(Record):
    """Whether an expert may join a forest, with every check."""

    kind: Literal["verdict"] = "verdict"
    expert: Digest
    accepted: bool
    checks: tuple[Check, ...]
    forest: Digest | None = None  # the one it asked to join
    holdout: str = ""  # whose blocks were drawn; empty where none were


class Entry(Frozen):
    """One submission to a project."""

    expert: Digest
    level: float  # the error it was allowed, fixed before anything was drawn
    holdout: str = ""  # whose blocks it was tested on
    sealed: str = ""  # "key-" and the sha256 of the key of its order: said before anything is drawn
    accepted: bool | None = None  # None: begun and not decided; counts as refused
    key: str = ""  # "key=" and the key in hex: shown once decided
    verdict: Digest | None = None


class Ledger(Record):
    """A project's sequence of submissions, in the order in which their levels were fixed."""

    kind: Literal["ledger"] = "ledger"
    budget: float = Field(0.1, gt=0, lt=1)  # expected share of wrong acceptances among all
    entries: tuple[Entry, ...] = ()


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
    record.__dict__["digest"] = hashlib.sha256(data).hexdigest()  # it keeps the name it was saved under, however it was spelled then
    return record


_DIGEST = re.compile(r"^(sha256:)?[0-9a-f]{64}$")


def references(record: Record) -> Iterator[str]:
    """Every digest a record names, each once: bare hex for records, `sha256:…` for blobs."""

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

    # what the order of a contest was made from looks like one, and names nothing
    yield from dict.fromkeys(walk(record.model_dump(mode="json", exclude={"order"} if isinstance(record, Contest) else None)))
