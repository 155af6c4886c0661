"""Score a model on the holdout, and store the result: two bytes per token.

W windows of at most L tokens, N scored tokens, R runs of T tokens
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from elmwood.corpus.tokens import Windows
from elmwood.engine import Progress, silent
from elmwood.errors import Damaged, NotFinite
from elmwood.evaluate.holdout import Holdout
from elmwood.records import Score
from elmwood.store import Store
from elmwood.store.headers import read_header

RUN = 256  # tokens over which rounding errors carry over
ROUNDING = 1e-3  # nats by which a log-likelihood of float32 sums may be above 0
LEAST = float(np.finfo(np.float16).min)
DTYPES = {"F16": np.float16, "F32": np.float32, "U32": np.uint32}  # of what is kept

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


class Scorer(Protocol):
    """The part of an LM that scoring needs."""

    def score_windows(self, windows: Windows, wanted_W: Ints, progress: Progress = silent) -> Any:
        """log p of the scored tokens of the wanted windows (ascending), in order [n] float32, nats. `windows` has all of their
        documents' windows: an ensemble looks at the document before a window."""


def column(score: Score, holdout: Holdout, store: Store) -> Floats:
    """The log-likelihoods of a Score [N] float16 (float32 in older ones), nats: the blob itself, memory-mapped and read-only. Where a
    Score has only some windows, a float32 array in memory, NaN elsewhere. Raises Damaged where it is of another holdout, or no column."""
    parts, known_W = open_tensors(store.get(score.loglik)), np.ones(len(holdout.count_W), bool)
    if "windows" in parts:
        known_W = np.isin(np.arange(len(known_W)), parts["windows"])
    counted = len(parts["loglik"]), len(parts.get("windows", known_W))
    if (score.holdout, score.protocol) != (holdout.name, holdout.protocol) or counted != (holdout.count_W[known_W].sum(), known_W.sum()):
        raise Damaged(
            f"score {score.digest[:8]} has {counted[0]} tokens of {score.holdout[:16]}…, and here are {holdout.count_W[known_W].sum()} of "
            f"{holdout.name[:16]}…: score the model again"
        )
    check_values(parts["loglik"], f"score {score.digest[:8]}")
    if known_W.all():
        return parts["loglik"]
    loglik_N = np.full(int(holdout.count_W.sum()), np.nan, np.float32)
    loglik_N[np.repeat(known_W, holdout.count_W)] = parts["loglik"]
    return loglik_N


def check_values(loglik_N: Floats, name: str) -> None:
    """Log-likelihoods are finite and at most 0, up to rounding. Raises Damaged."""
    least, most = (float(end(loglik_N, initial=0)) for end in (np.min, np.max))  # NaN stays NaN
    if not (np.isfinite(least) and most <= ROUNDING):
        value = most if not most <= ROUNDING else least
        raise Damaged(f"{name} has a log-likelihood of {value:+.3g}; they are finite and at most 0: score the model again")


def open_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a blob that `encode` wrote, as views of its memory map: opening reads the header alone. Raises Damaged."""
    try:
        top = read_header(path)
    except Damaged as error:
        raise Damaged(f"{path} is no column of log-likelihoods ({error}): score the model again") from error
    if "loglik" not in top.tensors or any(one["dtype"] not in DTYPES for one in top.tensors.values()):
        raise Damaged(f"{path} is no column of log-likelihoods: score the model again")
    bytes_N = np.asarray(np.memmap(path, np.uint8, "r"))[top.begin :]
    return {
        name: bytes_N[slice(*one["data_offsets"])].view(DTYPES[one["dtype"]]).reshape(one["shape"]) for name, one in top.tensors.items()
    }


def encode(loglik_N: Floats, known_W: NDArray[np.bool_] | None = None) -> bytes:
    """The blob of a Score: "loglik" [N] float16, and "windows", their numbers, where some are missing."""
    parts: dict[str, Any] = {"loglik": round_to_half(loglik_N)}
    if known_W is not None:
        parts["windows"] = np.flatnonzero(known_W).astype(np.uint32)
    return safetensors.numpy.save(parts)


def round_to_half(loglik_N: Floats) -> Floats:
    """Log-likelihoods in half precision [N] float16, none above zero. The rounding error of a token is added to the next one of its run,
    so the error of a sum does not grow with its tokens."""
    runs = -(-len(loglik_N) // RUN)
    loglik_RT = np.zeros((runs, RUN))
    loglik_RT.ravel()[: len(loglik_N)] = loglik_N
    kept_RT = np.zeros((runs, RUN), np.float16)
    over_R = np.zeros(runs)
    for t in range(RUN):
        wanted_R = loglik_RT[:, t] + over_R
        kept_RT[:, t] = np.clip(wanted_R, LEAST, 0)
        over_R = wanted_R - kept_RT[:, t]
    return kept_RT.ravel()[: len(loglik_N)]


def run(lm: Scorer, holdout: Holdout, progress: Progress = silent, wanted_W: Ints | None = None) -> Floats:
    """The log-likelihoods of the scored tokens of some windows (ascending; None: of all) under a model [n] float32, in order.
    Raises NotFinite.
    """
    wanted_W = np.arange(len(holdout.windows.length_W)) if wanted_W is None else wanted_W
    loglik_n = np.asarray(lm.score_windows(holdout.windows, wanted_W, progress))
    if not np.isfinite(loglik_n).all():
        raise NotFinite("the model gives log-likelihoods that are not finite: its weights are broken; train or download it again")
    return loglik_n
