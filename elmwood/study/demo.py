"""The demo: text, a seed, its domains, experts and every control, one comparison. Each step is found again where it was done before.

N scored tokens, K experts
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.engine import NOTE, Progress, placed, run, silent
from elmwood.errors import BadInput
from elmwood.evaluate.comparison import Control, Cost, Side, compare
from elmwood.evaluate.holdout import Holdout, HoldoutSpec
from elmwood.records import Comparison, Corpus, Digest, Ensemble, Forest, Frozen, Partition, Recipe, Seed, Shape, Shard
from elmwood.store import AnyStore, Store
from elmwood.study.demo_seed import Remade, compare_packaged, install_seed
from elmwood.study.quality.evaluation import keep_comparison, measure_distances
from elmwood.study.quality.scoring import Columns, ensure, open_columns
from elmwood.study.seeds import llama
from elmwood.study.tasks import TORCH, TrainJob, default_threads, default_workers, found, label, train_job
from elmwood.study.training import default_rate, shards
from elmwood.train.task_names import seed_key, train_key
from elmwood.units import parse_count

SAMPLE = "sample"  # the bundled corpus
DENSE = "dense, the experts' batch"
MIDDLE = "dense, a batch between"
LARGE = "dense, k times the batch"
CONTROLS = {DENSE: "dense/batch", MIDDLE: "dense/middle", LARGE: "dense/large"}  # row -> name


class Study(Frozen):
    """The numbers of a demo. Where specialisation pays and how the learning rates were tuned, each side alike: docs/log/."""

    domains: int = 6  # k
    vocabulary: int = 2048
    layers: int = 3
    width: int = 128
    length: int = 256  # tokens per sequence, and per window of evaluation
    seed_tokens: int = 4_000_000
    seed_rate: float = 3e-3
    seed_threads: int = 1  # sums depend on their number: so the seed does not depend on how many cores there are
    tokens: int = 600_000  # of further training, shared by the experts; each dense control gets as many
    batch: int = 4  # sequences per step of an expert
    method: str = "full"
    expert_rate: float = 2e-3
    random_rate: float = 5e-4
    dense_rate: float = 5e-4
    middle_rate: float = 1e-3
    large_rate: float = 1.5e-3
    documents: int | None = None  # held-out documents scored; None: all, so that other verbs find their scores
    rng_seed: int = 0

    @property
    def steps(self) -> int:
        """Of one expert."""
        return max(1, self.tokens // (self.domains * self.batch * self.length))

    @property
    def shape(self) -> Shape:
        """Of the seed."""
        return llama(self.layers, self.width, self.vocabulary, self.length)

    @property
    def seed_recipe(self) -> Recipe:
        return Recipe(
            steps=max(1, self.seed_tokens // (self.batch * self.length)), batch=self.batch, length=self.length,
            learning_rate=self.seed_rate, rng_seed=self.rng_seed, threads=self.seed_threads,
        )  # fmt: skip


QUICK = Study(domains=4, tokens=100_000, documents=40, seed_tokens=400_000)


class Phase(NamedTuple):
    """A part of the demo that begins."""

    number: int
    text: str


PHASES = 4


class Demo(NamedTuple):
    """What a demo makes."""

    corpus: Corpus
    comparison: Comparison
    ensemble: Ensemble  # with the settings that were best on the tune half
    forest: Forest
    partition: Partition
    seed: Seed
    models: dict[str, Digest]  # that were trained from the seed, by name
    remade: Remade | None = None  # from scratch, where the packaged seed has the same recipe

    @property
    def record(self) -> Comparison:
        return self.comparison

    def _repr_html_(self) -> str | None:
        return self.comparison._repr_html_()


@placed
def demo(
    corpus: str | Sequence[str] = SAMPLE, *, quick: bool = False, from_scratch: bool = False, seed: str | Seed | None = None,
    domains: int | None = None, tokens: str | int | None = None, method: str = "full", learning_rate: float | None = None,
    workers: int | None = None, store: AnyStore = None,
    device: str | None = None, progress: Progress = silent, on_phase: Callable[[Phase], None] = lambda phase: None,
) -> Demo:  # fmt: skip
    """Run the whole experiment, and name what it makes demo/…. Raises BadInput, BadCorpus, Damaged.

    The seed is the packaged one for the bundled corpus; for other text, or `from_scratch`, one is trained. `quick` takes fewer domains,
    documents and tokens.
    """
    store = Store(store)
    sources = [corpus] if isinstance(corpus, str) else list(corpus) or [SAMPLE]
    if seed and from_scratch:
        raise BadInput("--from-scratch trains a seed, and --seed names one: give one of the two")
    given = store.load(seed, Seed) if seed else None
    study = settings(QUICK if quick else Study(), given, domains=domains, tokens=tokens, method=method, learning_rate=learning_rate)
    on_phase(Phase(1, "Read the text, drop duplicates, and hold some documents back: no model trains on them."))
    read = build(sources, store, progress=progress)
    if given is None and sources == [SAMPLE] and not from_scratch:
        given = install_seed(read, store)
    if given is None:
        on_phase(Phase(1, f"Train the seed, the model all experts start from: {study.seed_tokens:,} tokens on one core."))
    made = grow(study, read, given, store, workers=workers, progress=progress, on_phase=on_phase)
    if from_scratch and sources == [SAMPLE]:
        made = made._replace(remade=compare_packaged(made.seed, store))
    for name in ("comparison", "ensemble", "forest", "partition", "seed"):
        store.name(f"demo/{name}", getattr(made, name).digest)
    for name, digest in made.models.items():
        store.name(f"demo/{name}", digest)
    return made


def settings(
    study: Study, seed: Seed | None, *, domains: int | None = None, tokens: str | int | None = None, method: str = "full",
    learning_rate: float | None = None,
) -> Study:  # fmt: skip
    """A study with what was asked for. A seed of the user's own takes the rates of its size."""
    if seed:
        study = study.model_copy(update={"length": min(seed.context, study.length)})
        learning_rate = learning_rate or default_rate(seed, method)
    elif method != "full":
        learning_rate = learning_rate or 2 * study.expert_rate
    changed: dict[str, Any] = {"domains": domains, "tokens": tokens and parse_count(tokens), "method": method}
    changed |= {f"{side}_rate": learning_rate for side in ("expert", "random", "dense")}
    changed |= {f"{side}_rate": learning_rate and 2 * learning_rate for side in ("middle", "large")}
    return Study.model_validate(study.model_dump() | {key: value for key, value in changed.items() if value is not None})


