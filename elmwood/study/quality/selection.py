"""Merges compared with one another: ranked without running them, scored on the tune half once each, and the best one tested on blocks
that nothing was chosen on.

N scored tokens, E experts
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import Progress
from elmwood.errors import BadInput
from elmwood.evaluate.holdout import Holdout, HoldoutSpec
from elmwood.evaluate.losses import Estimate, bits_per_byte, difference
from elmwood.evaluate.sequential.decision import StoppingRule
from elmwood.evaluate.surrogate import pool
from elmwood.merge import statistics
from elmwood.merge.checkpoint import assemble
from elmwood.merge.estimate import by_coordinates, estimates
from elmwood.merge.layer_weights import layer_name
from elmwood.records import Digest, Merged, Partition, Record, Seed
from elmwood.store import Store
from elmwood.study.quality.contest import ContestResult, hold_contest
from elmwood.study.quality.scoring import Columns, ensure
from elmwood.weights.experts import seed_places
from elmwood.weights.tensors import SIZES

Floats = NDArray[np.floating]

TRIED = 2  # other answers that a layer is tried with
TESTED = 1000  # blocks that the test of the best may draw
CLIP = 0.5  # bits per byte
BY_LAYER = "by_layer"  # the title of the checkpoint whose layers come from several answers


class Ranked(NamedTuple):
    """Estimates of answers, the smaller the better; `by` statistics, or by columns where some expert left no statistics."""

    by: str
    total: dict[str, float]
    layers: dict[str, dict[str, float]]  # answer -> layer -> estimate; by statistics only
    seconds: float


class Tuned(NamedTuple):
    """By answer: bits per byte on the tune half, and how much worse than the best, paired; and the tokens that were read to know."""

    losses: dict[str, Estimate]
    behind: dict[str, Estimate]
    tokens: int


class LayerSearch(NamedTuple):
    """Layer -> the answer it is taken from; and what it took to know."""

    choice: dict[str, str]
    losses: int  # that were looked at
    tokens: int


class ChosenMerge(NamedTuple):
    """How one of several merges was chosen."""

    best: str
    tuned: Tuned
    ranked: Ranked | None  # where only the most promising were scored
    layers: dict[str, str]  # layer -> answer, of a checkpoint by layer
    looked: int  # models that were scored
    tokens: int  # read to choose
    seconds: float
    test: ContestResult  # whether the best is better than the seed, on fresh blocks


def choose_best(
    made: Mapping[str, Merged], seed: Seed, experts: Sequence[Digest], partition: str, store: Store, *, per_layer: bool, run: int | None,
    documents: int | None, name: str | None, progress: Progress,
) -> tuple[ChosenMerge, dict[str, Merged]]:  # fmt: skip
    """The best of several merges of these experts on the tune half, named, and tested on fresh blocks; and those that were scored.

    run: score only so many, the best by estimates. per_layer: go on from the best, layer by layer.
    """
    ranked = rank(made, seed, experts, partition, documents, store, progress) if run else None
    models = {one: made[one] for one in sorted(made, key=ranked.total.__getitem__)[:run]} if ranked else dict(made)
    started = time.perf_counter()
    found = tune(models, seed, partition, documents, store, progress)
    looked, read, layers = len(models), found.tokens, dict[str, str]()
    if per_layer and len(models) > 1:  # `run` may have left one
        by_layer = ranked.layers if ranked else estimate_layers(models, seed, experts, store, progress)
        search = search_layers(models, found.losses, by_layer, seed, partition, documents, store, progress)
        looked, read = looked + search.losses, read + search.tokens
        if len(set(search.choice.values())) > 1:
            layers = search.choice
            models[BY_LAYER] = assemble({layer: models[answer] for layer, answer in layers.items()}, store)
            found = tune(models, seed, partition, documents, store, progress)
            read += found.tokens
    best = min(models, key=lambda one: found.losses[one].value)
    if name:
        store.name(name, models[best].digest)
    test = test_best(models[best], name or best, seed, partition, documents, store, progress)
    return ChosenMerge(best, found, ranked, layers, looked, read, time.perf_counter() - started, test), models


def test_best(
    best: Merged, name: str, seed: Seed, partition: str, documents: int | None, store: Store, progress: Progress
) -> ContestResult:  # fmt: skip
    """Whether the best is better than the seed, on fresh blocks: those of the gate split."""
    columns = open_columns(seed, partition, documents, store, stay=True)
    return hold_contest(seed, best, (seed.name, name), columns, StoppingRule(cap=TESTED), CLIP, progress)


def open_columns(seed: Seed, partition: str, documents: int | None, store: Store, *, stay: bool = False) -> Columns:
    """The columns of the holdout that merges are chosen on."""
    division = store.load(partition, Partition)
    length = min(seed.context, 1024)
    return Columns(HoldoutSpec(partition=division.digest, seed=seed.digest, length=length, documents=documents), store, stay=stay)


def tune(
    models: Mapping[str, Record], seed: Seed, partition: str, documents: int | None, store: Store, progress: Progress
) -> Tuned:  # fmt: skip
    """Score models on the tune half."""
    table = open_columns(seed, partition, documents, store)
    held = table.held
    asked = [(name, record.digest) for name, record in models.items()]
    found = ensure(asked, table, windows=dict.fromkeys((digest for _, digest in asked), _tune_windows(held)), progress=progress)
    columns = {name: found.columns[digest] for name, digest in asked}
    losses = {name: bits_per_byte(column, held, held.tune_D) for name, column in columns.items()}
    best = columns[min(losses, key=lambda name: losses[name].value)]
    return Tuned(losses, {name: difference(column, best, held, held.tune_D) for name, column in columns.items()}, found.tokens)


def _tune_windows(held: Holdout) -> NDArray[np.integer]:
    return np.unique(held.window_N[held.tune_N])


# ---- layer by layer -------------------------------------------------------------------------------------------------


def search_layers(
    models: Mapping[str, Merged], losses: Mapping[str, Estimate], estimated: Mapping[str, Mapping[str, float]], seed: Seed,
    partition: str, documents: int | None, store: Store, progress: Progress,
) -> LayerSearch:  # fmt: skip
    """From the best answer, layer by layer to one of the two next best where the tune half is then predicted better (`by_coordinates`).
    One model stays open and its layers are exchanged, so trials leave nothing in the store."""
    from elmwood.ensemble.mixture import open_model  # torch
    from elmwood.evaluate.columns import run

    held = open_columns(seed, partition, documents, store).held
    window_W = _tune_windows(held)
    among_N = np.isin(held.window_N, window_W)
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
        loglik_N[among_N] = run(lm, held, wanted_W=window_W)
        return bits_per_byte(loglik_N, held, held.tune_D).value

    choice = by_coordinates(begin, others, list(names), estimated, loss)
    progress("layers", tried, tried, "trials")
    return LayerSearch(choice, tried, tried * int(held.windows.length_W[window_W].sum()))


# ---- ranked without running -----------------------------------------------------------------------------------------


def rank(
    models: Mapping[str, Merged], seed: Seed, experts: Sequence[Digest], partition: str, documents: int | None, store: Store,
    progress: Progress,
) -> Ranked:  # fmt: skip
    """Estimates by what the experts left of their text, or, where some left nothing, by their columns."""
    started = time.perf_counter()
    if layers := estimate_layers(models, seed, experts, store, progress):
        total = {name: sum(found.values()) for name, found in layers.items()}
    else:
        total = by_columns(models, seed, partition, documents, store, progress)
    return Ranked("statistics" if layers else "columns", total, layers, time.perf_counter() - started)


def estimate_layers(
    models: Mapping[str, Merged], seed: Seed, experts: Sequence[Digest], store: Store, progress: Progress
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Answer -> layer -> estimate from the experts' Fisher matrices; empty where some expert left no statistics."""
    try:
        for digest in experts:
            statistics.find_statistics(digest, store)
    except BadInput:
        return {}
    return estimates(seed, experts, models, store, "fisher", progress)


