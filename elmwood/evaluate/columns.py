"""Run a model over the holdout, once. The column is kept: whoever needs it again reads it.

B windows of at most L tokens in one batch, N scored tokens
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.errors import Damaged
from elmwood.evaluate.holdout import Holdout
from elmwood.records import Record, Score, fingerprint
from elmwood.store import Store

TOKENS = 8192  # in one batch, padding included

Floats = NDArray[np.floating]


class Scorer(Protocol):
    """The part of an LM that is needed here."""

    def score(self, tokens_BL: Any) -> Any:
        """log p(token | those before it in its row) [B, L] float32, nats; column 0 is zero."""


def score(model: Record, load: Callable[[], Scorer], holdout: Holdout, store: Store, progress: Progress = silent) -> Score:
    """The Score of a model on the holdout; the model is opened only when there is none yet."""
    key = fingerprint("score", model.digest, holdout.name)
    if done := store.done(key):
        return store.load(done, Score)
    started = time.perf_counter()
    loglik_N = run(load(), holdout, progress)
    made = Score(
        model=model.digest,
        holdout=holdout.name,
        protocol=holdout.protocol,
        loglik=store.put(safetensors.numpy.save({"loglik": loglik_N})),
        tokens=len(loglik_N),
        nats=-float(loglik_N.sum(dtype=np.float64)),
    )
    store.finish(key, made)
    store.log(key, seconds=time.perf_counter() - started, tokens=len(loglik_N))
    return made


def column(score: Score, holdout: Holdout, store: Store) -> Floats:
    """The log-likelihoods of a Score [N] float32, nats. Raises Damaged where they do not belong to this holdout."""
    loglik_N = safetensors.numpy.load_file(store.get(score.loglik))["loglik"]
    if score.holdout != holdout.name or loglik_N.shape != holdout.document_N.shape:
        raise Damaged(f"score {score.digest[:8]} is of {score.holdout[:16]}…, not of {holdout.name[:16]}…: score the model again")
    return loglik_N


def run(lm: Scorer, holdout: Holdout, progress: Progress = silent) -> Floats:
    """Every scored token's log-likelihood under a model [N] float32. Windows of like length share a batch, so little is padded."""
    cut, scored_WL = holdout.windows, holdout.scored_WL
    loglik_WL = np.zeros(scored_WL.shape, np.float32)
    order_W = np.argsort(-cut.length_W, kind="stable")
    total, done, place = int(cut.length_W.sum()), 0, 0
    progress("score", 0, total, "tokens")
    while place < len(order_W):
        longest = int(cut.length_W[order_W[place]])
        batch = order_W[place : place + max(1, TOKENS // longest)]
        loglik_WL[batch, :longest] = np.asarray(lm.score(cut.rows_WL[batch, :longest]))
        place += len(batch)
        done += int(cut.length_W[batch].sum())
        progress("score", done, total, "tokens")
    loglik_N = loglik_WL[scored_WL]
    if not np.isfinite(loglik_N).all():
        raise Damaged("the model gives log-likelihoods that are not finite: its weights are broken; train or download it again")
    return loglik_N
