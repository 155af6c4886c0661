"""Training: recipes with their defaults, the tasks that make experts, and adapters made elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import ValidationError

from elmwood.engine import Progress, placed, processes, run, silent
from elmwood.errors import BadInput
from elmwood.ranges import Between, Count, checked
from elmwood.records import Expert, Forest, Frozen, Partition, Recipe, Seed, Shard, Statistics
from elmwood.store import AnyStore, Named, Store
from elmwood.study.tasks import (
    TORCH,
    StatisticsJob,
    TogetherJob,
    TrainJob,
    default_threads,
    default_workers,
    experts_job,
    found,
    keys,
    label,
    statistics_job,
)
from elmwood.study.text import keep_name, open_store
from elmwood.study.trial import check_use, try_adapter
from elmwood.units import parse_count

R = TypeVar("R", bound=Frozen)

ROWS = 64  # training documents of an expert that its statistics are computed on
TINY = 10_000_000  # parameters: below, a model has learned little and takes the rates of one trained from scratch
# fields of a recipe that a command names only where they are not the default
OPTIONAL: tuple[str, ...] = ("rank", "alpha", "targets", "late", "schedule", "accumulate", "checkpointing", "checkpointed", "optimiser")
OPTIONAL += ("patience", "rng_seed")

# of fields whose records allow any number: old records stay readable
RANGES = {
    "alpha": Between(0, inside=True), "balance": Between(0), "learning_rate": Between(0, inside=True), "patience": Between(1),
    "batch": Between(1, 1 << 20), "accumulate": Between(1, 1 << 20), "length": Between(2, 1 << 24), "rank": Between(1, 65536),
    "rng_seed": Between(0, 2**32 - 1), "threads": Between(1),
}  # fmt: skip


# ---- recipes -----------------------------------------------------------------------------------------------------


def make_recipe(
    *, tokens: int | str, batch: int, length: int, targets: str | Sequence[str] = "all-linear", verb: str = "train", **fields: Any
) -> Recipe:  # fmt: skip
    """A recipe for so many tokens. `targets` as the command line has them: names joined by commas. Raises BadInput."""
    chosen = tuple(targets.split(",") if isinstance(targets, str) else targets)
    if (count := parse_count(tokens)) < 1:
        raise BadInput(f"--tokens {tokens}: training needs at least one token; write 2M, say")
    steps = max(1, count // (max(1, batch) * max(1, length)))
    return make_record(
        Recipe, verb, steps=steps, batch=batch, length=length, targets="all-linear" if "all-linear" in chosen else chosen, **fields
    )


def make_record(kind: type[R], verb: str, **fields: Any) -> R:
    """A record of options. Raises BadInput, which names the option."""
    for field, allowed in RANGES.items():
        allowed.check(field, fields.get(field))
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise BadInput(f"--{option} {first['input']}: {first['msg'].lower()}; `elmwood {verb} --help` lists the choices") from error


def default_length(context: int) -> int:
    """Tokens per sequence where the user chose none."""
    return min(context, 1024)


def default_rate(seed: Seed, method: str) -> float:
    """Peak learning rate where the user chose none. LoRA takes about ten times the rate of full tuning (see docs/training.md)."""
    full = 2e-3 if seed.parameters < TINY else 2e-5
    return full * (1 if method == "full" else 10 if seed.parameters >= TINY else 2)


# ---- experts -----------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """An expert that a plan makes."""

    name: str
    key: str  # of its task: where it logs, and what is marked when it is done
    job: str  # what progress calls its job: experts trained together share one
    tokens: int


class Plan(NamedTuple):
    """The tasks that make experts, one per domain. None is the control that is trained on all domains."""

    partition: Partition
    seed: Seed
    recipe: Recipe
    groups: tuple[tuple[int | None, ...], ...]  # domains trained at once
    workers: int
    report_to: tuple[str, ...]

    def jobs(self, store: Store) -> list[TrainJob | TogetherJob]:
        """One task for each group."""
        return [training_job(self.partition, group, self.seed, self.recipe, store.root, self.report_to) for group in self.groups]

    def experts(self, store: Store) -> list[Planned]:
        """Each expert, in order."""
        return [
            Planned(label(self.partition, domain), key, job.label, self.recipe.tokens)
            for job in self.jobs(store)
            for domain, key in zip(job.domains, keys(job, store), strict=True)
        ]

    def commands(self) -> list[list[str]]:
        """For each group, the words of the command that makes just these experts: the same task, so the same records."""
        more = [word for tracker in self.report_to for word in ("--report-to", tracker)]
        return [[*command(self.partition, self.seed, group, self.recipe), *more] for group in self.groups]


@checked
def plan_training(
    partition: Named, seed: Named, store: AnyStore = None, *, domains: str | int | Sequence[int] = "all", method: str = "lora",
    batch: int = 8, length: int | None = None, learning_rate: float | None = None, together: Count = 1, threads: int | None = None,
    workers: Annotated[int | None, Between(1)] = None, report_to: Sequence[str] = (), **options: Any,
) -> Plan:  # fmt: skip
    """The tasks of `train`, which has the same options. Raises BadInput."""
    store = Store(store)
    division, start = store.load(partition, Partition), store.load(seed, Seed)
    chosen: list[int | None] = [None] if domains == "pooled" else [*parse_domains(domains, len(division.domains))]
    groups = tuple(tuple(chosen[place : place + together]) for place in range(0, len(chosen), together))
    workers = 1 if processes()[1] > 1 else workers or default_workers(start, len(groups))
    if processes()[1] > 1 and method != "full":
        raise BadInput(f"--method {method}: several processes (torchrun) train full experts together; adapters take one process: --workers")
    recipe = make_recipe(
        method=method, batch=batch, length=default_length(start.context) if length is None else length,
        learning_rate=default_rate(start, method) if learning_rate is None else learning_rate,
        threads=default_threads(start) if threads is None else threads, **options,
    )  # fmt: skip
    if recipe.method == "full" or (recipe.targets == "all-linear" and recipe.late == 1):  # adapters elsewhere were not tried
        check_use(start, "full" if recipe.method == "full" else "lora")
    return Plan(division, start, recipe, groups, workers, tuple(report_to))


def run_plan(
    plan: Plan, store: AnyStore = None, *, engine: str = "local", name: str | None = None, progress: Progress = silent
) -> list[Expert]:  # fmt: skip
    """Train the experts of a plan. `name`: they are called NAME/0, NAME/1, ... after their domains."""
    store = open_store(store, name and f"{name}/0")
    jobs = plan.jobs(store)
    torch = () if all(found(job, store) for job in jobs) else TORCH
    made = run(experts_job, jobs, workers=plan.workers, engine=engine, gpu=True, torch=torch, progress=progress)
    experts = [store.load(digest, Expert) for digests in made for digest in digests]
    return [keep_name(expert, expert_name(name, expert), store) for expert in experts]


@placed
@checked
def train(
    partition: Named, seed: Named, store: AnyStore = None, *, domains: str | int | Sequence[int] = "all", method: str = "lora",
    tokens: int | str = "1M", batch: int = 8, length: int | None = None, learning_rate: float | None = None, schedule: str = "cosine",
    rank: int = 16, alpha: float | None = None, targets: str | Sequence[str] = "all-linear", late: float = 1.0, accumulate: int = 1,
    checkpointing: bool = False, checkpointed: float = 1.0, optimiser: str = "adamw", patience: int | None = None, together: Count = 1,
    report_to: Sequence[str] = (), rng_seed: int = 0, statistics: bool = False, threads: int | None = None,
    workers: Annotated[int | None, Between(1)] = None,
    engine: str = "local", name: str | None = None, device: str | None = None, progress: Progress = silent,
) -> list[Expert]:  # fmt: skip
    """Train one expert per domain from the seed, without communication. Interrupted runs resume. Raises BadInput, DoesNotFit.

    `domains`: "all", numbers such as "0,3-5", or "pooled" for one control on everything.
    """
    store = Store(store)
    plan = plan_training(
        partition, seed, domains=domains, method=method, tokens=tokens, batch=batch, length=length, learning_rate=learning_rate,
        schedule=schedule, rank=rank, alpha=alpha, targets=targets, late=late, accumulate=accumulate, checkpointing=checkpointing,
        checkpointed=checkpointed, optimiser=optimiser, patience=patience, together=together, report_to=report_to, rng_seed=rng_seed,
        threads=threads, workers=workers, store=store,
    )  # fmt: skip
    experts = run_plan(plan, engine=engine, name=name, store=store, progress=progress)
    if statistics:
        run_statistics(experts, store, workers=plan.workers, engine=engine, progress=progress)
    return experts


def training_job(
    partition: Partition, group: Sequence[int | None], seed: Seed, recipe: Recipe, root: Path, report_to: Sequence[str] = ()
) -> TrainJob | TogetherJob:
    """The task that makes one expert, or several at once, in the store at `root`."""
    place: dict[str, Any] = {"store": root, "seed": seed.digest, "recipe": recipe, "partition": partition.digest}
    place["report_to"] = tuple(report_to)
    if len(group) == 1:
        return TrainJob(label=label(partition, group[0]), data=shards(partition, group[0]), domain=group[0], **place)
    return TogetherJob(
        label=f"domains {spell_domains(group)}", data=tuple(shards(partition, domain) for domain in group), domains=tuple(group), **place
    )


def command(partition: Partition, seed: Seed, group: Sequence[int | None], recipe: Recipe) -> list[str]:
    """The words of the command that makes just these experts."""
    domains = spell_domains(group)
    words = ["elmwood", "train", partition.digest, "--seed", seed.digest, "--domains", domains, "--tokens", str(recipe.tokens)]
    for field in ("method", "batch", "length", "learning_rate", "threads", *OPTIONAL):
        value = getattr(recipe, field)
        if field in OPTIONAL and value == Recipe.model_fields[field].default:
            continue
        words.append(f"--{field.replace('_', '-')}")
        words += [] if value is True else [",".join(value) if isinstance(value, tuple) else str(value)]
    return words + (["--together", str(len(group))] if len(group) > 1 else [])


def expert_name(name: str | None, expert: Expert) -> str | None:
    """What an expert is called in a group of this name."""
    return name and f"{name}/{'pooled' if expert.domain is None else expert.domain}"


def shards(partition: Partition, domain: int | None) -> tuple[Shard, ...]:
    """The training shards of one domain, or of all."""
    chosen = partition.domains if domain is None else (partition.domains[domain],)
    return tuple(shard for one in chosen for shard in one.train)


def parse_domains(text: str | int | Sequence[int], total: int) -> Sequence[int]:
    """'all', '0,3-5', 3 or [0, 3] -> numbers of domains, sorted. Raises BadInput."""
    if text == "all":
        return range(total)
    written = text if isinstance(text, str) else ",".join(map(str, [text] if isinstance(text, int) else text))
    beyond = f"{written!r} names domains beyond the {total} there are, which are numbered from 0 to {total - 1}"
    try:
        ends = [tuple(int(end) for end in part.split("-")) for part in written.split(",")]
        if any(not 0 <= number < total for part in ends for number in part):
            raise BadInput(beyond)
        chosen = sorted({number for part in ends for number in range(part[0], part[-1] + 1)})
    except ValueError as error:
        raise BadInput(f"{written!r} names no domains: write all, pooled, or numbers as in 0,3-5") from error
    if not chosen:
        raise BadInput(f"{written!r} names no domains: write the smaller number first, as in 3-5")
    return chosen


def spell_domains(group: Sequence[int | None]) -> str:
    """(0, 3, 4, 5) -> '0,3,4,5', as `parse_domains` reads it; the pooled control by its name."""
    return ",".join("pooled" if domain is None else str(domain) for domain in group)


def find_experts(given: Named | Sequence[Named], store: Store) -> list[Expert]:
    """The experts that names and records stand for; a forest stands for its experts. Raises BadInput, UnknownName."""
    found: list[Expert] = []
    for record in map(store.load, store.expand(given)):
        if not isinstance(record, Forest | Expert):
            raise BadInput(f"{record.digest[:8]} is a {record.kind}: name experts, or a forest for all it has")
        found += [store.load(digest, Expert) for digest in record.experts] if isinstance(record, Forest) else [record]
    return found


# ---- adapters made elsewhere, statistics -------------------------------------------------------------------------


@placed
def adopt(
    source: str, seed: Named, store: AnyStore = None, *, partition: Named | None = None, domain: int | None = None,
    name: str | None = None, device: str | None = None,
) -> Expert:  # fmt: skip
    """Take a LoRA or DoRA adapter, or a full fine-tune, made elsewhere (a folder, or a hub id) as an expert of a seed. Raises BadInput."""
    store = open_store(store, name)
    start = store.load(seed, Seed)
    division = store.load(partition, Partition) if partition else None
    if (division is None) != (domain is None):
        raise BadInput("an expert of a domain needs both --partition and --domain; one of no domain neither")
    if division is not None:
        (domain,) = parse_domains(str(domain), len(division.domains))
    from elmwood.train.adopt import import_expert  # torch

    expert = import_expert(source, start, store, partition=division.digest if division else None, domain=domain)
    if "adapter_config.json" in expert.files:
        try_adapter(expert, start, store)
    return keep_name(expert, name, store)


@placed
@checked
def compute_statistics(
    experts: Named | Sequence[Named], store: AnyStore = None, *, rows: Count = ROWS, workers: Annotated[int | None, Between(1)] = None,
    engine: str = "local", device: str | None = None, progress: Progress = silent,
) -> list[Statistics]:  # fmt: skip
    """Gram and Fisher matrices of experts on their own text, for merge rules that need them. Raises BadInput."""
    store = Store(store)
    return run_statistics(find_experts(experts, store), store, rows=rows, workers=workers, progress=progress)


def run_statistics(
    experts: Sequence[Expert], store: Store, *, rows: int = ROWS, workers: int | None = None, engine: str = "local",
    progress: Progress = silent,
) -> list[Statistics]:  # fmt: skip
    """As `compute_statistics`, of experts that are known."""
    workers = workers or default_workers(store.load(experts[0].seed, Seed), len(experts))
    jobs = [StatisticsJob(store=store.root, expert=expert.digest, rows=rows) for expert in experts]
    made = run(statistics_job, jobs, workers=workers, engine=engine, gpu=True, torch=TORCH, progress=progress)
    return [store.load(digest, Statistics) for digest in made]
