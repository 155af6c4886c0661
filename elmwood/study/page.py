"""What there is to show of records: the page of a comparison, the names in a store, the lineage of a record and the map of a partition."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from elmwood.corpus.build import documents
from elmwood.domains import embed
from elmwood.engine import cores
from elmwood.errors import BadInput, BadRecord, Damaged, ElmwoodError
from elmwood.ranges import NewFile, checked
from elmwood.records import (
    Comparison,
    Contest,
    Corpus,
    Ensemble,
    Expert,
    Forest,
    Ledger,
    Merged,
    Mixture,
    Partition,
    Record,
    Seed,
    State,
    Statistics,
    Verdict,
)
from elmwood.report.contest import headline
from elmwood.report.data import Ancestor, Area, Curve, MapPoint, Report
from elmwood.report.domain_map import domain_map, project
from elmwood.report.notebook import grid, image
from elmwood.report.page import html
from elmwood.store import AnyStore, Named, Store, lineage
from elmwood.store.own import made_here
from elmwood.study.quality.evaluation import claims_in, conclusion, with_seconds
from elmwood.study.trial import say_limits
from elmwood.units import duration, short

PLACES = 600  # documents on the map: more take t-SNE ten seconds and the eye no further
DEEPEST = 20  # steps that the lines of a lineage are indented
SNIPPET = 160  # characters of a document
LIBRARIES = ("elmwood", "torch", "transformers", "peft", "numpy")


@checked
def report(comparison: Named, *, output: Annotated[Path | str, NewFile()] = Path("report.html"), store: AnyStore = None) -> Path:
    """Write the page of a comparison, or of the largest comparison of a forest. Raises BadInput, UnknownName."""
    store = Store(store)
    page = Path(output)
    page.write_text(render(find_comparison(comparison, store), store), encoding="utf-8")
    return page


def find_comparison(given: Named, store: Store) -> Comparison:
    """The comparison that a record or name stands for; a forest stands for its comparison with most rows. Raises BadInput, UnknownName."""
    record = store.load(given)
    if not isinstance(record, Forest):
        return store.load(record, Comparison)
    found = [one for one in _sound(store) if isinstance(one, Comparison) and one.forest == record.digest and one.rows]
    if not found:
        raise BadInput(f"forest {record.digest[:8]} has not been compared yet: run `elmwood eval {record.digest[:8]}` first")
    mine = made_here(store)
    return max(found, key=lambda one: (one.digest in mine, len(one.rows)))


def _sound(store: Store) -> Iterator[Record]:
    """All records that can be used; `verify` names the others."""
    for digest in store.records():
        with suppress(ElmwoodError):
            yield store.load(digest)


def render(comparison: Comparison, store: Store) -> str:
    """The HTML of a comparison of a forest; of single models, the table alone."""
    facts = {"machine": f"{cores()} cores, {platform.machine()}", "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES)}
    facts |= settings_of_rows(comparison.fitted)
    if comparison.digest not in made_here(store):
        facts["claimed by another"] = "this comparison was not made in this store, and nothing checked it here"
    if theirs := claims_in(comparison, store):
        facts["scores claimed by another"] = f"{', '.join(theirs)}: not checked here"
    if comparison.forest is None:
        return html(Report(title="Models compared", rows=comparison.rows, facts=facts))
    forest = store.load(comparison.forest, Forest)
    partition = store.load(forest.partition, Partition)
    seed = store.load(forest.seed, Seed)
    corpus = store.load(partition.corpus, Corpus)
    areas, places = map_domains(partition, store)
    found = _contests(forest, store)
    facts["corpus"] = f"{corpus.documents} documents, {short(corpus.bytes)}B, {corpus.holdout_share:.0%} held out"
    facts["seed"] = summary(seed)
    facts["holdout"] = comparison.holdout[:24]
    rows = with_seconds(comparison, store).rows
    timed = [row.machine_seconds for row in rows if row.machine_seconds]
    if timed:
        facts["further training, all rows"] = duration(sum(timed))
    return html(
        Report(
            title=f"A forest of {len(forest.experts)} experts",
            summary=conclusion(comparison),
            domains=areas,
            places=places,
            curves=_curves(seed, forest, comparison, store),
            rows=rows,
            chosen=comparison.chosen,
            routing=comparison.routing,
            growth=comparison.growth,
            contests=found.mine,
            claims=found.others,
            lineage=_lineage(forest, store),
            facts=facts,
        )
    )


def settings_of_rows(fitted: Mapping[str, float]) -> dict[str, str]:
    """One line for each row that has fitted settings. A record has those of the chosen row without its name as well."""
    by_row: dict[str, list[str]] = {}
    for name, value in fitted.items():
        row, colon, setting = name.rpartition(": ")
        by_row.setdefault(row if colon else "", []).append(f"{setting} {value:.4g}")
    chosen = by_row.pop("", [])
    named = {f"settings, {row}": ", ".join(settings) for row, settings in by_row.items()}
    return named or ({"settings": ", ".join(chosen)} if chosen else {})


def map_domains(partition: Partition, store: Store) -> tuple[tuple[Area, ...], tuple[MapPoint, ...]]:
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
            Area(
                name=domain.name,
                terms=domain.terms,
                fitted=partition.fit_sizes[number] if partition.fit_sizes else None,
                documents=domain.documents,
                bytes=domain.bytes,
                snippets=tuple(_begin(chosen[name]) for name in domain.examples if name in chosen),
            )
        )
    x_N2 = project(embed.load(partition.embedder, store).embed(texts), partition.rng_seed)
    places = tuple(
        MapPoint(x=float(np.clip(x, 0, 1)), y=float(np.clip(y, 0, 1)), domain=number, text=_begin(text))
        for (x, y), number, text in zip(x_N2, domain_N, texts, strict=True)
    )
    return tuple(areas), places


def _begin(text: str) -> str:
    return " ".join(text[: 2 * SNIPPET].split())[:SNIPPET]


def _curves(seed: Seed, forest: Forest, comparison: Comparison, store: Store) -> tuple[Curve, ...]:
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
        Curve(name=name, role=role, points=tuple((point.tokens, point.loss) for point in model.curve), domain=domain)
        for name, role, model, domain in found
        if model.curve
    )


class Contests(NamedTuple):
    """Contests by who held them."""

    mine: tuple[Contest, ...]
    others: tuple[Contest, ...]  # claims


def _contests(forest: Forest, store: Store) -> Contests:
    """Comparisons of this forest, its ensembles and its experts with other models."""
    models = {forest.digest, *forest.experts}
    found = []
    for record in _sound(store):
        if isinstance(record, Ensemble) and record.forest == forest.digest:
            models.add(record.digest)
        elif isinstance(record, Contest):
            found.append(record)
    here = made_here(store)
    about = [one for one in found if {one.a, one.b} & models]
    return Contests(tuple(one for one in about if one.digest in here), tuple(one for one in about if one.digest not in here))


def _lineage(record: Record, store: Store) -> tuple[Ancestor, ...]:
    return tuple(
        Ancestor(depth=depth, kind=one.kind, digest=one.digest, summary=summary(one)) for depth, one in lineage(store, record.digest)
    )


# ---- names and lineage ----------------------------------------------------------------------------------------------


class ShownRecord(NamedTuple):
    """One record of a lineage, or of a list of names."""

    depth: int  # below the record that is shown
    record: Record
    name: str  # what it is called in the store; empty where it has no name
    again: bool = False  # it was shown above, with all it was made from
    place: str = ""  # the device it was trained on, where this store knows

    @property
    def indent(self) -> int:
        """Steps to the right: those of its depth, as far as a line has room."""
        return min(self.depth, DEEPEST)

    @property
    def words(self) -> str:
        """What it holds."""
        if self.again:
            return "(above)"
        return summary(self.record) + (f", trained on {self.place}" if self.place else "")

    def __str__(self) -> str:
        return f"{'   ' * self.indent}{self.record.kind} {self.record.digest[:12]} {self.name}  {self.words}".rstrip()


class Shown(NamedTuple):
    """Records by their names, or one record and all it was made from. `print` it, or end a notebook's cell with it."""

    lines: tuple[ShownRecord, ...]
    record: Record | None  # the one that is shown; None for a list of names
    store: Store
    damaged: tuple[str, ...] = ()  # names whose records cannot be read, and why

    def __str__(self) -> str:
        return "\n".join(map(str, [*self.lines, *self.damaged]))

    def _repr_html_(self) -> str:
        rows = [("\xa0" * 4 * line.indent + line.record.kind, line.record.digest[:12], line.name, line.words) for line in self.lines]
        table = grid(("record", "digest", "name", ""), rows)
        if not isinstance(self.record, Partition):
            return table if self.record is None else (self.record._repr_html_() or "") + table
        areas, places = map_domains(self.record, self.store)
        dots = [place.model_copy(update={"text": ""}) for place in places]  # an image shows no text when one points at a dot
        return image(domain_map(areas, dots, alone=True)) + (self.record._repr_html_() or "") + table


