"""The whole experiment: text -> seed -> domains -> experts and every control -> table -> page.

Everything here only wires rooms together; each step is found again when it was done before.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.cli.evaluate import print_comparison
from elmwood.cli.old_domains import say_read
from elmwood.cli.old_page import page
from elmwood.cli.old_training import default_rate, llama, shards
from elmwood.cli.screen import bars, count, duration, emit, out, talk
from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.engine import Progress, cores, run
from elmwood.evaluate.comparison import Control, Cost, Side, compare
from elmwood.evaluate.holdout import Holdout, HoldoutSpec
from elmwood.records import (
    Comparison,
    Corpus,
    Digest,
    Ensemble,
    Forest,
    Frozen,
    Partition,
    Recipe,
    Seed,
    Shard,
)
from elmwood.store import Store
from elmwood.study.evaluation import conclusion, keep_comparison, measure_distances
from elmwood.study.scoring import Columns, ensure
from elmwood.study.tasks import TrainJob, default_workers, label, train_job
from elmwood.train.task_names import seed_key, train_key

DENSE = "dense, the experts' batch"
LARGE = "dense, k times the batch"
SHORT = "dense, equal wall clock"
CONTROLS = {DENSE: "dense/batch", LARGE: "dense/large", SHORT: "dense/short"}  # row -> name


class Study(Frozen):
    """The numbers of a demo. Where specialisation pays and how the learning rates were tuned, each side alike: docs/log/."""

    domains: int = 6  # k
    vocabulary: int = 2048
    layers: int = 3
    width: int = 128
    length: int = 256  # tokens per sequence, and per window of evaluation
    seed_tokens: int = 3_000_000
    seed_rate: float = 3e-3
    tokens: int = 600_000  # of further training, shared by the experts; each dense control gets as many
    batch: int = 4  # sequences per step of an expert
    method: str = "full"
    expert_rate: float = 2e-3
    dense_rate: float = 5e-4
    random_rate: float = 5e-4
    large_rate: float = 2e-3
    documents: int | None = 150  # held-out documents scored; None: all
    rng_seed: int = 0

    @property
    def steps(self) -> int:
        """Of one expert."""
        return max(1, self.tokens // (self.domains * self.batch * self.length))


QUICK = Study(
    domains=4, vocabulary=1024, layers=2, width=64, length=128, batch=8, seed_tokens=400_000, tokens=200_000, documents=80,
    seed_rate=4e-3, expert_rate=2e-3, dense_rate=2e-3, large_rate=4e-3, random_rate=2e-3,
)  # fmt: skip


class Grown(NamedTuple):
    """What a study makes."""

    comparison: Comparison
    ensemble: Ensemble  # with the settings that were best on the tune half
    forest: Forest
    partition: Partition
    seed: Seed
    models: dict[str, Digest]  # that were trained from the seed, by name


def demo(*, quick, corpus, seed, domains, tokens, method, learning_rate, report, workers, store, as_json) -> None:
    home, started = Store(store), time.perf_counter()
    start = home.load(seed, Seed) if seed else None
    study = QUICK if quick else Study()
    if start:
        study = study.model_copy(update={"length": min(start.context, study.length)})
        learning_rate = learning_rate or default_rate(start, method)
    elif method != "full":
        learning_rate = learning_rate or 2 * study.expert_rate
    rates = {
        "expert_rate": learning_rate,
        "dense_rate": learning_rate,
        "random_rate": learning_rate,
        "large_rate": learning_rate and 2 * learning_rate,
    }
    asked = {"domains": domains, "tokens": tokens and count(tokens), "method": method, **rates}
    study = Study.model_validate(study.model_dump() | {key: value for key, value in asked.items() if value is not None})
    with bars() as progress:
        read = build(corpus or ["sample"], home, progress=progress)
        grown = grow(study, read, start, home, workers=workers, progress=progress)
    say_read(read)
    records = {name: getattr(grown, name).digest for name in ("comparison", "ensemble", "forest", "partition", "seed")}
    for name, digest in (records | grown.models).items():
        home.name(f"demo/{name}", digest)
    report.write_text(page(grown.comparison, home))
    if as_json:
        emit(grown.comparison.model_dump(mode="json") | {"digest": grown.comparison.digest, "report": str(report)})
        return
    print_comparison(grown.comparison)
    out.print(conclusion(grown.comparison))
    talk.print(
        f"{duration(time.perf_counter() - started)}; report: {report}; go on with: elmwood chat demo/ensemble, elmwood show demo/forest"
    )


class Arms(NamedTuple):
    """Columns of every model of a study, ready to be compared."""

    held: Holdout
    seed_N: NDArray[np.floating]
    experts: Side
    dense: tuple[Control, ...]
    random: Side
    forest: Forest
    models: dict[str, Digest]  # by name: expert/0 …, random/0 …, dense/batch, dense/large, dense/short


def grow(study: Study, corpus: Corpus, seed: Seed | None, store: Store, *, workers: int | None, progress: Progress) -> Grown:
    """Run a study. Every part is done once for the same inputs."""
    seed = seed or scratch(study, corpus, store, progress)
    arms = branch(study, corpus, seed, store, workers=workers, progress=progress)
    compared = compare(arms.held, arms.seed_N, arms.experts, arms.dense, arms.random)
    partition = store.load(arms.forest.partition, Partition)
    controls = tuple(arms.models[name] for name in CONTROLS.values())
    return Grown(*keep_comparison(compared, arms.held, arms.forest, controls, store), arms.forest, partition, seed, arms.models)


def branch(study: Study, corpus: Corpus, seed: Seed, store: Store, *, workers: int | None, progress: Progress) -> Arms:
    """Train the experts and every control from the seed, and score them all."""
    divisions = {
        name: divide(corpus, store, domains=study.domains, method=method, rng_seed=study.rng_seed, progress=progress)
        for name, method in (("expert", "balanced"), ("random", "random"))
    }
    workers = workers or default_workers(seed, 2 * study.domains)
    sides = plan(study, seed, corpus, divisions, store, threads=max(1, cores() // workers))
    jobs = [job for side in sides.values() for job in side]
    digests = run(train_job, jobs, workers=workers, progress=progress)
    trained = dict(zip([(name, place) for name, side in sides.items() for place in range(len(side))], digests, strict=True))
    spec = HoldoutSpec(partition=divisions["expert"].digest, seed=seed.digest, length=study.length, documents=study.documents)
    models = [("seed", seed.digest), *((job.label, digest) for job, digest in zip(jobs, digests, strict=True))]
    ensured = ensure(models, Columns(spec, store), workers=workers, progress=progress)
    held, columns = ensured.holdout, ensured.columns

    def side(name: str) -> Side:
        digests = [trained[name, place] for place in range(study.domains)]
        order = sorted(range(study.domains), key=digests.__getitem__)
        dist2_NK, sparse2_NK = measure_distances(held, divisions[name], store, progress)
        return Side(
            np.column_stack([columns[digests[place]] for place in order]), dist2_NK[:, order], costs(sides[name], store),
            owners=tuple(order.index(place) for place in range(study.domains)),
            sparse2_NK=None if sparse2_NK is None else sparse2_NK[:, order],
        )  # fmt: skip

    return Arms(
        held=held,
        seed_N=columns[seed.digest],
        experts=side("expert"),
        dense=tuple(
            Control(name, columns[trained[name, 0]], costs(sides[name], store, machines=study.domains if name == LARGE else 1))
            for name in CONTROLS
        ),
        random=side("random"),
        forest=Forest(
            seed=seed.digest, partition=spec.partition, experts=tuple(trained["expert", place] for place in range(study.domains))
        ),
        models={CONTROLS.get(name, f"{name}/{place}"): digest for (name, place), digest in trained.items()},
    )


def scratch(study: Study, corpus: Corpus, store: Store, progress: Progress) -> Seed:
    """The study's own seed, trained with all cores."""
    recipe = Recipe(
        steps=max(1, study.seed_tokens // (study.batch * study.length)), batch=study.batch, length=study.length,
        learning_rate=study.seed_rate, rng_seed=study.rng_seed, threads=cores(),
    )  # fmt: skip
    shape = llama(study.layers, study.width, study.vocabulary, study.length)
    if done := store.done(seed_key(corpus, shape, recipe)):
        return store.load(done, Seed)
    from elmwood.train.tasks import train_seed  # torch, which whoever finds everything done need not wait for

    return train_seed(corpus, shape, recipe, store, progress=lambda what, *event: progress("seed" if what == "train" else what, *event))


def plan(
    study: Study, seed: Seed, corpus: Corpus, divisions: dict[str, Partition], store: Store, *, threads: int
) -> dict[str, list[TrainJob]]:
    """Every model to train, by row of the table: the dense controls, then the experts of each division."""
    k, steps = study.domains, study.steps
    base = Recipe(
        method=study.method, steps=steps, batch=study.batch, length=study.length, rng_seed=study.rng_seed, threads=threads,
    )  # fmt: skip
    dense = {
        DENSE: {"steps": k * steps, "learning_rate": study.dense_rate},
        LARGE: {"batch": k * study.batch, "learning_rate": study.large_rate},
        SHORT: {"learning_rate": study.dense_rate},
    }

    def job(name: str, data: tuple[Shard, ...], recipe: Recipe, **place: Any) -> TrainJob:
        return TrainJob(store=store.root, label=name, seed=seed.digest, data=data, recipe=recipe, **place)

    made = {name: [job(name, corpus.train, base.model_copy(update=change))] for name, change in dense.items()}
    for name, division in divisions.items():
        recipe = base.model_copy(update={"learning_rate": study.random_rate if name == "random" else study.expert_rate})
        titles = [f"{name} {place}" if name == "random" else label(division, place) for place in range(k)]
        made[name] = [
            job(title, shards(division, place), recipe, partition=division.digest, domain=place) for place, title in enumerate(titles)
        ]
    return made


def costs(jobs: Sequence[TrainJob], store: Store, machines: int = 1) -> Cost:
    """What the models of one row took, by what their tasks logged. `machines`: how many would share one model's batch."""
    keys = [train_key(store.load(job.seed, Seed), job.data, job.recipe, job.partition, job.domain) for job in jobs]
    ends = [[line["seconds"] for line in store.logged(key) if line.get("event") == "done"] for key in keys]
    seconds = [end[-1] for end in ends if end]  # a store copied from elsewhere may have come without its logs
    recipe = jobs[0].recipe
    return Cost(
        batch=recipe.batch, steps=recipe.steps, tokens=sum(job.recipe.tokens for job in jobs),
        machine_seconds=sum(seconds) if len(seconds) == len(jobs) else None,
        wall_seconds=max(seconds) / machines if len(seconds) == len(jobs) else None,
    )  # fmt: skip
