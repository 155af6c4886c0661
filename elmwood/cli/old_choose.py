"""Merges held against one another: put in order without running them, scored on the tune half once each, and the best one tested on
blocks that nothing was chosen on.

N scored tokens, E experts
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood import evaluate
from elmwood.cli.old_compare import contest, judge, mix_up
from elmwood.engine import Progress
from elmwood.evaluate.sequential.decision import StoppingRule
from elmwood.evaluate.surrogate import pool
from elmwood.merge.estimate import by_coordinates
from elmwood.merge.layer_weights import layer_name
from elmwood.merge.states import seed_places
from elmwood.records import Contest, Digest, Merged, Partition, Record, Seed, fingerprint
from elmwood.store import Store
from elmwood.study.scoring import Columns, ensure
from elmwood.weights.tensors import SIZES

Floats = NDArray[np.floating]

CAP = 1000  # blocks that the test of the best may draw
CLIP = 0.5  # bits per byte
TRIED = 2  # other answers that a layer is tried with


class Tuned(NamedTuple):
    """By name: bits per byte on the tune half, and how much worse than the best, paired; and the tokens that were read to know."""

    losses: dict[str, evaluate.Estimate]
    behind: dict[str, evaluate.Estimate]
    tokens: int


def opened(seed: Seed, partition: Digest, documents: int | None, store: Store, *, stay: bool = False) -> Columns:
    """The holdout that merges are chosen on."""
    division = store.load(partition, Partition)
    length = min(seed.context, 1024)
    return Columns(evaluate.HoldoutSpec(partition=division.digest, seed=seed.digest, length=length, documents=documents), store, stay=stay)


def tuned(
    models: Mapping[str, Record], seed: Seed, partition: Digest, documents: int | None, store: Store, progress: Progress
) -> Tuned:  # fmt: skip
    """Score answers on the tune half."""
    table = opened(seed, partition, documents, store)
    held = table.held
    asked = [(name, record.digest) for name, record in models.items()]
    found = ensure(asked, table, windows=dict.fromkeys((digest for _, digest in asked), _tune(held)), progress=progress)
    columns = {name: found.columns[digest] for name, digest in asked}
    losses = {name: evaluate.bits_per_byte(column, held, held.tune_D) for name, column in columns.items()}
    best = columns[min(losses, key=lambda name: losses[name].value)]
    return Tuned(losses, {name: evaluate.difference(column, best, held, held.tune_D) for name, column in columns.items()}, found.tokens)


class Layered(NamedTuple):
    """Layer -> the answer it is taken from; and the tokens that were read to know."""

    choice: dict[str, str]
    losses: int  # that were looked at
    tokens: int


def layered(
    models: Mapping[str, Merged], losses: Mapping[str, evaluate.Estimate], estimated: Mapping[str, Mapping[str, float]], seed: Seed,
    partition: Digest, documents: int | None, store: Store, progress: Progress,
) -> Layered:  # fmt: skip
    """From the best answer, layer by layer to one of the two next best where the tune half is then predicted better (`by_coordinates`).
    One model stands open and its layers are exchanged, so trials leave nothing in the store."""
    from elmwood.ensemble.mixture import open_model  # torch
    from elmwood.evaluate.columns import run

    held = opened(seed, partition, documents, store).held
    window_W = _tune(held)
    some, among_N = held.some(window_W), np.isin(held.window_N, window_W)
    begin, *others = sorted(models, key=lambda name: losses[name].value)[: 1 + TRIED]
    lm: Any = open_model(models[begin], store)
    names: dict[str, set[str]] = {}
    for name, place in seed_places(seed, store).items():
        if place.dtype in SIZES:
            names.setdefault(layer_name(name), set()).add(name)
    filled, tried = dict.fromkeys(names, begin), 0

    def loss(choice: Mapping[str, str]) -> float:
        nonlocal tried
        progress("layers", tried, len(names) * len(others) + 1, "trials")  # at most
        for layer in (layer for layer in names if filled[layer] != choice[layer]):
            lm.fill(store.folder(models[choice[layer]].files), names[layer].__contains__)
            filled[layer] = choice[layer]
        tried += 1
        loglik_N = np.full(len(held.document_N), np.nan, np.float32)
        loglik_N[among_N] = run(lm, some)
        return evaluate.bits_per_byte(loglik_N, held, held.tune_D).value

    choice = by_coordinates(begin, others, list(names), estimated, loss)
    progress("layers", tried, tried, "trials")
    return Layered(choice, tried, tried * int(some.windows.length_W.sum()))


def by_columns(
    models: Mapping[str, Merged], seed: Seed, partition: Digest, documents: int | None, store: Store, progress: Progress
) -> dict[str, float]:  # fmt: skip
    """Bits per byte on the tune half, as the columns of the experts have it: log-linear pools, no merge is run. They rank weighted sums
    and know nothing of trimming and votes (docs/log/)."""
    table = opened(seed, partition, documents, store)
    held = table.held
    experts = sorted({one.expert for merged in models.values() for one in merged.contributions})
    asked = [("seed", seed.digest), *((digest[:8], digest) for digest in experts)]
    found = ensure(asked, table, windows=dict.fromkeys((digest for _, digest in asked), _tune(held)), progress=progress)
    loglik_NE = np.column_stack([found.columns[digest][held.tune_N] for digest in experts])
    seed_N, size = found.columns[seed.digest][held.tune_N], float(np.log(2) * held.bytes_D[held.tune_D].sum())
    return {name: -float(pool(loglik_NE, seed_N, coefficients(one, experts)).sum()) / size for name, one in models.items()}


def coefficients(merged: Merged, experts: list[Digest]) -> Floats:
    """What each expert's delta is multiplied by in a weighted sum [E]; of other rules, what it would be if nothing were trimmed."""
    weight_of = {one.expert: float(np.mean(one.weight[0].values)) for one in merged.contributions}
    weight_E = np.array([weight_of.get(digest, 0.0) for digest in experts])
    scale = merged.settings.get("scale", 1.0)
    return scale * weight_E / (weight_E.sum() if merged.settings.get("normalise") else 1.0)


def tested(
    winner: Merged, name: str, seed: Seed, partition: Digest, documents: int | None, store: Store, progress: Progress
) -> tuple[Contest, int]:  # fmt: skip
    """Whether the best is better than the seed, on blocks of the gate split; and the tokens forwarded to know."""
    table, rule = opened(seed, partition, documents, store, stay=True), StoppingRule(cap=CAP)
    held = table.held
    key = fingerprint("compare", seed.digest, winner.digest, held.name)
    found, cost = judge(mix_up(seed, winner, seed, held, store, progress), table, rule, CLIP, key.encode(), progress)
    made = contest(found, rule, a=seed.digest, b=winner.digest, names=(seed.name, name), holdout=held.name, protocol=held.protocol,
                   clip=CLIP, order=key)  # fmt: skip
    store.add(made)
    return made, int(cost["tokens_forwarded"])


def _tune(held: evaluate.Holdout) -> NDArray[np.integer]:
    return np.unique(held.window_N[held.tune_N])
