"""Answers held against one another on the tune half: each model reads it once."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from elmwood import evaluate
from elmwood.cli.ensure import Columns, ensure
from elmwood.engine import Progress
from elmwood.records import Partition, Record, Seed
from elmwood.store import Store


class Tuned(NamedTuple):
    """By name: bits per byte on the tune half, and how much worse than the best, paired; and the tokens that were read to know."""

    losses: dict[str, evaluate.Estimate]
    behind: dict[str, evaluate.Estimate]
    tokens: int


def tuned(
    models: Mapping[str, Record], seed: Seed, partition: str, documents: int | None, store: Store, progress: Progress
) -> Tuned:  # fmt: skip
    division = store.load(partition, Partition)
    length = min(seed.context, 1024)
    spec = evaluate.HoldoutSpec(partition=division.digest, seed=seed.digest, length=length, documents=documents)
    table = Columns(spec, store)
    held = table.held
    tune_W = np.unique(held.window_N[held.tune_N])
    asked = [(name, record.digest) for name, record in models.items()]
    found = ensure(asked, table, windows={digest: tune_W for _, digest in asked}, progress=progress)
    columns = {name: found.columns[digest] for name, digest in asked}
    losses = {name: evaluate.bits_per_byte(column, held, held.tune_D) for name, column in columns.items()}
    best = columns[min(losses, key=lambda name: losses[name].value)]
    return Tuned(losses, {name: evaluate.difference(column, best, held, held.tune_D) for name, column in columns.items()}, found.tokens)