# ---- the seed -------------------------------------------------------------------------------------------------------


def scratch(study: Study, corpus: Corpus, store: Store, progress: Progress = silent) -> Seed:
    """The study's own seed, trained from nothing but the corpus' training split."""
    if done := store.done(seed_key(corpus, study.shape, study.seed_recipe)):
        return store.load(done, Seed)
    from elmwood.train.tasks import train_seed  # torch, which whoever finds everything done need not wait for

    return train_seed(
        corpus, study.shape, study.seed_recipe, store,
        progress=lambda what, *event: progress(what.replace("train", "seed", 1) if what.startswith("train on ") else what, *event),
    )  # fmt: skip


# ---- the study ------------------------------------------------------------------------------------------------------


class Arms(NamedTuple):
    """Columns of every model of a study, ready to be compared."""

    held: Holdout
    seed_N: NDArray[np.floating]
    experts: Side
    dense: tuple[Control, ...]
    random: Side
    forest: Forest
    models: dict[str, Digest]  # by name: expert/0 …, random/0 …, and the names of CONTROLS


def grow(
    study: Study, corpus: Corpus, seed: Seed | None, store: Store, *, workers: int | None = None, progress: Progress = silent,
    on_phase: Callable[[Phase], None] = lambda phase: None,
) -> Demo:  # fmt: skip
    """Run a study. Every part is done once for the same inputs."""
    seed = seed or scratch(study, corpus, store, progress)
    arms = branch(study, corpus, seed, store, workers=workers, progress=progress, on_phase=on_phase)
    on_phase(Phase(4, "Choose each router's settings on one half of the held-out documents, and compare all models on the other."))
    compared = compare(arms.held, arms.seed_N, arms.experts, arms.dense, arms.random)
    partition = store.load(arms.forest.partition, Partition)
    controls = tuple(arms.models[name] for name in CONTROLS.values())
    kept = keep_comparison(compared, arms.held, arms.forest, controls, store)
    return Demo(corpus, *kept, arms.forest, partition, seed, arms.models)


def branch(
    study: Study, corpus: Corpus, seed: Seed, store: Store, *, partition: Partition | None = None, workers: int | None = None,
    progress: Progress = silent, on_phase: Callable[[Phase], None] = lambda phase: None,
) -> Arms:  # fmt: skip
    """Train the experts and every control from the seed, and score them all. `partition`: the domains; None: found here."""
    on_phase(Phase(2, f"Find {study.domains} domains in the training text, without labels."))
    divisions = {
        name: given or divide(corpus, store, domains=study.domains, method=method, rng_seed=study.rng_seed, progress=progress)
        for name, method, given in (("expert", "balanced", partition), ("random", "random", None))
    }
    workers = workers or default_workers(seed, 2 * study.domains)
    sides = plan(study, seed, corpus, divisions, store)
    spec = HoldoutSpec(partition=divisions["expert"].digest, seed=seed.digest, length=study.length, documents=study.documents)
    on_phase(Phase(3, f"Train {sum(map(len, sides.values()))} models from one seed and score them on held-out text: {study.domains} "
                      f"experts, as many on random parts of the text, and {len(CONTROLS)} dense models on all of it."))  # fmt: skip
    trained = train_and_score(seed, sides, spec, store, workers=workers, progress=progress)
    columns = Columns(spec, store)
    loglik = {digest: columns[digest].loglik_N for digest in (seed.digest, *(one for side in trained.values() for one in side))}
    models = {CONTROLS.get(name, f"{name}/{place}"): one for name, side in trained.items() for place, one in enumerate(side)}

    def experts(name: str) -> Side:
        return _side(trained[name], loglik, divisions[name], columns.held, costs(sides[name], store), store)

    def control(name: str) -> Control:
        return Control(name, loglik[trained[name][0]], costs(sides[name], store, study.domains if name == LARGE else 1))

    forest = Forest(seed=seed.digest, partition=spec.partition, experts=tuple(trained["expert"]))
    dense = tuple(map(control, CONTROLS))
    return Arms(columns.held, loglik[seed.digest], experts("expert"), dense, experts("random"), forest, models)


