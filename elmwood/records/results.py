"""Records of results: scores, comparisons, contests, verdicts and the ledger of submissions."""

from typing import Literal

from pydantic import Field

from elmwood.records.base import Blob, Digest, Frozen, Record


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
