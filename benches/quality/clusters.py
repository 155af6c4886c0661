"""Whether specialisation on discovered domains pays, and up to which k: c-BTM with balanced, plain and random clusters.

    python -m benches.quality.clusters FOLDER [--corpus FOLDER_OR_FILE ...] [--domains 4,8,16,32] [--tokens 0.75M] [--rates 1.5e-3,3e-3]

One small seed; every row takes the same further tokens. Dense controls are trained at every rate and with one, four and sixteen times the
experts' batch. Experts of balanced and of random clusters are tuned over the same rates at the second k; the best rate on the tune half
is used for all k (plain clusters use that of balanced ones). One JSON line per k and method, with gains over the dense model that is best
on the test half; then one with the rates. About an hour on one core. Finished steps in FOLDER are found again.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benches.common import Lines, integers, numbers, parser, say, words
from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.engine import Progress, cores, run
from elmwood.evaluate.comparison import Control, Side, compare
from elmwood.evaluate.holdout import Holdout, HoldoutSpec, distances, open_holdout
from elmwood.records import Corpus, Digest, Partition, Recipe, Seed
from elmwood.store import Store
from elmwood.study.demo import Study, scratch
from elmwood.study.quality.scoring import Columns, ensure
from elmwood.study.tasks import TrainJob, train_job
from elmwood.study.training import shards
from elmwood.units import parse_count

BATCHES = (1, 4, 16)  # times the experts' batch, of dense controls


class Bench(NamedTuple):
    """What every arm shares."""

    study: Study
    corpus: Corpus
    seed: Seed
    store: Store
    workers: int
    progress: Progress

    def recipe(self, tokens: int, rate: float, times: int = 1) -> Recipe:
        batch = times * self.study.batch
        return Recipe(
            steps=max(1, tokens // (batch * self.study.length)), batch=batch, length=self.study.length, learning_rate=rate,
            threads=max(1, cores() // self.workers),
        )  # fmt: skip

    def train(self, jobs: list[TrainJob]) -> list[Digest]:
        return run(train_job, jobs, workers=self.workers, progress=self.progress)

    def holdout(self, division: Partition) -> HoldoutSpec:
        """All partitions of a corpus share their held-out documents, and so the columns."""
        return HoldoutSpec(partition=division.digest, seed=self.seed.digest, length=self.study.length, documents=self.study.documents)

    def columns(self, models: list[Digest], spec: HoldoutSpec) -> dict[Digest, np.ndarray]:
        named = [(model[:8], model) for model in models]
        return ensure(named, Columns(spec, self.store), workers=self.workers, progress=self.progress).columns


def experts(bench: Bench, division: Partition, rate: float) -> list[Digest]:
    """One expert per domain, equal tokens each."""
    recipe = bench.recipe(bench.study.tokens // len(division.domains), rate)
    return bench.train([
        TrainJob(
            store=bench.store.root, label=f"{division.method} {place}/{len(division.domains)}", seed=bench.seed.digest,
            data=shards(division, place), recipe=recipe, partition=division.digest, domain=place,
        )
        for place in range(len(division.domains))
    ])  # fmt: skip


def side(bench: Bench, division: Partition, rate: float) -> tuple[Holdout, Side]:
    digests = experts(bench, division, rate)
    spec = bench.holdout(division)
    columns = bench.columns(digests, spec)
    held = open_holdout(spec, bench.store)
    loglik_NK = np.column_stack([columns[digest] for digest in digests])
    return held, Side(loglik_NK, distances(held, division, bench.store, bench.progress))


def dense(bench: Bench, rates: list[float], spec: HoldoutSpec) -> list[Control]:
    """For each batch the rate with the least loss on the tune half (the rate grows with the root of the batch)."""
    held, chosen = open_holdout(spec, bench.store), []
    for times in BATCHES:
        recipes = [bench.recipe(bench.study.tokens, rate * times**0.5 / 4, times) for rate in rates]
        jobs = [
            TrainJob(store=bench.store.root, label=f"dense x{times}", seed=bench.seed.digest, data=bench.corpus.train, recipe=recipe)
            for recipe in recipes
        ]
        digests = bench.train(jobs)
        columns = bench.columns(digests, spec)
        best = max(range(len(rates)), key=lambda i: columns[digests[i]][held.tune_N].mean())
        name = f"dense, {times} x batch, rate {recipes[best].learning_rate:g}"
        chosen.append(Control(name, columns[digests[best]]))
    return chosen


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--corpus", nargs="+", default=["sample"])
    options.add_argument("--domains", default="4,8,16,32")
    options.add_argument("--methods", default="balanced,plain,random")
    options.add_argument("--seed-tokens", default="4M")
    options.add_argument("--tokens", default="0.75M")
    options.add_argument("--rates", default="1.5e-3,3e-3")
    options.add_argument("--documents", type=int, default=120)
    options.add_argument("--workers", type=int, default=cores())
    asked = options.parse_args()
    store, rates = Store(asked.folder), numbers(asked.rates)
    ks = integers(asked.domains)
    study = Study(
        seed_tokens=parse_count(asked.seed_tokens), seed_threads=cores(), tokens=parse_count(asked.tokens), documents=asked.documents,
    )  # fmt: skip
    progress = Lines()
    corpus = build(asked.corpus, store, progress=progress)
    seed = scratch(study, corpus, store, progress)
    bench = Bench(study, corpus, seed, store, asked.workers, progress)
    middle = ks[min(1, len(ks) - 1)]
    first = divide(corpus, store, domains=middle, method="balanced", progress=progress)
    spec = bench.holdout(first)
    seed_N = bench.columns([seed.digest], spec)[seed.digest]
    controls = dense(bench, rates, spec)
    tuned: dict[str, float] = {}
    for method in ("balanced", "random"):
        division = divide(corpus, store, domains=middle, method=method, progress=progress)
        sides = {rate: side(bench, division, rate) for rate in rates}
        tuned[method] = min(rates, key=lambda rate: compare(sides[rate][0], seed_N, sides[rate][1]).best.nats)
    for k in ks:
        for method in words(asked.methods):
            division = divide(corpus, store, domains=k, method=method, progress=progress)
            held, found = side(bench, division, tuned["random" if method == "random" else "balanced"])
            say("clusters", **line(bench, held, seed_N, controls, k, method, found))
    say("clusters", rates=tuned, dense=[control.name for control in controls])


def line(bench: Bench, held: Holdout, seed_N: np.ndarray, controls: list[Control], k: int, method: str, found: Side) -> dict[str, object]:
    """What the honest table says of one division, shortened."""
    compared = compare(held, seed_N, found, controls)
    return {
        "domains": k, "method": method, "chosen": compared.chosen, "tokens": bench.study.tokens,
        "seed_tokens": bench.study.seed_tokens, "fitted": {name: round(value, 4) for name, value in compared.fitted.items()},
        "rows": {row.name: [value and round(value, 4) for value in (row.bits_per_byte, row.gain, row.gain_error)] for row in compared.rows},
    }  # fmt: skip


if __name__ == "__main__":
    main()
