"""A comparison in the store -> what the report shows of it."""

import platform
from importlib.metadata import version

import numpy as np

from elmwood import report
from elmwood.cli.old_things import summary
from elmwood.cli.screen import duration, emit, out, short
from elmwood.corpus.build import documents
from elmwood.domains import embed
from elmwood.engine import cores
from elmwood.errors import BadInput
from elmwood.records import Comparison, Contest, Corpus, Ensemble, Expert, Forest, Partition, Record, Seed
from elmwood.store import Store, lineage
from elmwood.study.evaluation import conclusion
from elmwood.study.tasks import opener

PLACES = 2000  # documents on the map
SNIPPET = 160  # characters of a document
LIBRARIES = ("elmwood", "torch", "transformers", "peft", "numpy")


def page(comparison: Comparison, store: Store) -> str:
    """The HTML of a comparison of a forest; of single models, the table alone."""
    facts = {"machine": f"{cores()} cores, {platform.machine()}", "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES)}
    facts |= {name: f"{value:.4g}" for name, value in comparison.fitted.items()}
    if comparison.forest is None:
        return report.html(report.Report(title="Models compared", rows=comparison.rows, facts=facts))
    forest = store.load(comparison.forest, Forest)
    partition = store.load(forest.partition, Partition)
    seed = store.load(forest.seed, Seed)
    corpus = store.load(partition.corpus, Corpus)
    areas, places = _map(partition, store)
    facts["corpus"] = f"{corpus.documents} documents, {short(corpus.bytes)}B, {corpus.holdout_share:.0%} held out"
    facts["seed"] = summary(seed)
    facts["holdout"] = comparison.holdout[:24]
    timed = [row.machine_seconds for row in comparison.rows if row.machine_seconds]
    if timed:
        facts["further training, all rows"] = duration(sum(timed))
    return report.html(
        report.Report(
            title=f"A forest of {len(forest.experts)} experts",
            summary=conclusion(comparison),
            domains=areas,
            places=places,
            curves=_curves(seed, forest, comparison, store),
            rows=comparison.rows,
            chosen=comparison.chosen,
            routing=comparison.routing,
            growth=comparison.growth,
            contests=_contests(forest, store),
            lineage=_lineage(forest, store),
            facts=facts,
        )
    )


def _map(partition: Partition, store: Store) -> tuple[tuple[report.Area, ...], tuple[report.Place, ...]]:
    """The domains, and some of each domain's documents in the plane."""
    share = max(1, PLACES // len(partition.domains))
    texts: list[str] = []
    domain_N: list[int] = []
    areas = []
    for number, domain in enumerate(partition.domains):
        chosen = {}
        for place, document in enumerate(documents(domain.train, store)):
            if place < share or document.id in domain.examples:
                chosen[document.id] = document.text
        texts += chosen.values()
        domain_N += [number] * len(chosen)
        areas.append(
            report.Area(
                name=domain.name,
                terms=domain.terms,
                fitted=partition.fit_sizes[number] if partition.fit_sizes else None,
                documents=domain.documents,
                bytes=domain.bytes,
                snippets=tuple(_begin(chosen[name]) for name in domain.examples if name in chosen),
            )
        )
    x_N2 = report.project(embed.load(partition.embedder, store, opener(partition.embedder.name)).embed(texts), partition.rng_seed)
    places = tuple(
        report.Place(x=float(np.clip(x, 0, 1)), y=float(np.clip(y, 0, 1)), domain=number, text=_begin(text))
        for (x, y), number, text in zip(x_N2, domain_N, texts, strict=True)
    )
    return tuple(areas), places


def _begin(text: str) -> str:
    return " ".join(text[: 2 * SNIPPET].split())[:SNIPPET]


def _curves(seed: Seed, forest: Forest, comparison: Comparison, store: Store) -> tuple[report.Curve, ...]:
    """Training loss of the seed, the dense controls and the experts."""
    partition = store.load(forest.partition, Partition)
    controls = [model for model in map(store.load, comparison.controls) if isinstance(model, Expert)]
    names = [row.name for row in comparison.rows if row.name.startswith("dense")]
    found: list[tuple[str, str, Seed | Expert, int | None]] = [("seed", "seed", seed, None)]
    found += [(name, "control", model, None) for name, model in zip(names, controls, strict=False)]
    for digest in forest.experts:
        expert = store.load(digest, Expert)
        found.append((partition.domains[expert.domain or 0].name, "expert", expert, expert.domain))
    return tuple(
        report.Curve(name=name, role=role, points=tuple((point.tokens, point.loss) for point in model.curve), domain=domain)
        for name, role, model, domain in found
        if model.curve
    )


def _contests(forest: Forest, store: Store) -> tuple[Contest, ...]:
    """Comparisons of this forest, its ensembles and its experts with other models."""
    mine = {forest.digest, *forest.experts}
    found = []
    for digest in store.records():
        record = store.load(digest)
        if isinstance(record, Ensemble) and record.forest == forest.digest:
            mine.add(digest)
        elif isinstance(record, Contest):
            found.append(record)
    return tuple(one for one in found if {one.a, one.b} & mine)


def _lineage(record: Record, store: Store) -> tuple[report.Ancestor, ...]:
    return tuple(
        report.Ancestor(depth=depth, kind=one.kind, digest=one.digest, summary=summary(one)) for depth, one in lineage(store, record.digest)
    )


def report_verb(*, comparison, output, store, as_json) -> None:
    home = Store(store)
    record = home.load(comparison)
    if isinstance(record, Forest):
        found = [home.load(digest) for digest in home.records()]
        mine = [one for one in found if isinstance(one, Comparison) and one.forest == record.digest]
        if not mine:
            raise BadInput(f"forest {record.digest[:8]} has not been compared yet: run `elmwood eval {comparison}` first")
        record = max(mine, key=lambda one: len(one.rows))
    record = home.load(record.digest, Comparison)
    output.write_text(page(record, home))
    if as_json:
        emit({"report": str(output)})
    else:
        out.print(str(output), soft_wrap=True)
