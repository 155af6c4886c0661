"""What the verbs of training do: seeds, experts, and what they will take."""

from collections.abc import Sequence

from elmwood.cli.domains import say_read
from elmwood.cli.screen import bars, count, duration, emit, expand, keep, out, short, table, talk
from elmwood.corpus.build import build
from elmwood.engine import cores, run
from elmwood.errors import BadInput
from elmwood.records import Expert, Forest, Partition, Recipe, Seed, Shape, Shard
from elmwood.store import Store

ROWS = 64  # of an expert's training documents that its statistics are over
SMALL = 20_000_000  # parameters below which one core per model is better used than two cores on one
TINY = 10_000_000  # parameters below which a model has learned little, and takes the rates of one trained from scratch


def seed_import(*, model, separator, name, store, as_json) -> None:
    from elmwood.lm.load import import_seed  # torch

    home = Store(store)
    talk.print(f"importing {model}")
    keep(home, import_seed(model, home, name=name, separator=separator), name, as_json)


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
    keep(home, seed, name, as_json)


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


def train(
    *, partition, seed, domains, method, tokens, batch, length, learning_rate, rank, rng_seed, statistics, name, workers, store,
    as_json,
) -> None:  # fmt: skip
    from elmwood.cli.jobs import StatisticsJob, TrainJob, statistics_job, train_job  # torch

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
        if statistics:
            left = [StatisticsJob(store=store, expert=digest, rows=ROWS) for digest in experts]
            run(statistics_job, left, workers=workers, progress=progress)
    for domain, digest in zip(chosen, experts, strict=True):
        given = name and f"{name}/{'pooled' if domain is None else domain}"
        keep(home, home.load(digest), given, as_json)


def statistics(*, experts, rows, workers, store, as_json) -> None:
    from elmwood.cli.jobs import StatisticsJob, statistics_job  # torch

    home = Store(store)
    found = members(home, experts)
    workers = workers or default_workers(home.load(home.load(found[0], Expert).seed, Seed), len(found))
    with bars() as progress:
        jobs = [StatisticsJob(store=store, expert=digest, rows=rows) for digest in found]
        made = run(statistics_job, jobs, workers=workers, progress=progress)
    for digest in made:
        keep(home, home.load(digest), None, as_json)


def members(store: Store, names: Sequence[str]) -> list[str]:
    """Experts by digest; a forest stands for its experts. Raises BadInput."""
    found: list[str] = []
    for record in map(store.load, expand(store, names)):
        if not isinstance(record, Forest | Expert):
            raise BadInput(f"{record.digest[:8]} is a {record.kind}: name experts, or a forest for all it has")
        found += record.experts if isinstance(record, Forest) else [record.digest]
    return found


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
