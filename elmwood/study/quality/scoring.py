"""Columns of held-out log-likelihoods by model: what nobody has scored yet is run, within a budget; the rest is read.

W windows, N scored tokens, E experts
"""

import time
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import NOTE, Progress, run, silent
from elmwood.errors import BadInput
from elmwood.evaluate.columns import Scorer
from elmwood.evaluate.holdout import Holdout, HoldoutSpec, open_holdout
from elmwood.evaluate.partial import Partial
from elmwood.records import Digest, Expert, Frozen, Partition, Record, Seed
from elmwood.store import Store
from elmwood.study.tasks import TORCH, default_threads, named

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]

LONGEST = 1024  # tokens of a window, where the user names no length
MATES = 64  # adapters over one copy of their seed
_mates: dict[tuple[Path, tuple[Digest, ...]], Any] = {}  # the open ones


class Budget(NamedTuple):
    """The most that may be run; None: no limit."""

    tokens: int | None = None
    seconds: float | None = None  # of wall clock


FREE = Budget()


def holdout_spec(partition: Partition, seed: Seed, length: int | None, documents: int | None) -> HoldoutSpec:
    """The holdout of a partition in windows of a seed's tokens; by default as long as the seed reads, at most 1,024. Raises BadInput."""
    if length is not None and length > seed.context:
        raise BadInput(f"length is {length}: seed {seed.name} reads at most {seed.context} tokens, choose 2 to {seed.context}")
    return HoldoutSpec(
        partition=partition.digest, seed=seed.digest, length=length or min(seed.context, LONGEST), documents=documents
    )  # fmt: skip


class Columns:
    """The columns of one holdout by the digest of their model, as far as they are known. `stay`: models that are run stay open, for a
    caller that asks again and again.

    `seen`: the windows whose scores count as known, by model; others count as unknown until they are revealed. None: all that is scored.
    """

    def __init__(self, spec: HoldoutSpec, store: Store, *, stay: bool = False):
        self.spec, self.store, self.stay = spec, store, stay
        self.held = open_holdout(spec, store)
        self.opened: dict[Digest, Partial] = {}
        self.seen: dict[Digest, Bools] | None = None
        self.alone: Path | None = None

    def begin_alone(self, folder: Path) -> None:
        """Know nothing of what is scored in the store, and keep what is scored from now on in a folder: a test that is stopped and
        resumed, or run where much is known, finds the same."""
        self.opened, self.seen, self.alone = {}, {}, folder

    def __getitem__(self, digest: Digest) -> Partial:
        if digest not in self.opened:
            record = self.store.load(digest)
            load = partial(_open, record, self.store)
            alone = self.alone and self.alone / digest
            self.opened[digest] = Partial(record, cache(load) if self.stay else load, self.held, self.store, alone)
        return self.opened[digest]

    def known(self, digest: Digest) -> Floats:
        """The log-likelihoods that count as known [N], NaN elsewhere."""
        one = self[digest]
        if self.seen is None:
            return one.loglik_N
        seen_W = self.seen.get(digest, np.zeros(len(one.known_W), bool))
        return np.where(np.repeat(seen_W, one.count_W), one.loglik_N, np.nan)

    def reveal(self, windows: Mapping[Digest, Ints]) -> None:
        """From now on these windows, which have been scored, count as known."""
        if self.seen is None:
            return
        for digest, window_w in windows.items():
            seen_W = self.seen.setdefault(digest, np.zeros(len(self[digest].known_W), bool))
            seen_W[window_w] = True


def _open(model: Record, store: Store, mates: tuple[Digest, ...] = ()) -> Scorer:
    from elmwood.ensemble.mixture import open_model  # torch: seconds, and only where something is missing
    from elmwood.lm.probe import note

    lm = _open_among(mates, store, model.digest) if mates else open_model(model, store)
    if isinstance(model, Expert) and "adapter_model.safetensors" in model.files:
        note(lm, model, store)
    return lm


def _open_among(mates: tuple[Digest, ...], store: Store, digest: Digest) -> Any:
    """One of several adapters of a seed. The seed stays open for the next of them."""
    from elmwood.ensemble.one import OneLM
    from elmwood.lm.experts import Experts

    key = store.root, mates
    if key not in _mates:
        _mates.clear()
        experts = [store.load(one, Expert) for one in mates]
        _mates[key] = Experts(store.load(experts[0].seed, Seed), experts, store)
    return OneLM(_mates[key], mates.index(digest), digest[:8])


def _find_mates(models: Sequence[Digest], store: Store) -> dict[Digest, tuple[Digest, ...]]:
    """Adapters of one seed and one shape, some at a time, by digest."""
    alike: dict[tuple[Digest, str], list[Digest]] = {}
    for record in map(store.load, models):
        if isinstance(record, Expert) and (settings := record.files.get("adapter_config.json")):
            alike.setdefault((record.seed, settings), []).append(record.digest)
    groups = [sorted(group[first : first + MATES]) for group in alike.values() for first in range(0, len(group), MATES)]
    return {digest: tuple(group) for group in groups if len(group) > 1 for digest in group}


