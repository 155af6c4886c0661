"""What the verbs of training do: seeds, experts, adapters made elsewhere."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from elmwood.cli.live_table import Entry, board
from elmwood.cli.old_domains import say_read
from elmwood.cli.screen import bars, count, expand, keep, out, talk
from elmwood.corpus.build import build
from elmwood.engine import cores, run
from elmwood.errors import BadInput
from elmwood.records import Expert, Forest, Partition, Recipe, Seed, Shape, Shard
from elmwood.store import Store
from elmwood.study.tasks import SMALL, StatisticsJob, TogetherJob, TrainJob, default_workers, experts_job, keys, label, statistics_job

ROWS = 64  # of an expert's training documents that its statistics are over
# settings of a recipe that are spelled out where they are not the default
OPTIONS = ("rank", "alpha", "targets", "late", "schedule", "accumulate", "checkpointing", "optimiser", "patience", "rng_seed")
TINY = 10_000_000  # parameters below which a model has learned little, and takes the rates of one trained from scratch


def seed_import(*, model, separator, name, store, as_json) -> None:
    from elmwood.lm.load import import_seed  # torch

    home = Store(store)
    talk.print(f"importing {model}")
    keep(home, import_seed(model, home, name=name, separator=separator), name, as_json)


def seed_train(*, corpus, tokens, layers, width, vocabulary, length, batch, learning_rate, rng_seed, name, store, as_json) -> None:
    from elmwood.train.tasks import train_seed  # torch

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


def train(
    *, partition, seed, domains, tokens, length, together, threads, workers, engine, report_to, statistics, commands, name, store, as_json,
    **how,
) -> None:  # fmt: skip
    home = Store(store)
    division, start = home.load(partition, Partition), home.load(seed, Seed)
    chosen: list[int | None] = [None] if domains == "pooled" else [*numbers(domains, len(division.domains))]
    groups = [tuple(chosen[place : place + together]) for place in range(0, len(chosen), together)]
    workers = workers or default_workers(start, len(groups))
    # a small seed's expert is the same bytes whether it is trained alone or beside others
    how["threads"] = threads or (1 if start.parameters < SMALL else max(1, cores() // workers))
    recipe = make_recipe(start, tokens=tokens, length=length, **how)
    if commands:
        more = [*(word for tracker in report_to for word in ("--report-to", tracker)), *(["--statistics"] if statistics else [])]
        more += [*(["--name", name] if name else []), "--store", str(store)]
        for group in groups:
            out.print(shlex.join([*command(division, start, group, recipe), *more]), soft_wrap=True)
        return
    jobs = [training_job(division, group, start, recipe, store, report_to) for group in groups]
    entries = [
        Entry(label(division, domain), key, job.label, recipe.tokens)
        for job in jobs for domain, key in zip(job.domains, keys(job, home), strict=True)
    ]  # fmt: skip
    with board(entries, home) as progress:
        groups_made = run(experts_job, jobs, workers=workers, engine=engine, gpu=True, progress=progress)
    made = [digest for digests in groups_made for digest in digests]
    if statistics:
        with bars() as progress:
            left = [StatisticsJob(store=store, expert=digest, rows=ROWS) for digest in made]
            run(statistics_job, left, workers=workers, engine=engine, gpu=True, progress=progress)
    for domain, digest in zip(chosen, made, strict=True):
        given = name and f"{name}/{'pooled' if domain is None else domain}"
        keep(home, home.load(digest), given, as_json)


def make_recipe(seed: Seed, *, tokens: str, length: int | None, **how: Any) -> Recipe:
    """What was asked, with the defaults that depend on the seed. Raises BadInput."""
    length = length or min(seed.context, 1024)
    how["learning_rate"] = how["learning_rate"] or default_rate(seed, how["method"])
    if isinstance(how["targets"], str) and how["targets"] != "all-linear":
        how["targets"] = tuple(how["targets"].split(","))
    return checked(steps=max(1, count(tokens) // (max(1, how["batch"]) * length)), length=length, **how)


def checked(**fields: Any) -> Recipe:
    """A recipe. Raises BadInput, by the name of the option."""
    try:
        return Recipe(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise BadInput(f"--{name} {first['input']}: {first['msg'].lower()}; `elmwood train --help` lists what there is") from error


def training_job(
    division: Partition, group: Sequence[int | None], seed: Seed, recipe: Recipe, store: Path, report_to: Sequence[str]
) -> TrainJob | TogetherJob:
    """The task that makes one expert, or several at once."""
    place: dict[str, Any] = {"store": store, "seed": seed.digest, "recipe": recipe, "partition": division.digest}
    place["report_to"] = tuple(report_to)
    if len(group) == 1:
        return TrainJob(label=label(division, group[0]), data=shards(division, group[0]), domain=group[0], **place)
    return TogetherJob(
        label=f"domains {spelled(group)}", data=tuple(shards(division, domain) for domain in group), domains=tuple(group), **place
    )


def spelled(group: Sequence[int | None]) -> str:
    """(0, 3, 4, 5) -> '0,3,4,5', as `numbers` reads it; the pooled control by its name."""
    return ",".join("pooled" if domain is None else str(domain) for domain in group)


def command(division: Partition, seed: Seed, group: Sequence[int | None], recipe: Recipe) -> list[str]:
    """The words of the command that makes just these experts: the same task, so the same records."""
    words = ["elmwood", "train", division.digest, "--seed", seed.digest, "--domains", spelled(group), "--tokens", str(recipe.tokens)]
    for field in ("method", "batch", "length", "learning_rate", "threads", *OPTIONS):
        value = getattr(recipe, field)
        if field in OPTIONS and value == Recipe.model_fields[field].default:
            continue
        words.append(f"--{field.replace('_', '-')}")
        words += [] if value is True else [",".join(value) if isinstance(value, tuple) else str(value)]
    return words + (["--together", str(len(group))] if len(group) > 1 else [])


def adopt(*, adapter, seed, partition, domain, name, store, as_json) -> None:
    from elmwood.train.adopt import import_adapter  # torch

    home = Store(store)
    division = home.load(partition, Partition) if partition else None
    if (division is None) != (domain is None):
        raise BadInput("an expert of a domain needs both --partition and --domain; one of no domain neither")
    if division is not None:
        (domain,) = numbers(str(domain), len(division.domains))
    expert = import_adapter(adapter, home.load(seed, Seed), home, partition=division.digest if division else None, domain=domain)
    keep(home, expert, name, as_json)


def statistics(*, experts, rows, workers, store, as_json) -> None:
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


def shards(partition: Partition, domain: int | None) -> tuple[Shard, ...]:
    """The training shards of one domain, or of all."""
    chosen = partition.domains if domain is None else (partition.domains[domain],)
    return tuple(shard for one in chosen for shard in one.train)
