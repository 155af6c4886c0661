"""The score table of some models: what nobody has scored yet is run, within a budget; everything else only reads.

W windows, N scored tokens, E experts
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood import evaluate
from elmwood.cli.jobs import ScoreJob, open_holdout, score_job
from elmwood.engine import Progress, cores, run
from elmwood.records import Digest
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


class Budget(NamedTuple):
    """What may be spent on models; None: whatever it takes."""

    tokens: int | None = None
    seconds: float | None = None  # of wall clock


FREE = Budget()


class Ensured(NamedTuple):
    """Columns, and what they cost."""

    holdout: evaluate.Holdout
    columns: dict[Digest, Floats]  # [N], nats; NaN where nobody has scored
    run: int  # models that had to be
    tokens: int  # forwarded
    seconds: float  # of all machines together
    missing: int  # tokens of what was asked that the budget did not reach

    @property
    def known(self) -> float:
        """Share of all entries that are there."""
        return float(np.mean([1 - np.isnan(loglik_N).mean() for loglik_N in self.columns.values()]))


def ensure(
    models: Sequence[tuple[str, Digest]], spec: evaluate.HoldoutSpec, store: Store, *, windows: Mapping[Digest, Ints] | None = None,
    budget: Budget = FREE, workers: int = 1, engine: str = "local", progress: Progress,
) -> Ensured:  # fmt: skip
    """Columns of models (label, digest) on a holdout. `windows`: where a model is needed; everywhere, unless it says.

    What is missing is shared out before anything runs, first come, first served; a model's windows are taken in an order decided by
    chance, so where the budget ends what is known is a fair sample. Interrupted or out of budget, the same call goes on.
    """
    held = open_holdout(spec, store)
    threads, left = max(1, cores() // workers), budget.tokens
    until = None if budget.seconds is None else time.time() + budget.seconds
    jobs, asked = [], 0
    for label, digest in dict.fromkeys(models):
        one = _opened(digest, held, store)
        wanted_W = np.arange(len(one.known_W)) if windows is None or digest not in windows else windows[digest]
        missing_W = np.unique(wanted_W[~one.known_W[wanted_W]])
        asked += int(held.windows.length_W[missing_W].sum())
        if left is not None:
            missing_W = np.random.default_rng(len(missing_W)).permutation(missing_W)
            missing_W = np.sort(missing_W[np.cumsum(held.windows.length_W[missing_W]) <= left])
            left -= int(held.windows.length_W[missing_W].sum())
        if len(missing_W):
            some = None if len(missing_W) == len(one.known_W) else tuple(missing_W.tolist())
            jobs.append(
                ScoreJob(store=store.root, label=f"score {label}", model=digest, holdout=spec, threads=threads, windows=some, until=until)
            )
    spent = run(score_job, jobs, workers=workers, engine=engine, progress=progress)
    columns = {digest: _opened(digest, held, store).loglik_N for _, digest in models}
    tokens = sum(one.tokens for one in spent)
    return Ensured(held, columns, len(jobs), tokens, sum(one.seconds for one in spent), asked - tokens)


def _opened(digest: Digest, held: evaluate.Holdout, store: Store) -> evaluate.Partial:
    """What there is of a model's column. Raises RuntimeError if it were run."""
    return evaluate.Partial(store.load(digest), _never, held, store)


def _never() -> evaluate.Scorer:
    raise RuntimeError("a reader of the table runs no model")
