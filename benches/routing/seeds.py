"""Routers over several rng seeds, with the learning rates of experts and dense training chosen on one grid.

    python -m benches.routing.seeds STORE --corpus FOLDER [--rng-seeds 0,1,2] [--rates 1e-3,2e-3,4e-3] [--domains 16] [--tokens 700k]
        [--documents 120] [--random 0,1,2] [--twice 0]

The seed is the demo's packaged one. At the first rng seed, experts and a dense control (the experts' batch, as many tokens) are trained
at each rate of the grid; each side takes the one that is best on the tune half, the experts under `live` with two and the seed. Then, for
each rng seed: domains found anew, experts, the dense control, for the rng seeds of `--random` random parts at the experts' rate, and for
those of `--twice` a dense control on twice the tokens. Settings of routers come from the tune half, figures are bits per byte on the test
half, gains are over the dense control of the same rng seed, paired, with errors over documents. At the end, for each row the mean over rng
seeds and its standard error.

N scored tokens
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benches.common import Lines, Opened, figures, integers, numbers, parser, say
from benches.quality.routers import Bench
from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.domains.route import router_of, weights
from elmwood.evaluate.comparison import ExpertColumns, Side
from elmwood.evaluate.holdout import HoldoutSpec
from elmwood.evaluate.losses import bits_per_byte
from elmwood.records import Corpus, Forest, Partition, Seed
from elmwood.store import Store
from elmwood.study.demo import DENSE, Study, plan, train_and_score
from elmwood.study.demo_seed import install_seed
from elmwood.study.tasks import TrainJob
from elmwood.units import parse_count

Jobs = dict[str, list[TrainJob]]


class World(NamedTuple):
    """What all rng seeds share."""

    store: Store
    corpus: Corpus
    seed: Seed
    study: Study


def divisions(world: World, rng_seed: int) -> dict[str, Partition]:
    """Domains, and random parts."""
    return {
        name: divide(world.corpus, world.store, domains=world.study.domains, method=method, rng_seed=rng_seed, progress=Lines())
        for name, method in (("expert", "balanced"), ("random", "random"))
    }


def jobs(world: World, rng_seed: int, expert_rate: float, dense_rate: float) -> Jobs:
    """Every model of one rng seed: experts, random parts, dense, and dense on twice the tokens."""
    rates = {"expert_rate": expert_rate, "random_rate": expert_rate, "dense_rate": dense_rate, "rng_seed": rng_seed}
    made = plan(world.study.model_copy(update=rates), world.seed, world.corpus, divisions(world, rng_seed), world.store)
    (dense,) = made[DENSE]
    longer = dense.recipe.model_copy(update={"steps": 2 * dense.recipe.steps})
    twice = dense.model_copy(update={"recipe": longer, "label": f"{dense.label}, twice the tokens"})
    return {"expert": made["expert"], "random": made["random"], "dense": [dense], "twice": [twice]}


def train(world: World, rng_seed: int, wanted: Jobs) -> tuple[Bench, dict[str, list[str]]]:
    """Train and score what is missing."""
    (partition,) = {job.partition for job in wanted["expert"] if job.partition}
    spec = HoldoutSpec(partition=partition, seed=world.seed.digest, length=world.study.length, documents=world.study.documents)
    trained = train_and_score(world.seed, wanted, spec, world.store, workers=1, progress=Lines())
    forest = Forest(seed=world.seed.digest, partition=partition, experts=tuple(trained["expert"]))
    opened = Opened(world.store, forest, world.seed, world.store.load(partition, Partition), None)
    return Bench(opened, world.study.documents, world.study.length), trained


# ---- rates ----------------------------------------------------------------------------------------------------------


def choose_rates(world: World, rng_seed: int, rates: Sequence[float]) -> tuple[float, float]:
    """Of the experts and of dense training, by the tune half."""
    experts, dense = {}, {}
    for rate in rates:
        all_jobs = jobs(world, rng_seed, rate, rate)
        bench, trained = train(world, rng_seed, {name: all_jobs[name] for name in ("dense", "expert")})
        columns = ExpertColumns.of(bench.held, bench.seed_N, bench.side(trained["expert"]))
        (fit,) = columns.calibrate("live", [2])
        dense_N = bench.column(trained["dense"][0])
        experts[rate], dense[rate] = fit.nats, -float(dense_N[bench.held.tune_N].mean())
        test = [bits_per_byte(one_N, bench.held, bench.test_D).value for one_N in (columns.column(fit.routing), dense_N)]
        say("seeds", measured="rate", rate=rate, experts_tune=fit.nats, dense_tune=dense[rate], experts=test[0], dense=test[1])
    return min(experts, key=experts.__getitem__), min(dense, key=dense.__getitem__)


# ---- rows -----------------------------------------------------------------------------------------------------------


def rows(bench: Bench, trained: dict[str, list[str]]) -> Iterator[tuple[str, float, np.ndarray]]:
    """Name, candidates run per token and column of each row."""
    dense_N = bench.column(trained["dense"][0])
    own = bench.side(trained["expert"])
    yield "seed", 1, bench.seed_N
    yield "dense", 1, dense_N
    if "twice" in trained:
        yield "dense, twice the tokens", 1, bench.column(trained["twice"][0])
    many = own.loglik_NK.shape[1]
    asked: list[tuple[str, Side, np.ndarray, str, Sequence[int]]] = [
        *(("experts", own, bench.seed_N, router, (1, 2, 4)) for router in ("centroid", "sparse", "live", "live-sparse")),
        ("experts", own, bench.seed_N, "posterior", (2, many + 1)),
        ("dense and the seed", bench.alone(dense_N), bench.seed_N, "live", (1,)),
        ("experts and a pooled expert, no seed", own, dense_N, "live", (2,)),
    ]
    if "random" in trained:
        asked.append(("random clusters", bench.side(trained["random"]), bench.seed_N, "live", (2, many)))
    for of, side, seed_N, router, top_ks in asked:
        columns = ExpertColumns.of(bench.held, seed_N, side)
        for top_k in top_ks:
            (fit,) = columns.calibrate(router, [top_k])
            weight_NC = weights(columns.signals(fit.routing), fit.routing)
            run = (weight_NC > 0).sum(1).mean() if router_of(fit.routing).distances else weight_NC.shape[1]
            yield f"{of}, {router}, {top_k}", float(run), columns.column(fit.routing)


def tell(world: World, rng_seed: int, bench: Bench, trained: dict[str, list[str]]) -> dict[str, tuple[float, float]]:
    """Bits per byte and gain over dense of each row."""
    dense_N, found = bench.column(trained["dense"][0]), {}
    for name, run, column_N in rows(bench, trained):
        line = figures(column_N, dense_N, bench.held, bench.test_D)
        found[name] = line["bits_per_byte"], line["gain"]
        say("seeds", rng_seed=rng_seed, row=name, run_per_token=run, **line)
    return found


def summarise(found: Sequence[dict[str, tuple[float, float]]]) -> None:
    """Means over rng seeds and their standard errors, of the rows that all have."""
    for name in [name for name in found[0] if all(name in one for one in found)]:
        value_S2 = np.array([one[name] for one in found])
        error_2 = value_S2.std(0, ddof=1) / len(found) ** 0.5 if len(found) > 1 else np.full(2, np.nan)
        loss, gain = value_S2.mean(0)
        say("seeds", row=name, rng_seeds=len(found), bits_per_byte=loss, error=error_2[0], gain=gain, gain_error=error_2[1])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store", type=Path)
    options.add_argument("--corpus", default="sample")
    options.add_argument("--rng-seeds", default="0,1,2")
    options.add_argument("--rates", default="1e-3,2e-3,4e-3")
    options.add_argument("--random", default="0,1,2")
    options.add_argument("--twice", default="0")
    options.add_argument("--domains", type=int, default=16)
    options.add_argument("--tokens", default="700k")
    options.add_argument("--documents", type=int, default=120)
    asked = options.parse_args()
    store, rng_seeds = Store(asked.store), integers(asked.rng_seeds)
    seed = install_seed(build(["sample"], store, progress=Lines()), store)
    study = Study(domains=asked.domains, tokens=parse_count(asked.tokens), documents=asked.documents)
    world = World(store, build([asked.corpus], store, progress=Lines()), seed, study)
    expert_rate, dense_rate = choose_rates(world, rng_seeds[0], numbers(asked.rates))
    say("seeds", measured="rates", experts=expert_rate, dense=dense_rate)
    found = []
    for rng_seed in rng_seeds:
        wanted = jobs(world, rng_seed, expert_rate, dense_rate)
        for name in ("random", "twice"):
            if rng_seed not in integers(getattr(asked, name)):
                del wanted[name]
        found.append(tell(world, rng_seed, *train(world, rng_seed, wanted)))
    summarise(found)


if __name__ == "__main__":
    main()
