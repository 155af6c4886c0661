"""`elmwood eval`: any models on held-out text, side by side; of a forest, every routing of it."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from elmwood import evaluate
from elmwood.cli.screen import bars, duration, emit, expand, short, table, talk
from elmwood.domains.embed import EMBEDDERS
from elmwood.domains.partition import serving
from elmwood.domains.route import nearest_place
from elmwood.engine import Progress
from elmwood.errors import BadInput
from elmwood.records import Comparison, Digest, Ensemble, Expert, Forest, Partition, Record, Seed
from elmwood.store import Store
from elmwood.study.ancestry import common_seed, partition_of, with_mixing
from elmwood.study.scoring import Columns, ensure
from elmwood.study.tasks import default_workers, label, opener


def evaluate_verb(*, models, mixing, partition, length, documents, router, name, workers, store, as_json) -> None:
    home = Store(store)
    opened = [home.load(model) for model in expand(home, models)]
    if mixing:
        opened = [with_mixing(model, mixing, home) for model in opened]
        if name and len(opened) == 1:
            home.name(name, opened[0].digest)
    comparison, ensemble = compare_models(
        opened, models, home, partition=partition, length=length, documents=documents, workers=workers, router=router
    )
    if ensemble and name:
        home.name(name, ensemble.digest)
        talk.print(f"{ensemble.digest}  {name}  ({ensemble.router}, top-{ensemble.top_k}, temperature {ensemble.temperature:.3g})")
    domains = [domain.name for domain in partition_of(opened, partition, home).domains]
    if as_json:
        emit(comparison.model_dump(mode="json") | {"digest": comparison.digest, "domains": domains})
        return
    print_comparison(comparison)
    if comparison.forest is None:
        print_domains(comparison, domains)


def compare_models(
    models: Sequence[Record], names: Sequence[str], store: Store, *, partition: str | None, length: int | None, documents: int | None,
    workers: int | None, router: str | None = None,
) -> tuple[Comparison, Ensemble | None]:  # fmt: skip
    """`elmwood eval`: one forest against its seed with every routing, or any models side by side."""
    forests = [model for model in models if isinstance(model, Forest)]
    division = partition_of(models, partition, store)
    seed = common_seed(models, store)
    length = length or min(seed.context, 1024)
    spec = evaluate.HoldoutSpec(partition=division.digest, seed=seed.digest, length=length, documents=documents)
    if forests and len(models) > 1:
        raise BadInput("a forest is compared with its seed and its own routings: name one forest, or only models")
    workers = workers or default_workers(seed, len(models))
    with bars() as progress:
        if not forests:
            return _side_by_side(models, names, seed, spec, store, workers, progress), None
        forest = forests[0]
        experts = [store.load(digest, Expert) for digest in forest.experts]
        named = [("seed", seed.digest), *((label(division, expert.domain), expert.digest) for expert in experts)]
        ensured = ensure(named, Columns(spec, store), workers=workers, progress=progress)
        held, columns = ensured.holdout, ensured.columns
        dist2_NK, sparse2_NK = both_distances(held, division, store, progress)
    served = serving(division, [(expert.partition, expert.domain) for expert in experts], store)
    owners = [[e for e, places in enumerate(served) if k in places] for k in range(len(division.domains))]
    if any(len(mine) != 1 for mine in owners):
        found = ", ".join(f"{k}: {len(mine)}" for k, mine in enumerate(owners) if len(mine) != 1)
        raise BadInput(
            f"the table needs one expert for each domain, and here domains have others ({found}): train or leave out some, or evaluate "
            "an ensemble of these"
        )
    order = sorted({mine[0] for mine in owners})  # a forest has its experts by digest
    side = evaluate.Side(
        np.column_stack([columns[experts[e].digest] for e in order]),
        nearest_place(dist2_NK, [served[e] for e in order]),
        owners=tuple(order.index(mine[0]) for mine in owners),
        sparse2_NK=None if sparse2_NK is None else nearest_place(sparse2_NK, [served[e] for e in order]),
    )
    return keep_comparison(evaluate.compare(held, columns[seed.digest], side, router=router), held, forest, (), store)


def _side_by_side(
    models: Sequence[Record], names: Sequence[str], seed: Seed, spec: evaluate.HoldoutSpec, store: Store, workers: int, progress: Progress
) -> Comparison:
    named = [(name, model.digest) for name, model in zip(names, models, strict=True)]
    ensured = ensure(named, Columns(spec, store), workers=workers, progress=progress)
    held = ensured.holdout
    domains = len(store.load(spec.partition, Partition).domains)
    rows = tuple(
        evaluate.row(name, ensured.columns[model.digest], held, domains=domains, role="seed" if model.digest == seed.digest else "result")
        for name, model in zip(names, models, strict=True)
    )
    comparison = Comparison(forest=None, controls=tuple(model.digest for model in models), holdout=held.name, rows=rows)
    store.add(comparison)
    return comparison


def both_distances(
    held: evaluate.Holdout, division: Partition, store: Store, progress: Progress
) -> tuple[NDArray[np.floating], NDArray[np.floating] | None]:
    """Squared distances to dense centroids, and to sparse ones where the embedder has terms [N, K]."""
    dist2_NK = evaluate.distances(held, division, store, progress, open_model=opener(division.embedder.name))
    termed = division.embedder.name in EMBEDDERS
    return dist2_NK, evaluate.distances(held, division, store, progress, signal="sparse") if termed else None


def keep_comparison(
    compared: evaluate.Compared, held: evaluate.Holdout, forest: Forest, controls: tuple[Digest, ...], store: Store
) -> tuple[Comparison, Ensemble]:
    """Store what was found: the table, and the ensemble with the settings that were best on the tune half."""
    ensemble = Ensemble(forest=forest.digest, **asdict(compared.best.routing))
    comparison = Comparison(
        forest=forest.digest, controls=controls, holdout=held.name, rows=compared.rows, routing=compared.routing,
        fitted=compared.fitted, chosen=compared.chosen, growth=compared.growth,
    )  # fmt: skip
    for record in (forest, ensemble, comparison):
        store.add(record)
    return comparison, ensemble


def print_domains(comparison: Comparison, domains: Sequence[str]) -> None:
    """Models side by side in each domain, then all domains alike, then by their bytes."""
    head = ["", *(row.name for row in comparison.rows)]
    losses = [(name, [row.domains[place] for row in comparison.rows]) for place, name in enumerate(domains)]
    losses += [("macro: each domain alike", [row.macro for row in comparison.rows])]
    losses += [("micro: by bytes", [row.bits_per_byte for row in comparison.rows])]
    rows = [[name, *("" if value is None else f"{value:.4f}" for value in values)] for name, values in losses]
    table("bits per byte of each domain", head, rows, [*[""] * len(domains), "cyan", "cyan"])


def print_comparison(comparison: Comparison) -> None:
    """The table of results and controls, best last in each block as given."""
    timed = any(row.steps for row in comparison.rows)
    held_against = any(row.gain is not None for row in comparison.rows)
    head = ["", "bits/byte", "±", "ppl"]
    head += ["gain", "±"] if held_against else []
    head += ["batch", "steps", "tokens", "machine time", "wall clock"] if timed else []

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows, styles = [], []
    for row in comparison.rows:
        cells = [row.name, f"{row.bits_per_byte:.4f}", f"{row.standard_error:.4f}", f"{row.perplexity:.4g}"]
        cells += [number(row.gain, "+.4f"), number(row.gain_error, ".4f")] if held_against else []
        if timed:
            cells += [number(row.batch, "d"), number(row.steps, "d"), "" if row.tokens is None else short(row.tokens)]
            cells += ["" if seconds is None else duration(seconds) for seconds in (row.machine_seconds, row.wall_seconds)]
        rows.append(cells)
        styles.append({"seed": "", "control": "cyan", "result": "green", "bound": "dim"}[row.role])
    gain = "; gain over the strongest dense control, paired" if held_against else ""
    table(f"bits per byte on held-out documents (test half){gain}", head, rows, styles)
