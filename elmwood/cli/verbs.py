"""What each verb does: open what the user named, call one room after another, print what was made."""

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from elmwood.cli.screen import bars, count, duration, emit, made, out, short, table, talk
from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.engine import cores, run
from elmwood.errors import BadInput, ForeignExpert
from elmwood.records import Comparison, Corpus, Ensemble, Expert, Forest, Partition, Recipe, Record, Seed, Shape, Shard
from elmwood.store import Store, lineage
from elmwood.store import verify as check

SMALL = 20_000_000  # parameters below which one core per model is better used than two cores on one
TINY = 10_000_000  # parameters below which a model has learned little, and takes the rates of one trained from scratch


def cluster(*, corpus, domains, embedder, method, holdout, field, rng_seed, name, store, as_json) -> None:
    home = Store(store)
    with bars() as progress:
        read = build(corpus, home, holdout=holdout, field=field, progress=progress)
        partition = divide(read, home, domains=domains, embedder=embedder, method=method, rng_seed=rng_seed, progress=progress)
    say_read(read)
    if not as_json:
        sizes = partition.fit_sizes
        rows = [
            (domain.name, str(domain.documents), short(domain.bytes), str(sizes[place]), str(sum(s.documents for s in domain.holdout)))
            for place, domain in enumerate(partition.domains)
        ]
        table("domains", ("terms", "documents", "bytes", "at the fit", "held out"), rows, to=talk)
    _made(home, partition, name, as_json)


def seed_import(*, model, separator, name, store, as_json) -> None:
    from elmwood.lm.load import import_seed  # torch

    home = Store(store)
    talk.print(f"importing {model}")
    _made(home, import_seed(model, home, name=name, separator=separator), name, as_json)


