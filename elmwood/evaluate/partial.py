"""A column that grows by windows: a test needs a model on the blocks it draws, and on no others.

W windows, N scored tokens
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.errors import Damaged
from elmwood.evaluate.columns import Scorer, column, run
from elmwood.evaluate.holdout import Holdout
from elmwood.records import Record, Score, fingerprint
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


class Partial:
    """Log-likelihoods of a model on the windows scored so far; a complete column where the model has a Score. What is scored is kept."""

    def __init__(self, model: Record, load: Callable[[], Scorer], holdout: Holdout, store: Store):
        self.holdout, self.load = holdout, load
        self.window_N = np.nonzero(holdout.scored_WL)[0]
        self.loglik_N = np.full(len(self.window_N), np.nan, np.float32)
        self.known_W = np.zeros(len(holdout.windows.rows_WL), bool)
        self.forwarded = 0  # tokens, by this object
        if done := store.done(fingerprint("score", model.digest, holdout.name)):
            self.loglik_N, self.known_W[:] = column(store.load(done, Score), holdout, store), True
            return
        self.folder = store.work(fingerprint("partial", model.digest, holdout.name))
        for path in sorted(self.folder.glob("*.safetensors")):
            self._take(**safetensors.numpy.load_file(path))

    @property
    def complete(self) -> bool:
        return bool(self.known_W.all())

    def fill(self, window_W: Ints, progress: Progress = silent) -> None:
        """Score those of these windows that are not known yet."""
        missing_W = np.unique(window_W[~self.known_W[window_W]])
        if not len(missing_W):
            return
        cut = self.holdout.windows
        some = type(cut)(*(part[missing_W] for part in cut))
        loglik_N = run(self.load(), self.holdout._replace(windows=some), progress)
        self.forwarded += int(some.length_W.sum())
        self._keep(missing_W, loglik_N)
        self._take(missing_W, loglik_N)

    def _take(self, windows: Ints, loglik: Floats) -> None:
        place_N = np.isin(self.window_N, windows)
        if place_N.sum() != len(loglik):
            raise Damaged(f"{self.folder} holds {len(loglik)} scores for {place_N.sum()} tokens: delete it and run the command again")
        self.loglik_N[place_N] = loglik
        self.known_W[windows] = True

    def _keep(self, windows: Ints, loglik: Floats) -> None:
        """One file per batch, complete or not there."""
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(safetensors.numpy.save({"windows": windows, "loglik": loglik}))
        Path(temporary).rename(self.folder / f"{fingerprint(windows.tolist())[:32]}.safetensors")
