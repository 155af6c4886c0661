"""Records of results: scores, comparisons, contests, verdicts and the ledger of submissions."""

from typing import Literal

from pydantic import Field

from elmwood.records.base import Blob, Digest, Frozen, Record


class Score(Record):
    """Log-likelihoods of held-out tokens under one model, computed once."""

    kind: Literal["score"] = "score"
    model: Digest
    holdout: str  # "holdout-" + fingerprint of its tokens and windows
    protocol: str
    loglik: Blob  # safetensors: "loglik" [N] float16 (float32 in older records), nats; "windows": their numbers, if not all
    tokens: int = Field(ge=0)
    nats: float  # minus the sum of the log-likelihoods
    windows: int | None = None  # number of windows scored; None: all


class Row(Frozen):
    """One line of a comparison. Losses are bits per byte on the test half of the holdout."""

    name: str
    bits_per_byte: float
    standard_error: float
    perplexity: float  # per token
    gain: float | None = None  # bits per byte better than the strongest dense control, paired
    gain_error: float | None = None  # its standard error
    domains: tuple[float | None, ...] = ()  # bits per byte of each domain; None if the test half has no document of it
    macro: float | None = None  # mean of `domains`, each with the same weight
    batch: int | None = None  # sequences per step
    steps: int | None = None
    tokens: int | None = None  # further training tokens, all machines together
    # of older records; what tasks took is in the store's logs, and so a comparison does not depend on the machine
    machine_seconds: float | None = None  # summed over machines
    wall_seconds: float | None = None  # if all machines work in parallel
    role: Literal["seed", "control", "result", "bound"] = "result"


class Comparison(Record):
    """A table of models on one holdout: the result and every control."""

    kind: Literal["comparison"] = "comparison"
    forest: Digest | None = None
    controls: tuple[Digest, ...] = ()  # the other models in the table
    holdout: str
    rows: tuple[Row, ...]
    routing: tuple[tuple[float, ...], ...] = ()  # [domain of the document][expert] mean weight; the last column is the seed
    fitted: dict[str, float] = {}  # temperature, seed distance, ... chosen on the tune half
    chosen: str | None = None  # name of the row with the least loss on the tune half, chosen before the test half was read
    growth: tuple[tuple[float, float], ...] = ()  # bits per byte and standard error with 1, 2, ... experts, ordered on the tune half


class Contest(Record):
    """A sequential test of whether one model is better than another: blocks are drawn until it decides."""

    kind: Literal["contest"] = "contest"
    a: Digest
    b: Digest
    names: tuple[str, str]  # as the user typed them
    holdout: str
    protocol: str
    split: str = "gate"
    outcome: Literal["better", "not better", "undecided"]
    estimand: str  # "mean", or "clipped mean"
    effect: float  # bits per byte by which b is better, over the blocks in which they can differ
    low: float
    high: float
    drawn: int = Field(ge=0)  # number of blocks
    touched: int = Field(ge=0)  # blocks in which the two can differ
    blocks: int = Field(gt=0)
    moved: float = 1.0  # share of the ensemble weight that differs, mean over these blocks
    alpha: float = Field(gt=0, lt=1)
    beta: float = Field(gt=0, lt=1)
    min_effect: float
    cap: int
    clip: float
    clipped: int = 0
    clip_effect: float = 0.0
    order: str  # the key that the order of drawing was made from
    wealth: tuple[tuple[int, float, float], ...] = ()  # number of draws; log10 wealth of "better" and of "not better by min_effect"


class Check(Frozen):
    """One check of a submission."""

    name: str
    value: float | None  # None: not measured, which counts as failed
    threshold: float | None
    side: Literal["at least", "at most"]  # of the threshold, on which the value must be
    passed: bool


class Verdict(Record):
    """Whether an expert may join a forest, with all checks."""

    kind: Literal["verdict"] = "verdict"
    expert: Digest
    accepted: bool
    checks: tuple[Check, ...]
    forest: Digest | None = None  # that it was submitted to
    holdout: str = ""  # that blocks were drawn from; empty if none were


class Entry(Frozen):
    """One submission to a project."""

    expert: Digest
    level: float  # the error level, fixed before any block was drawn
    holdout: str = ""  # that it was tested on
    sealed: str = ""  # "key-" and the sha256 of the key of its order, published before any block is drawn
    accepted: bool | None = None  # None: not decided, which counts as refused
    key: str = ""  # "key=" and the key in hex, published once decided
    verdict: Digest | None = None


class Ledger(Record):
    """The submissions to a project, in the order in which their error levels were fixed."""

    kind: Literal["ledger"] = "ledger"
    budget: float = Field(0.1, gt=0, lt=1)  # expected share of wrong acceptances among all acceptances
    entries: tuple[Entry, ...] = ()