def show(name: Named | None = None, store: AnyStore = None) -> Shown:
    """All names in the store; or one record with all it was made from, and the map of a partition. Raises UnknownName, Damaged."""
    store = Store(store)
    names = {digest: called for called, digest in store.names().items()}
    if name is None:
        return _show_names(store)
    lines: list[ShownRecord] = []
    above: set[str] = set()
    for depth, record in lineage(store, store.resolve(name)):
        lines.append(ShownRecord(depth, record, names.get(record.digest, ""), record.digest in above, trained_on(record, store)))
        above.add(record.digest)
    return Shown(tuple(lines), lines[0].record, store)


def _show_names(store: Store) -> Shown:
    lines, damaged = [], []
    for called, digest in store.names().items():
        try:
            lines.append(ShownRecord(0, store.read(digest), called))
        except (BadRecord, Damaged) as error:  # of one name; the others are shown
            damaged.append(f"{called}: {error}")
    return Shown(tuple(lines), None, store, tuple(damaged))


def trained_on(record: Record, store: Store) -> str:
    """The device that a model was trained on, if that was with this store; else empty."""
    said = [line["trained_on"] for line in store.logged(record.digest) if "trained_on" in line]
    return str(said[-1])[:40] if said else ""  # a store copied from elsewhere may have any text in its logs


