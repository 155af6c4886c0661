"""A column that grows by windows: a test scores only the blocks it draws, a table an expert only where it is near.

W windows, N scored tokens
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.errors import Damaged
from elmwood.evaluate.columns import Scorer, column, encode, open_tensors, run
from elmwood.evaluate.holdout import Holdout
from elmwood.records import Digest, Ensemble, Record, Score, fingerprint
from elmwood.store import Store
from elmwood.store.disk import write_whole
from elmwood.store.own import is_claim, keep_claim, keep_own

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

SLICE = 1 << 17  # tokens between two saves


def task_names(model: Record, holdout: str) -> list[str]:
    """Of the complete Score of a model, and of what there is of it. Ensembles were once routed by the window, and not by the document:
    their Scores have other names since."""
    routed = ["document"] if isinstance(model, Ensemble) else []
    return [fingerprint(kind, model.digest, holdout, *routed) for kind in ("score", "partial")]


def score(model: Record, load: Callable[[], Scorer], holdout: Holdout, store: Store, progress: Progress = silent) -> Score:
    """The Score of a model on the holdout; the model is opened only if something is missing. Interrupted runs resume."""
    one = Partial(model, load, holdout, store)
    one.fill(np.arange(len(one.known_W)), progress)
    return one.seal()


class Partial:
    """Log-likelihoods of a model on the windows scored so far, NaN on the others. `fill` is the only function that runs models.

    A complete column is a read-only memory map of its blob; one that grows stands in memory. `alone`: a folder of its own. Scores in the
    store are then not looked at, and what a run that was stopped left there is used only for the same batches: what is found depends on
    neither.
    """

    def __init__(self, model: Record, load: Callable[[], Scorer], holdout: Holdout, store: Store, alone: Path | None = None):
        self.model, self.holdout, self.load, self.store, self.alone = model, holdout, load, store, alone is not None
        self.count_W = holdout.count_W
        self.known_W = np.zeros(len(self.count_W), bool)
        self.forwarded, self.seconds = 0, 0.0  # tokens and time, by this object
        self.keys = task_names(model, holdout.name)
        self.folder = alone or store.root / "work" / self.keys[1]
        done = None if alone else next((digest for key in self.keys if (digest := store.done(key))), None)
        self.score, self.loglik_N = None, np.full(int(self.count_W.sum()), np.nan, np.float32)
        if done:
            with suppress(Damaged):  # what is no column is scored again
                self.loglik_N = column(found := store.load(done, Score), holdout, store)
                self.score = found
        if self.score and self.score.windows is None:
            self.known_W[:] = True
            return
        first_W = np.cumsum(self.count_W) - self.count_W
        scored_W = self.count_W > 0  # a window with nothing but context has no scored token
        self.known_W[scored_W] = ~np.isnan(self.loglik_N[first_W[scored_W]])
        self.known_W[~scored_W] = self.score is not None
        for path in [] if alone else sorted(self.folder.glob("*.safetensors")):
            with suppress(FileNotFoundError):  # another process kept the whole Score meanwhile
                self._take(**safetensors.numpy.load_file(path))
        if self.complete and not alone:  # the run that scored the last of it was killed before it was kept
            self.loglik_N = column(self.seal(), holdout, store)

    @property
    def complete(self) -> bool:
        return bool(self.known_W.all())

    def fill(self, window_W: Ints, progress: Progress = silent, until: float | None = None) -> None:
        """Score those of these windows that are not known yet, until the time `until` (seconds of time.time)."""
        missing_W = np.unique(window_W[~self.known_W[window_W]])
        if not len(missing_W):
            return
        cut, started = self.holdout.windows, time.perf_counter()
        part_W = (np.cumsum(cut.length_W) // SLICE)[missing_W]  # whatever is missing: a run that goes on has the same batches
        total, done, ran, lm = int(cut.length_W[missing_W].sum()), 0, 0, self.load()
        for part in np.unique(part_W):
            if until is not None and time.time() >= until:
                break
            some_W = missing_W[part_W == part]
            if self.alone and self._file(some_W).exists():
                self._take(**safetensors.numpy.load_file(self._file(some_W)))
            else:
                loglik = run(lm, self.holdout, _onward(progress, done, total), some_W)
                self._keep(some_W, loglik)
                self._take(some_W, loglik)
                ran += int(cut.length_W[some_W].sum())
            done += int(cut.length_W[some_W].sum())
        self.forwarded += ran
        self.seconds += time.perf_counter() - started

    def seal(self) -> Score:
        """Store what is known as a Score."""
        if self.score and self.score.tokens == self.count_W[self.known_W].sum():
            return self.score
        key = self.keys[0] if self.complete else self.keys[1]
        loglik_N = self.loglik_N[np.repeat(self.known_W, self.count_W)]
        made = Score(
            model=self.model.digest, holdout=self.holdout.name, protocol=self.holdout.protocol,
            loglik=self.store.put(encode(loglik_N, None if self.complete else self.known_W)),
            tokens=len(loglik_N), nats=-float(loglik_N.sum(dtype=np.float64)), windows=None if self.complete else int(self.known_W.sum()),
        )  # fmt: skip
        for one in {key, self.keys[1]}:
            self.store.finish(one, made)
        if is_claim(made.digest, self.store):  # another claimed the same, and now it was run here
            keep_own(made, self.store)
        self.store.log(key, seconds=self.seconds, tokens=self.forwarded)
        self.score = made
        return made

    def _take(self, windows: Ints, loglik: Floats) -> None:
        size_w, last_w = self.count_W[windows], np.cumsum(self.count_W)[windows]
        if size_w.sum() != len(loglik):
            raise Damaged(f"{self.folder} holds {len(loglik)} scores for {size_w.sum()} tokens: delete it and run the command again")
        self.loglik_N[np.repeat(last_w - np.cumsum(size_w), size_w) + np.arange(len(loglik))] = loglik
        self.known_W[windows] = True

    def _keep(self, windows: Ints, loglik: Floats) -> None:
        """One file per batch, complete or not there. They go when another process has kept the whole Score: none is needed then."""
        with suppress(FileNotFoundError):
            write_whole(self._file(windows), safetensors.numpy.save({"windows": windows, "loglik": loglik}), durable=False)

    def _file(self, windows: Ints) -> Path:
        return self.folder / f"{fingerprint(windows.tolist())[:32]}.safetensors"


def _onward(progress: Progress, before: int, total: int) -> Progress:
    """The progress of one part of several."""
    return lambda what, done, _, unit: progress(what, before + done, total, unit)


def bring(models: list[Record], holdout: Holdout, source: Store, store: Store) -> int:
    """Copy the Scores that another store has of these models on this holdout, and check their bytes; how many came.

    What came is a claim of whoever scored it, is marked so, and is used only where its numbers could be log-likelihoods of this text. A
    model that has a Score here keeps it. Raises Damaged.
    """
    came = 0
    for model in models:
        keys = task_names(model, holdout.name)
        done = next((digest for key in keys if (digest := source.find_done(key))), None)
        if done is None or any(store.done(key) for key in keys):
            continue
        record = source.load(done, Score)
        instead = f"score {model.digest[:8]} here instead, without --from"
        if (record.model, record.holdout) != (model.digest, holdout.name):
            raise Damaged(f"score {done[:8]} of {source.root} is not what it says it is: {instead}")
        loglik_n = open_tensors(source.get(record.loglik))["loglik"]
        nats, windows = -float(loglik_n.sum(dtype=np.float64)), int((~np.isnan(column(record, holdout, source))).sum())
        if record.tokens != windows or abs(record.nats - nats) > 1e-3 * max(1.0, nats):
            raise Damaged(
                f"score {done[:8]} of {source.root} says {record.tokens} tokens and {record.nats:.6g} nats, and its column has "
                f"{windows} and {nats:.6g}: {instead}"
            )
        if store.put(source.get(record.loglik)) != record.loglik:
            raise Damaged(f"score {done[:8]} of {source.root} is not what it says it is: {instead}")
        for key in keys[:1] if record.windows is None else keys[1:]:
            store.finish(key, record)
        keep_claim(record, store)
        came += 1
    return came


def claimed(models: Sequence[Digest], holdout: str, store: Store) -> list[Digest]:
    """The models whose Score of a holdout came from another store, and was not checked here."""
    found = []
    for digest in models:
        done = [score for key in task_names(store.load(digest), holdout) if (score := store.find_done(key))]
        found += [digest] if done and is_claim(done[0], store) else []
    return found