class ScoreJob(Frozen):
    """Score held-out tokens under one model."""

    store: Path
    label: str
    model: Digest
    holdout: HoldoutSpec
    windows: tuple[int, ...]
    until: float | None = None  # seconds of time.time
    mates: tuple[Digest, ...] = ()  # adapters that are scored before or after it, and itself, by digest


class Scored(Frozen):
    """The cost of scoring a model."""

    tokens: int
    seconds: float


class Ensured(NamedTuple):
    """Columns, and their cost."""

    holdout: Holdout
    columns: dict[Digest, Floats]  # [N], nats; NaN where nobody has scored
    run: int  # models that were run
    tokens: int  # forwarded
    seconds: float  # of all machines together
    missing: int  # tokens of what was asked that the budget did not reach

    @property
    def known(self) -> float:
        """Share of all entries that are there."""
        return float(np.mean([1 - np.isnan(loglik_N).mean() for loglik_N in self.columns.values()]))


def ensure(
    models: Sequence[tuple[str, Digest]], columns: Columns, *, windows: Mapping[Digest, Ints] | None = None, budget: Budget = FREE,
    workers: int = 1, engine: str = "local", progress: Progress = silent,
) -> Ensured:  # fmt: skip
    """Columns of models (label, digest) on a holdout. `windows`: those in which a model is needed; by default all.

    The budget is allotted before anything runs, in the order of the models. A model's windows are taken in random order, so where the
    budget ends, the known windows are a fair sample. After an interruption, or with a new budget, the same call continues.
    """
    held, left = columns.held, budget.tokens
    until = None if budget.seconds is None else time.time() + budget.seconds
    jobs, asked = [], 0
    for digest, label in {digest: label for label, digest in models}.items():
        one = columns[digest]
        wanted_W = np.arange(len(one.known_W)) if windows is None or digest not in windows else windows[digest]
        missing_W = np.unique(wanted_W[~one.known_W[wanted_W]])
        asked += int(held.windows.length_W[missing_W].sum())
        if left is not None:
            missing_W = np.random.default_rng(len(missing_W)).permutation(missing_W)
            missing_W = np.sort(missing_W[np.cumsum(held.windows.length_W[missing_W]) <= left])
            left -= int(held.windows.length_W[missing_W].sum())
        if len(missing_W):
            jobs.append(
                ScoreJob(store=columns.store.root, label=f"score {label}" if label else "score", model=digest, holdout=columns.spec,
                         windows=tuple(missing_W.tolist()), until=until)
            )  # fmt: skip
    here = workers == 1 and engine == "local"
    if not columns.stay:
        mates = _find_mates([job.model for job in jobs], columns.store)
        jobs = [job.model_copy(update={"mates": mates.get(job.model, ())}) for job in jobs]
    spent = [_score(columns, job, progress) for job in jobs] if here else run(
        score_job, jobs, workers=workers, engine=engine, torch=TORCH, progress=progress
    )  # fmt: skip
    if not (here and columns.stay):
        for job in jobs:
            del columns.opened[job.model]  # read again from the store
        _mates.clear()
    tokens = sum(one.tokens for one in spent)
    found = {digest: columns[digest].loglik_N for _, digest in models}
    return Ensured(held, found, len(jobs), tokens, sum(one.seconds for one in spent), asked - tokens)


def score_job(job: ScoreJob, progress: Progress) -> Scored:
    """The cost; the Score is found by model and holdout."""
    columns = open_columns(job.holdout, job.store)
    columns.opened.clear()
    return _score(columns, job, progress)


@lru_cache(1)
def open_columns(holdout: HoldoutSpec, store: Path) -> Columns:
    """Of a worker process: the held-out text is cut into tokens once for all its models."""
    return Columns(holdout, Store(store))


def _score(columns: Columns, job: ScoreJob, progress: Progress) -> Scored:
    from elmwood.lm.devices import best_device  # torch
    from elmwood.train.loop import use_threads

    one, seed = columns[job.model], columns.store.load(columns.spec.seed, Seed)
    before = one.forwarded, one.seconds
    if job.mates:
        one.load = partial(_open, one.model, columns.store, job.mates)
    else:
        _mates.clear()
    progress(f"scores on {best_device()}", 0, 0, NOTE)
    with use_threads(default_threads(seed)):
        one.fill(np.array(job.windows), named(job.label, progress), job.until)
    if not columns.stay and one.known_W.any():
        one.seal()
    return Scored(tokens=one.forwarded - before[0], seconds=one.seconds - before[1])