def _side(
    digests: Sequence[Digest], loglik: dict[Digest, NDArray[np.floating]], division: Partition, held: Holdout,
    cost: Cost, store: Store,
) -> Side:  # fmt: skip
    """Experts of a partition's domains, by their digests."""
    order = sorted(range(len(digests)), key=digests.__getitem__)
    dist2_NK, sparse2_NK = measure_distances(held, division, store)
    return Side(
        np.column_stack([loglik[digests[place]] for place in order]), dist2_NK[:, order], cost,
        owners=tuple(order.index(place) for place in range(len(digests))),
        sparse2_NK=None if sparse2_NK is None else sparse2_NK[:, order],
    )  # fmt: skip


class GrowJob(Frozen):
    """Train a model, unless it is there, and score it: one process does both, so that a model is in memory once."""

    store: Path
    label: str
    holdout: HoldoutSpec
    train: TrainJob | None = None
    model: Digest | None = None

    def finished(self, columns: Columns) -> bool:
        """Whether all of it was done before."""
        made = found(self.train, columns.store) if self.train else [self.model or ""]
        return bool(made) and columns[made[0]].complete


def grow_job(job: GrowJob, progress: Progress) -> None:
    """The model and its Score are found by what they were made from."""
    digest = train_job(job.train, progress) if job.train else job.model or ""
    ensure([(job.label, digest)], open_columns(job.holdout, job.store), progress=progress)


def train_and_score(
    seed: Seed, sides: dict[str, list[TrainJob]], spec: HoldoutSpec, store: Store, *, workers: int, progress: Progress = silent,
) -> dict[str, list[Digest]]:  # fmt: skip
    """The models of each side, and everything scored, the seed too. Only what is missing is run."""

    def job(label: str, **what: Any) -> GrowJob:
        return GrowJob(label=label, holdout=spec, store=store.root, **what)

    columns = Columns(spec, store)
    jobs = [job(one.label, train=one) for side in sides.values() for one in side] + [job("the seed", model=seed.digest)]
    jobs = [one for one in jobs if not one.finished(columns)]
    tokens = {one.label: one.train.recipe.tokens for one in jobs if one.train}
    tokens |= {f"score {one.label}": int(columns.held.windows.length_W.sum()) for one in jobs}
    run(grow_job, jobs, workers=workers, torch=TORCH, progress=sum_progress("train and score", tokens, progress))
    return {name: [found(one, store)[0] for one in side] for name, side in sides.items()}


def sum_progress(what: str, tokens: dict[str, int], progress: Progress) -> Progress:
    """The progress of several tasks, by name with the tokens of each, as that of one."""
    done = dict.fromkeys(tokens, 0.0)

    def tell(task: str, count: float, total: float, unit: str) -> None:
        if unit == NOTE:
            progress(task, count, total, unit)
        elif task in done and total:
            done[task] = tokens[task] * count / total
            progress(what, sum(done.values()), sum(tokens.values()), "tokens")

    return tell


def plan(study: Study, seed: Seed, corpus: Corpus, divisions: dict[str, Partition], store: Store) -> dict[str, list[TrainJob]]:
    """Every model to train, by row of the table: the dense controls, which take longest, then the experts of each division.

    Each dense control reads the text in an order of its own, and none in that of the seed.
    """
    k, steps = study.domains, study.steps
    base = Recipe(
        method=study.method, steps=steps, batch=study.batch, length=study.length, rng_seed=study.rng_seed,
        threads=default_threads(seed),
    )  # fmt: skip
    middle = max(2, k // 2)
    dense = {
        DENSE: {"steps": k * steps, "learning_rate": study.dense_rate},
        MIDDLE: {"batch": middle * study.batch, "steps": -(-k * steps // middle), "learning_rate": study.middle_rate},
        LARGE: {"batch": k * study.batch, "learning_rate": study.large_rate},
    }

    def job(name: str, data: tuple[Shard, ...], recipe: Recipe, **place: Any) -> TrainJob:
        return TrainJob(store=store.root, label=name, seed=seed.digest, data=data, recipe=recipe, **place)

    made = {
        name: [job(name, corpus.train, base.model_copy(update=change | {"rng_seed": study.rng_seed + number}))]
        for number, (name, change) in enumerate(dense.items(), 1)
    }
    for name, division in divisions.items():
        recipe = base.model_copy(update={"learning_rate": study.random_rate if name == "random" else study.expert_rate})
        titles = [f"random part {place}" if name == "random" else f"expert {label(division, place)}" for place in range(k)]
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
