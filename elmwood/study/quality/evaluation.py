"""Models on held-out text: any side by side, or a forest with every routing of it; and standard benchmarks.

N scored tokens, K domains
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.distances import nearest_place
from elmwood.domains.embed import has_terms
from elmwood.domains.partition import serving
from elmwood.engine import Progress, placed, silent
from elmwood.errors import BadInput
from elmwood.evaluate import harness
from elmwood.evaluate.comparison import Compared, Side, compare
from elmwood.evaluate.holdout import Holdout, distances
from elmwood.evaluate.losses import row
from elmwood.evaluate.partial import claimed
from elmwood.ranges import Between, Documents, Window, checked
from elmwood.records import Comparison, Digest, Ensemble, Expert, Forest, Partition, Record, Seed
from elmwood.store import AnyStore, Named, Store
from elmwood.store.own import keep_own
from elmwood.study.ancestry import Settings, common_seed, name_of, open_model, partition_of, seed_of, with_mixing
from elmwood.study.quality.scoring import Columns, ensure, holdout_spec
from elmwood.study.tasks import default_workers, label

Floats = NDArray[np.floating]
SECONDS = ("machine_seconds", "wall_seconds")  # of a row
TOO_SHORT = " Further training made no dense model better than the seed, so this gain is no result: train on more tokens."
Some = Annotated[int | None, Between(1)]


class Evaluation(NamedTuple):
    """A comparison, the names of its domains, and the ensemble with the best settings where a forest was evaluated."""

    record: Comparison
    domains: tuple[str, ...]
    fitted: Ensemble | None = None
    claimed: tuple[str, ...] = ()  # models whose scores are claims of another store, not checked here

    @property
    def ensemble(self) -> Ensemble:
        """The fitted ensemble. Raises BadInput where no forest was evaluated."""
        if self.fitted is None:
            raise BadInput("these models were scored side by side, so no ensemble was fitted: evaluate a forest")
        return self.fitted

    def _repr_html_(self) -> str | None:
        return self.record._repr_html_()


@placed
@checked
def evaluate(
    models: Named | Sequence[Named], store: AnyStore = None, *, mixing: str | None = None, settings: Settings | None = None,
    partition: Named | None = None, length: Window = None, documents: Documents = None, router: str | None = None,
    name: str | None = None, workers: Some = None, device: str | None = None, progress: Progress = silent,
) -> Evaluation:  # fmt: skip
    """Bits per byte on held-out documents: of models side by side, or of one forest with every routing, its settings fitted.

    mixing, settings: of ensembles, how experts become one model, and other values of their fields. partition: the one whose held-out text
    is used. router: of the fitted ensemble. name: of the fitted ensemble of a forest, or of the only one with other settings.
    Raises BadInput, UnknownName.
    """
    home = Store(store)
    if name:
        home.check_name(name)
    named = home.expand(models)
    opened = [home.load(model) for model in named]
    if not opened:
        raise BadInput("no model is named: name seeds, experts, merges, ensembles or a forest")
    opened = [with_mixing(model, mixing, home, settings) for model in opened]
    forests = [model for model in opened if isinstance(model, Forest)]
    if forests and len(opened) > 1:
        raise BadInput("a forest is compared with its seed and its own routings: name one forest, or only models")
    division, seed = partition_of(opened, partition, home), common_seed(opened, home)
    columns = Columns(holdout_spec(division, seed, length, documents), home)
    workers = workers or default_workers(seed, len(opened))
    if forests:
        comparison, ensemble = _evaluate_forest(forests[0], seed, division, columns, router, workers, progress)
    else:
        titles = [name_of(model, home) for model in named]
        comparison, ensemble = _side_by_side(opened, titles, seed, columns, workers, progress), None
    kept = ensemble or (opened[0] if (mixing or settings) and len(opened) == 1 else None)
    if name and kept:
        home.name(name, kept.digest)
    return Evaluation(
        comparison, tuple(domain.name for domain in division.domains), ensemble, claims_in(comparison, home)
    )  # fmt: skip


def claims_in(comparison: Comparison, store: Store) -> tuple[str, ...]:
    """Beginnings of the digests of the models in a comparison whose scores are claims of another store."""
    forest = [store.load(comparison.forest, Forest)] if comparison.forest else []
    models = [digest for one in forest for digest in (one.seed, *one.experts)]
    known = [digest for digest in (*models, *comparison.controls) if store.has(digest)]
    return tuple(digest[:8] for digest in claimed(known, comparison.holdout, store))


def _evaluate_forest(
    forest: Forest, seed: Seed, division: Partition, columns: Columns, router: str | None, workers: int, progress: Progress
) -> tuple[Comparison, Ensemble]:
    """A forest against its seed, with every routing. Raises BadInput where a domain has not one expert."""
    store = columns.store
    experts = [store.load(digest, Expert) for digest in forest.experts]
    served = serving(division, [(expert.partition, expert.domain) for expert in experts], store)
    owners = [[e for e, places in enumerate(served) if k in places] for k in range(len(division.domains))]
    if any(len(mine) != 1 for mine in owners):
        found = ", ".join(f"{k}: {len(mine)}" for k, mine in enumerate(owners) if len(mine) != 1)
        raise BadInput(
            f"the table needs one expert for each domain, and these domains have other numbers ({found}): train or leave out some, or "
            "evaluate an ensemble of these"
        )
    named = [("seed", seed.digest), *((label(division, expert.domain), expert.digest) for expert in experts)]
    ensured = ensure(named, columns, workers=workers, progress=progress)
    dist2_NK, sparse2_NK = measure_distances(ensured.holdout, division, store, progress)
    order = sorted({mine[0] for mine in owners})  # a forest has its experts by digest
    side = Side(
        np.column_stack([ensured.columns[experts[e].digest] for e in order]),
        nearest_place(dist2_NK, [served[e] for e in order]),
        owners=tuple(order.index(mine[0]) for mine in owners),
        sparse2_NK=None if sparse2_NK is None else nearest_place(sparse2_NK, [served[e] for e in order]),
    )
    compared = compare(ensured.holdout, ensured.columns[seed.digest], side, router=router)
    return keep_comparison(compared, ensured.holdout, forest, (), store)


def _side_by_side(
    models: Sequence[Record], titles: Sequence[str], seed: Seed, columns: Columns, workers: int, progress: Progress
) -> Comparison:
    named = [(title, model.digest) for title, model in zip(titles, models, strict=True)]
    ensured = ensure(named, columns, workers=workers, progress=progress)
    domains = len(columns.store.load(columns.spec.partition, Partition).domains)
    rows = tuple(
        row(title, ensured.columns[digest], ensured.holdout, domains=domains, role="seed" if digest == seed.digest else "result")
        for title, digest in named
    )
    comparison = Comparison(forest=None, controls=tuple(model.digest for model in models), holdout=ensured.holdout.name, rows=rows)
    keep_own(comparison, columns.store)
    return comparison


def measure_distances(
    held: Holdout, division: Partition, store: Store, progress: Progress = silent
) -> tuple[Floats, Floats | None]:  # fmt: skip
    """Squared distances to dense centroids, and to sparse ones where the embedder has terms [N, K]."""
    dist2_NK = distances(held, division, store, progress)
    termed = has_terms(division.embedder.name)
    return dist2_NK, distances(held, division, store, progress, signal="sparse") if termed else None


def keep_comparison(
    compared: Compared, held: Holdout, forest: Forest, controls: tuple[Digest, ...], store: Store
) -> tuple[Comparison, Ensemble]:
    """Store what was found: the table, and the ensemble with the settings that were best on the tune half."""
    ensemble = Ensemble(forest=forest.digest, **asdict(compared.best.routing))
    rows = tuple(one.model_copy(update=dict.fromkeys(SECONDS)) for one in compared.rows)
    comparison = Comparison(
        forest=forest.digest, controls=controls, holdout=held.name, rows=rows, routing=compared.routing,
        fitted=compared.fitted, chosen=compared.chosen, growth=compared.growth,
    )  # fmt: skip
    for record in (forest, ensemble):
        store.add(record)
    keep_own(comparison, store)
    known = {line.get("row") for line in store.logged(comparison.digest)}
    for one in compared.rows:
        if one.machine_seconds is not None and one.name not in known:
            store.log(comparison.digest, row=one.name, **one.model_dump(include=set(SECONDS)))
    return comparison, ensemble


def with_seconds(comparison: Comparison, store: Store) -> Comparison:
    """The comparison with what this machine logged of its rows, to be shown. Seconds are no part of the record."""
    logged = {line.get("row"): {field: line.get(field) for field in SECONDS} for line in store.logged(comparison.digest)}
    return comparison.model_copy(update={"rows": tuple(one.model_copy(update=logged.get(one.name, {})) for one in comparison.rows)})


def conclusion(comparison: Comparison) -> str:
    """The result in one sentence, whichever way it went: the ensemble chosen on the tune half against every control."""
    results = [row for row in comparison.rows if row.role == "result"]
    best = next((row for row in results if row.name == comparison.chosen), min(results, key=lambda row: row.bits_per_byte))
    margin = f" ({best.gain:+.4f} ± {best.gain_error:.4f} bits per byte against the strongest dense model)" if best.gain is not None else ""
    ahead = [row.name for row in comparison.rows if row.role in ("seed", "control") and row.bits_per_byte <= best.bits_per_byte]
    if ahead:
        said = f"{best.name} was chosen on the tune half and does not beat: {'; '.join(ahead)}{margin}."
    elif best.gain is not None and best.gain < 2 * (best.gain_error or 0):
        said = f"{best.name} is level with the best control: the difference is within two standard errors{margin}."
    else:
        said = f"{best.name} is better than every control{margin}."
    return said + (TOO_SHORT if _no_dense_model_learned(comparison) else "")


def _no_dense_model_learned(comparison: Comparison) -> bool:
    """Whether the seed is better than the strongest dense control, which gains are over."""
    reference = next((row for row in comparison.rows if row.gain is None and row.role == "control"), None)
    seed = next((row for row in comparison.rows if row.role == "seed"), None)
    return reference is not None and seed is not None and seed.bits_per_byte < reference.bits_per_byte


# ---- benchmarks -----------------------------------------------------------------------------------------------------


class Benchmarked(NamedTuple):
    """One model on standard benchmarks."""

    name: str
    record: Record
    results: dict[str, Any]  # lm_eval (version), tasks, groups, asked: see evaluate.harness.benchmark


@placed
@checked
def benchmark(
    models: Named | Sequence[Named], tasks: str | Sequence[str], store: AnyStore = None, *, mixing: str | None = None,
    settings: Settings | None = None, limit: Some = None, folder: Path | None = None, download: bool = False, bos: str = "tokenizer",
    device: str | None = None, progress: Progress = silent,
) -> list[Benchmarked]:  # fmt: skip
    """Models on tasks of lm-evaluation-harness. Answers are kept, so no request is computed twice.

    tasks: names, or one text with commas. limit: items of each task, the same for every model. folder: your own tasks, the harness's YAML
    files and their data. download: let tasks fetch their data. bos: before each text, what its `tokenizer` adds by itself, as in the
    harness, `always` a bos (the separator where the tokenizer has none), or `never`. Raises BadInput, UnknownName, MissingExtra.
    """
    if bos not in harness.BOS:
        raise BadInput(f"bos is {bos!r}: choose {', '.join(harness.BOS)}")
    if not download:
        harness.forbid_downloads()
    from elmwood.ensemble.generate import generate  # torch, and the libraries that may not fetch
    from elmwood.lm.load import end_tokens, open_tokenizer, own_generation

    home = Store(store)
    asked = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name.strip() for name in asked if name.strip()]
    if not names:
        raise BadInput("no task is named: name tasks of the harness, such as arc_easy,lambada_openai")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    records = {name_of(model, home): home.load(model) for model in home.expand(models)}
    loaded, found = harness.open_tasks(names, folder, limit), []
    for title, record in records.items():
        opened = open_model(record, mixing=mixing, settings=settings, store=home)
        seed, add_bos = seed_of(record, home), harness.BOS[bos]
        words = harness.Words(
            open_tokenizer(seed, home, add_bos), seed.separator, frozenset(end_tokens(seed, home)), add_bos, own_generation(seed, home)
        )  # fmt: skip
        reader = harness.Reader(
            opened.lm, words, harness.Answers(home, opened.record.digest), generate,
            lambda what, *event, title=title: progress(f"{title}: {what}", *event),
        )  # fmt: skip
        found.append(Benchmarked(title, opened.record, harness.benchmark(loaded, reader)))
    return found
