"""The forest of an ensemble, opened: its experts and its router.

B rows, T tokens, N scored tokens of several documents
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmwood.corpus.tokens import Windows
from elmwood.domains.route import Routing
from elmwood.ensemble.text_router import TextRouter, names_of, open_text_router
from elmwood.lm.experts import Experts
from elmwood.records import Ensemble, Expert, Forest, Partition, Seed
from elmwood.store import Store

Ints = NDArray[np.integer]


class OpenForest(NamedTuple):
    """The parts of an ensemble."""

    routing: Routing
    experts: Experts
    router: TextRouter
    names: list[str]  # of the candidates, in a text's shares


def open_forest(ensemble: Ensemble, store: Store, device: torch.device | str | None = None) -> OpenForest:
    """Open the experts of an ensemble's forest and its router. Raises ForeignExpert, UnknownName."""
    forest, routing = store.load(ensemble.forest, Forest), Routing.of(ensemble)
    seed, partition = store.load(forest.seed, Seed), store.load(forest.partition, Partition)
    members = [store.load(digest, Expert) for digest in forest.experts]
    router = open_text_router(routing, partition, members, seed, store)
    return OpenForest(routing, Experts(seed, members, store, device), router, [*names_of(members, store), "seed"])


def score_rows(score_windows: Callable[[Windows, Ints], Tensor], tokens_BT: Any) -> Tensor:
    """log p(x_t | x_<t) [B, T] of rows that are documents of their own; column 0 is 0."""
    rows_BT = torch.as_tensor(tokens_BT, dtype=torch.long).numpy()
    rows, length = rows_BT.shape
    windows = Windows(rows_BT, np.full(rows, length), np.ones(rows, np.int64), np.arange(rows))
    loglik_BT = torch.zeros(rows, length)
    loglik_BT[:, 1:] = score_windows(windows, np.arange(rows)).view(rows, length - 1)
    return loglik_BT