def seed_train(*, corpus, tokens, layers, width, vocabulary, length, batch, learning_rate, rng_seed, name, store, as_json) -> None:
    from elmwood.train import train_seed  # torch

    home = Store(store)
    shape = llama(layers, width, vocabulary, length)
    recipe = Recipe(
        steps=max(1, count(tokens) // (batch * length)), batch=batch, length=length, learning_rate=learning_rate, rng_seed=rng_seed,
        threads=cores(),
    )  # fmt: skip
    with bars() as progress:
        read = build(corpus, home, progress=progress)
        seed = train_seed(read, shape, recipe, home, name=name or "seed", progress=progress)
    say_read(read)
    _made(home, seed, name, as_json)


def llama(layers: int, width: int, vocabulary: int, context: int) -> Shape:
    """The proportions of a Llama: heads of 32 (64 from width 512), feed-forward 8/3 of the width in steps of 32."""
    return Shape(
        layers=layers, width=width, heads=max(1, width // (64 if width >= 512 else 32)), feed_forward=-(-width * 8 // 3 // 32) * 32,
        vocabulary=vocabulary, context=context,
    )  # fmt: skip


def default_rate(seed: Seed, method: str) -> float:
    """Peak learning rate where the user named none. LoRA takes about ten times the rate of full tuning (see docs/training.md)."""
    full = 2e-3 if seed.parameters < TINY else 2e-5
    return full * (1 if method == "full" else 10 if seed.parameters >= TINY else 2)


def default_workers(seed: Seed, jobs: int) -> int:
    """Small models: one core each, side by side. Large ones: one after another, with all cores."""
    return min(cores(), jobs) if seed.parameters < SMALL else 1


def train(*, partition, seed, domains, method, tokens, batch, length, learning_rate, rank, rng_seed, name, workers, store, as_json) -> None:
    from elmwood.cli.jobs import TrainJob, train_job  # torch

    home = Store(store)
    division, start = home.load(partition, Partition), home.load(seed, Seed)
    length = length or min(start.context, 1024)
    chosen: list[int | None] = [None] if domains == "pooled" else [*numbers(domains, len(division.domains))]
    workers = workers or default_workers(start, len(chosen))
    recipe = Recipe(
        method=method, steps=max(1, count(tokens) // (batch * length)), batch=batch, length=length,
        learning_rate=learning_rate or default_rate(start, method), rank=rank, rng_seed=rng_seed, threads=max(1, cores() // workers),
    )  # fmt: skip
    jobs = [
        TrainJob(
            store=store, label=label(division, domain), seed=start.digest, data=shards(division, domain), recipe=recipe,
            partition=division.digest, domain=domain,
        )
        for domain in chosen
    ]  # fmt: skip
    with bars() as progress:
        experts = run(train_job, jobs, workers=workers, progress=progress)
    for domain, digest in zip(chosen, experts, strict=True):
        given = name and f"{name}/{'pooled' if domain is None else domain}"
        _made(home, home.load(digest), given, as_json)


def numbers(text: str, total: int) -> Sequence[int]:
    """'all', or '0,3-5' -> (0, 3, 4, 5). Raises BadInput."""
    if text == "all":
        return range(total)
    try:
        ends = [tuple(int(end) for end in part.split("-")) for part in text.split(",")]
        chosen = sorted({number for part in ends for number in range(part[0], part[-1] + 1)})
    except ValueError as error:
        raise BadInput(f"{text!r} names no domains: write all, pooled, or numbers as in 0,3-5") from error
    if not chosen or chosen[-1] >= total:
        raise BadInput(f"{text!r} names domains beyond the {total} there are, which are numbered from 0 to {total - 1}")
    return chosen


def label(partition: Partition, domain: int | None) -> str:
    """What the progress bar calls a training job."""
    return "pooled" if domain is None else f"{domain} {partition.domains[domain].name}"[:28]


def shards(partition: Partition, domain: int | None) -> tuple[Shard, ...]:
    """The training shards of one domain, or of all."""
    chosen = partition.domains if domain is None else (partition.domains[domain],)
    return tuple(shard for one in chosen for shard in one.train)


def fit(*, seed, method, batch, length, rank, memory, store, as_json) -> None:
    from elmwood.train.fit import fit as predict  # torch

    home = Store(store)
    known = home.load(seed, Seed) if seed in home.names() or len(seed) == 64 else None
    length = length or min(known.context if known else 1024, 1024)
    recipe = Recipe(method=method, steps=1, batch=batch, length=length, rank=rank, threads=cores())
    answer = predict(known or seed, recipe, home, memory=memory and count(memory))
    if as_json:
        emit(answer.model_dump(mode="json"))
        return
    rows = [(what, short(size) + "B") for what, size in answer.components.items()]
    table(f"{method} on {seed}: {short(answer.parameters)} parameters", ("peak memory", ""), [*rows, ("total", short(answer.total) + "B")])
    out.print(f"{short(answer.tokens_per_second)} tokens/s here; a million tokens take {duration(1e6 / answer.tokens_per_second)}")
    out.print(answer.verdict)


def forest(*, partition, experts, name, store, as_json) -> None:
    home = Store(store)
    division = home.load(partition, Partition)
    members = [home.load(one, Expert) for one in expand(home, experts)]
    if not members:
        raise BadInput("a forest needs at least one expert: train some, then name them here")
    for expert in members:
        if expert.seed != members[0].seed:
            raise ForeignExpert(
                f"expert {expert.digest[:8]} grew from seed {expert.seed[:8]}, {members[0].digest[:8]} from {members[0].seed[:8]}; "
                "a forest has one seed: leave one of them out, or retrain it"
            )
        if expert.domain is None or expert.partition != division.digest:
            raise ForeignExpert(
                f"expert {expert.digest[:8]} was not trained on a domain of partition {division.digest[:8]}; "
                "a router would not know when to ask it: leave it out, or retrain it"
            )
    made_of = Forest(seed=members[0].seed, partition=division.digest, experts=tuple(expert.digest for expert in members))
    home.add(made_of)
    _made(home, made_of, name, as_json)


def expand(store: Store, names: Sequence[str]) -> list[str]:
    """Names with those that end in '/' replaced by all names below them. Raises BadInput."""
    found: list[str] = []
    for name in names:
        below = [known for known in store.names() if known.startswith(name)] if name.endswith("/") else [name]
        if not below:
            raise BadInput(f"no names begin with {name!r}; `elmwood show` lists them")
        found += below
    return found


def evaluate(*, models, partition, length, documents, name, workers, store, as_json) -> None:
    from elmwood.cli.study import compare_models  # torch

    home = Store(store)
    opened = [home.load(model) for model in expand(home, models)]
    comparison, ensemble = compare_models(opened, models, home, partition=partition, length=length, documents=documents, workers=workers)
    if ensemble and name:
        home.name(name, ensemble.digest)
        talk.print(f"{ensemble.digest}  {name}  (top-{ensemble.top_k}, temperature {ensemble.temperature:.3g})")
    if as_json:
        emit(comparison.model_dump(mode="json") | {"digest": comparison.digest})
    else:
        print_comparison(comparison)


def print_comparison(comparison: Comparison) -> None:
    """The table of results and controls, best last in each block as given."""
    timed = any(row.steps for row in comparison.rows)
    head = ["", "bits/byte", "±", "ppl", "gain", "±", *(["batch", "steps", "tokens", "machine time", "wall clock"] if timed else [])]

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows, styles = [], []
    for row in comparison.rows:
        cells = [row.name, f"{row.bits_per_byte:.4f}", f"{row.standard_error:.4f}", f"{row.perplexity:.4g}"]
        cells += [number(row.gain, "+.4f"), number(row.gain_error, ".4f")]
        if timed:
            cells += [number(row.batch, "d"), number(row.steps, "d"), "" if row.tokens is None else short(row.tokens)]
            cells += ["" if seconds is None else duration(seconds) for seconds in (row.machine_seconds, row.wall_seconds)]
        rows.append(cells)
        styles.append({"seed": "", "control": "cyan", "result": "green", "bound": "dim"}[row.role])
    table("bits per byte on held-out documents (test half); gain over the strongest dense control, paired", head, rows, styles)


def verdict(comparison: Comparison) -> str:
    """The result in one sentence, whichever way it went: the ensemble chosen on the tune half, held against every control."""
    results = [row for row in comparison.rows if row.role == "result"]
    best = next((row for row in results if row.name == comparison.chosen), min(results, key=lambda row: row.bits_per_byte))
    margin = f" ({best.gain:+.4f} ± {best.gain_error:.4f} bits per byte against the strongest dense model)" if best.gain is not None else ""
    ahead = [row.name for row in comparison.rows if row.role in ("seed", "control") and row.bits_per_byte <= best.bits_per_byte]
    if ahead:
        return f"{best.name} was chosen on the tune half and does not beat: {'; '.join(ahead)}{margin}."
    if best.gain is not None and best.gain < 2 * (best.gain_error or 0):
        return f"{best.name} is level with the best control: the difference is within two standard errors{margin}."
    return f"{best.name} is better than every control{margin}."


def chat(*, model, prompt, max_tokens, temperature, top_p, rng_seed, store, as_json) -> None:
    from elmwood.ensemble.generate import generate  # torch
    from elmwood.ensemble.mixture import open_model
    from elmwood.lm.load import tokenizer

    home = Store(store)
    record = as_model(home.load(model), home)
    lm = open_model(record, home)
    words = tokenizer(seed_of(record, home), home)
    asked = iter([prompt]) if prompt is not None else iter(lambda: input("> "), None)
    try:
        for text in asked:
            share: dict[str, float] = {}
            pieces: list[str] = []
            for step in generate(lm, words, text, max_tokens=max_tokens, temperature=temperature, top_p=top_p, rng_seed=rng_seed):
                for speaker, weight in step.weights.items():
                    share[speaker] = share.get(speaker, 0) + weight
                pieces.append(step.text)
                if not as_json:
                    sys.stdout.write(step.text)
                    sys.stdout.flush()
            total = sum(share.values()) or 1
            spoke = {who: round(weight / total, 4) for who, weight in sorted(share.items(), key=lambda item: -item[1])}
            if as_json:
                emit({"prompt": text, "text": "".join(pieces), "experts": spoke})
            else:
                sys.stdout.write("\n")
                talk.print("spoke: " + ", ".join(f"{who} {weight:.0%}" for who, weight in spoke.items() if weight >= 0.005), style="dim")
    except EOFError:
        talk.print("")


def as_model(record: Record, store: Store) -> Record:
    """A forest stands for its ensemble with the default settings; other records for themselves."""
    if isinstance(record, Forest):
        record = Ensemble(forest=record.digest)
        store.add(record)
    return record


def seed_of(record: Record, store: Store) -> Seed:
    """The seed a model grew from. Raises UnknownName."""
    if isinstance(record, Ensemble):
        record = store.load(record.forest, Forest)
    if isinstance(record, Expert | Forest):
        return store.load(record.seed, Seed)
    return store.load(record.digest, Seed)


def show(*, name, store, as_json) -> None:
    home = Store(store)
    if name is None:
        rows = [(ref, home.load(digest).kind, digest[:12], summary(home.load(digest))) for ref, digest in home.names().items()]
        if as_json:
            emit([dict(zip(("name", "kind", "digest", "summary"), row, strict=True)) for row in rows])
        elif rows:
            for ref, kind, digest, words in rows:
                out.print(f"{digest}  {kind:<10} {ref}  [dim]{words}[/dim]", soft_wrap=True)
        else:
            talk.print(f"{store} names nothing yet: begin with `elmwood demo` or `elmwood cluster`")
        return
    if as_json:
        emit(made_json(home.load(name)))
        return
    names = {digest: ref for ref, digest in home.names().items()}
    seen: set[str] = set()
    for depth, record in lineage(home, home.resolve(name)):
        again = record.digest in seen
        seen.add(record.digest)
        ref = names.get(record.digest, "")
        words = "(above)" if again else summary(record)
        out.print(f"{'   ' * depth}{record.kind} {record.digest[:12]} {ref}  [dim]{words}[/dim]".rstrip(), soft_wrap=True)


def made_json(record: Record) -> dict[str, Any]:
    return {"digest": record.digest, "record": record.model_dump(mode="json")}


def summary(record: Record) -> str:
    """One line on what a record holds."""
    match record:
        case Corpus():
            left = sum(record.rejected.values())
            return f"{record.documents} documents, {short(record.bytes)}B" + (f", {left} left out" if left else "")
        case Partition():
            return f"{len(record.domains)} domains, {record.embedder.name}, {record.method}"
        case Seed():
            return f"{record.name}: {record.architecture}, {short(record.parameters)} parameters, vocabulary {record.vocabulary}"
        case Expert():
            where = "all domains" if record.domain is None else f"domain {record.domain}"
            return f"{record.recipe.method}, {where}, {short(record.recipe.tokens)} tokens"
        case Forest():
            return f"{len(record.experts)} experts"
        case Ensemble():
            return f"{record.router}, top-{record.top_k}, temperature {record.temperature:.3g}"
        case Comparison():
            best = min(record.rows, key=lambda row: row.bits_per_byte)
            return f"{len(record.rows)} rows; lowest {best.bits_per_byte:.4f} bits/byte: {best.name}"
    return ""


def verify(*, store, as_json) -> None:
    home = Store(store)
    if not home.root.exists():
        raise BadInput(f"there is no store at {store}: name one with --store, or begin with `elmwood demo`")
    with bars() as progress:
        damages = list(check(home, lambda done, total: progress("verify", done, total, "B")))
    if as_json:
        emit([damage._asdict() for damage in damages])
    else:
        for damage in damages:
            out.print(f"{damage.where}: {damage.problem}", soft_wrap=True)
        talk.print(f"{len(damages)} damaged" if damages else "every digest and reference holds")
    if damages:
        sys.exit(1)


def export(*, name, folder, store, as_json) -> None:
    home = Store(store)
    record = home.load(name)
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty: an export never overwrites; name a new folder")
    match record:
        case Seed():
            from elmwood.lm.load import seed_folder  # torch

            source = seed_folder(record, home)
        case Expert():
            source = home.folder(record.files)
        case Partition():
            source = home.folder({**record.embedder.files, "centroids.safetensors": record.centroids})
        case _:
            raise BadInput(
                f"a {record.kind} is no folder of files: export its seed, partition or experts (`elmwood show {name}` lists them)"
            )
    building = folder.with_name(folder.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(source, building)  # follows the links: plain files come out
    (building / "elmwood.json").write_bytes(home.get(record.digest).read_bytes())
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(building, folder)
    if as_json:
        emit({"folder": str(folder), "files": sorted(path.name for path in folder.iterdir())})
    else:
        out.print(str(folder), soft_wrap=True)


def report(*, comparison, output, store, as_json) -> None:
    from elmwood.cli.page import page  # scikit-learn

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


def say_read(corpus: Corpus) -> None:
    """What was read and what was left out, on stderr."""
    talk.print(f"{corpus.documents} documents, {short(corpus.bytes)}B of text")
    for reason, number in sorted(corpus.rejected.items(), key=lambda item: -item[1]):
        talk.print(f"  left out: {number} ({reason})", style="yellow")


def _made(store: Store, record: Record, name: str | None, as_json: bool) -> None:
    if name:
        store.name(name, record.digest)
    made(record, name, as_json)