def by_columns(
    models: Mapping[str, Merged], seed: Seed, partition: str, documents: int | None, store: Store, progress: Progress
) -> dict[str, float]:  # fmt: skip
    """Bits per byte on the tune half by log-linear pools of the experts' columns, with no merge run. They rank weighted sums and know
    nothing of trimming and votes (docs/log/)."""
    table = open_columns(seed, partition, documents, store)
    held = table.held
    experts = sorted({one.expert for merged in models.values() for one in merged.contributions})
    asked = [("seed", seed.digest), *((digest[:8], digest) for digest in experts)]
    found = ensure(asked, table, windows=dict.fromkeys((digest for _, digest in asked), _tune_windows(held)), progress=progress)
    loglik_NE = np.column_stack([found.columns[digest][held.tune_N] for digest in experts])
    seed_N, size = found.columns[seed.digest][held.tune_N], float(np.log(2) * held.bytes_D[held.tune_D].sum())
    return {name: -float(pool(loglik_NE, seed_N, coefficients(one, experts)).sum()) / size for name, one in models.items()}


def coefficients(merged: Merged, experts: list[Digest]) -> Floats:
    """What each expert's delta is multiplied by in a weighted sum [E]; of other rules, what it would be if nothing were trimmed."""
    weight_of = {one.expert: float(np.mean(one.weight[0].values)) for one in merged.contributions}
    weight_E = np.array([weight_of.get(digest, 0.0) for digest in experts])
    scale = merged.settings.get("scale", 1.0)
    return scale * weight_E / (weight_E.sum() if merged.settings.get("normalise") else 1.0)
