"""The tasks the engine runs, each wiring a few rooms. Inputs are small records, results are digests.

What trains is imported where it trains: torch takes seconds that handing out tasks, and finding them done, need not spend.
"""

from pathlib import Path

from elmwood.engine import NOTE, Progress, cores, gpus
from elmwood.records import Digest, Expert, Frozen, Partition, Recipe, Seed, Shard
from elmwood.store import Store
from elmwood.train.task_names import together_keys, train_key

SMALL = 20_000_000  # parameters below which one core per model is better used than two cores on one
THREADS = 4  # of a model that is not small
TORCH = ("elmwood.train.tasks", "elmwood.ensemble.mixture", "elmwood.lm.experts", "peft")  # what training and scoring import


class TrainJob(Frozen):
    """Train one expert (or a control, domain None) from a seed on shards of text."""

    store: Path
    label: str
    seed: Digest
    data: tuple[Shard, ...]
    recipe: Recipe
    partition: Digest | None = None
    domain: int | None = None
    report_to: tuple[str, ...] = ()

    @property
    def domains(self) -> tuple[int | None, ...]:
        return (self.domain,)


class TogetherJob(Frozen):
    """Train several adapters at once over one copy of their seed: shards and domain of each."""

    store: Path
    label: str
    seed: Digest
    data: tuple[tuple[Shard, ...], ...]
    recipe: Recipe
    partition: Digest | None = None
    domains: tuple[int | None, ...] = ()
    report_to: tuple[str, ...] = ()


class StatisticsJob(Frozen):
    """Gram matrices and squared gradients of an expert, over its own training text."""

    store: Path
    expert: Digest
    rows: int


def train_job(job: TrainJob, progress: Progress) -> Digest:
    """The digest of the Expert."""
    store = Store(job.store)
    if done := found(job, store):
        return done[0]
    from elmwood.train.tasks import train

    seed = store.load(job.seed, Seed)
    labelled = named(job.label, progress)
    return train(
        seed, job.data, job.recipe, store, partition=job.partition, domain=job.domain, progress=labelled, report_to=job.report_to
    ).digest


def experts_job(job: TrainJob | TogetherJob, progress: Progress) -> list[Digest]:
    """The digests of the experts."""
    if isinstance(job, TrainJob):
        return [train_job(job, progress)]
    store = Store(job.store)
    if done := found(job, store):
        return done
    from elmwood.train.together import train_together

    seed, labelled = store.load(job.seed, Seed), named(job.label, progress)
    made = train_together(
        seed, job.data, job.recipe, store, partition=job.partition, domains=job.domains, progress=labelled, report_to=job.report_to
    )
    return [expert.digest for expert in made]


def keys(job: TrainJob | TogetherJob, store: Store) -> list[str]:
    """The names of the tasks that make its experts."""
    seed = store.load(job.seed, Seed)
    if isinstance(job, TrainJob):
        return [train_key(seed, job.data, job.recipe, job.partition, job.domain)]
    return together_keys(seed, job.data, job.recipe, job.partition, job.domains)


def found(job: TrainJob | TogetherJob, store: Store) -> list[Digest]:
    """Its experts, where all are made."""
    done = [digest for key in keys(job, store) if (digest := store.done(key))]
    return done if len(done) == len(job.domains) else []


def statistics_job(job: StatisticsJob, progress: Progress) -> Digest:
    """The digest of the Statistics."""
    from elmwood.train.statistics import statistics

    store = Store(job.store)
    labelled = named(f"statistics {job.expert[:8]}", progress)
    return statistics(store.load(job.expert, Expert), store, rows=job.rows, progress=labelled).digest


def named(label: str, progress: Progress) -> Progress:
    """One bar per task, whatever its parts are called. Notes stay what they are."""
    return lambda what, done, total, unit: progress(what if unit == NOTE else label, done, total, unit)


def label(partition: Partition, domain: int | None) -> str:
    """The name of a training job in progress bars and tables."""
    return "pooled" if domain is None else f"{domain} {partition.domains[domain].name}"[:28]


def default_threads(seed: Seed) -> int:
    """CPU threads that train or score a model where the user chose none. The order of float sums depends on them, so they depend on the
    model and never on the machine: every machine makes the same records."""
    return 1 if seed.parameters < SMALL else THREADS


def default_workers(seed: Seed, jobs: int) -> int:
    """Small models: one core each, side by side. Large ones: one for each GPU, or one after another, with all cores."""
    return min(cores(), jobs) if seed.parameters < SMALL else max(1, min(len(gpus()), jobs))