def say_run(seed: Seed) -> list[str]:
    """Which step of which run a seed was kept at, for runs that keep several."""
    if not seed.run or not seed.recipe:
        return []
    step = seed.step or seed.recipe.steps
    before = ", before the decay" if seed.recipe.schedule == "wsd" and step <= seed.recipe.stable else ""
    return [f"step {step} of {seed.recipe.steps} of run {seed.run[:8]}{before}"]


def summary(record: Record) -> str:
    """One line on what a record holds."""
    match record:
        case Corpus():
            left = sum(record.rejected.values())
            return f"{record.documents} documents, {short(record.bytes)}B" + (f", {left} left out" if left else "")
        case Partition():
            return f"{len(record.domains)} domains, {record.embedder.name}, {record.method}"
        case Seed():
            about = f"{record.name}: {record.architecture}, {short(record.parameters)} parameters, vocabulary {record.vocabulary}"
            grown = [f"grown from {record.grown_from[:8]}"] if record.grown_from else []
            return "; ".join([about, *say_run(record), *grown, *say_limits(record)])
        case Expert():
            where = "all domains" if record.domain is None else f"domain {record.domain}"
            late = "" if record.recipe.late == 1 else f" in the last {record.recipe.late:.0%} of the layers"
            return f"{record.recipe.method}{late}, {where}, {short(record.recipe.tokens)} tokens"
        case Statistics():
            return f"over {short(record.tokens)} tokens"
        case Forest():
            return f"{len(record.experts)} experts"
        case Ensemble():
            mixed = {"weights": ", weights mixed for each prompt", "activated": ", activated after the prompt"}.get(record.mixing, "")
            mixed += f", {record.aggregation}" if record.aggregation != "arithmetic" else ""
            mixed += f", {len(record.bounded)} experts within {record.bound:g} nats of the seed" if record.bounded else ""
            return f"{record.router}, top-{record.top_k}, temperature {record.temperature:.3g}{mixed}"
        case Merged():
            off = "" if record.error is None else f", {record.error:.2g} from the exact sum"
            return f"{record.method} of {len(record.contributions)} experts{off}"
        case Mixture():
            tuned = f", tuned: {record.recipe.tuned}" if record.recipe else ""
            return f"{len(record.experts)} experts, top-{record.gates.top_k}, {record.gates.kind} gates, {record.layout}{tuned}"
        case State():
            part = "" if record.part == (0, 1) else f", part {record.part[0]}/{record.part[1]}"
            return f"{record.method} of {len(record.contributions)} experts, unfinished{part}"
        case Verdict():
            failed = [check.name.split(":")[0].split(",")[0] for check in record.checks if not check.passed]
            return "accepted" if record.accepted else ": ".join(["refused", *failed[:1]])
        case Ledger():
            return f"{len(record.entries)} submissions, {sum(entry.accepted is True for entry in record.entries)} accepted"
        case Contest():
            return f"{headline(record)}: {record.effect:+.4f} bits per byte, {record.drawn} of {record.touched} blocks"
        case Comparison():
            if not record.rows:
                return "no rows"
            best = min(record.rows, key=lambda row: row.bits_per_byte)
            return f"{len(record.rows)} rows; lowest {best.bits_per_byte:.4f} bits/byte: {best.name}"
    return ""
