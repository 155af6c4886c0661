"""LoRA against full training inside c-BTM at equal tokens, and the best number of experts for a fixed number of tokens.

    python -m benches.quality.adapters_in_forest ranks FOLDER [--corpus ...] [--seed NAME] [--plot ranks.svg]
    python -m benches.quality.adapters_in_forest numbers FOLDER [--corpus ...] [--seed NAME] [--plot numbers.svg]

ranks: k experts, in full, and as adapters of several ranks on all layers or on the last third, all at the same tokens. The learning rate
of each kind is the best on the tune half at the middle rank. numbers: one adapter, then 4, 16, 64, 256 on smaller and smaller domains with
falling ranks, so that tokens and adapter parameters stay the same (--product is rank times experts), beside random clusters of the same
sizes and one model tuned in full on all the text. --together 16 trains 16 experts at once over one copy of the seed. One JSON line per
arm. Finished steps in FOLDER are found again.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from benches.common import Lines, integers, numbers, parser, say
from benches.quality.clusters import Bench
from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.engine import cores, run
from elmwood.evaluate.comparison import Side, compare
from elmwood.evaluate.holdout import Holdout, distances, open_holdout
from elmwood.evaluate.losses import row as row_of
from elmwood.records import Expert, Partition, Recipe, Seed
from elmwood.report.plots import Series, experts_plot
from elmwood.store import Store
from elmwood.study.demo import Study, scratch
from elmwood.study.tasks import experts_job, keys
from elmwood.study.training import training_job
from elmwood.units import parse_count

LATE = 1 / 3


def train_experts(bench: Bench, division: Partition, recipe: Recipe, together: int = 1) -> tuple[list[str], list[float]]:
    """One expert per domain, and the seconds each took."""
    places = range(len(division.domains))
    groups = [places[first : first + together] for first in range(0, len(places), together)]
    jobs = [training_job(division, group, bench.seed, recipe, bench.store.root, ()) for group in groups]
    made = run(experts_job, jobs, workers=bench.workers, progress=bench.progress)
    names = [key for job in jobs for key in keys(job, bench.store)]
    seconds = [line["seconds"] for key in names for line in bench.store.logged(key) if line.get("event") == "done"]
    return [digest for digests in made for digest in digests], seconds


def arm(bench: Bench, division: Partition, recipe: Recipe, together: int = 1) -> tuple[dict[str, object], np.ndarray]:
    """Train, score and mix: the facts of one arm, and its mixed column with the settings of the tune half."""
    digests, seconds = train_experts(bench, division, recipe, together)
    spec = bench.holdout(division)
    columns = bench.columns([*digests, bench.seed.digest], spec)
    held, seed_N = open_holdout(spec, bench.store), columns[bench.seed.digest]
    side = Side(np.column_stack([columns[digest] for digest in digests]), distances(held, division, bench.store, bench.progress))
    compared = compare(held, seed_N, side)
    sizes = [size(bench.store, digest) for digest in digests]
    row = next(row for row in compared.rows if row.name == compared.chosen)
    facts: dict[str, object] = {
        "method": recipe.method, "rank": recipe.rank if recipe.method != "full" else None, "late": round(recipe.late, 3),
        "learning_rate": recipe.learning_rate, "experts": len(digests), "clusters": division.method, "steps": recipe.steps,
        "tokens": recipe.tokens * len(digests), "bits_per_byte": round(row.bits_per_byte, 4), "chosen": compared.chosen,
        "tune_nats": round(compared.best.nats, 6),
        "gain_over_seed": [row.gain and round(row.gain, 4), row.gain_error and round(row.gain_error, 4)],
        "uniform": round(next(row.bits_per_byte for row in compared.rows if row.name == "uniform routing"), 4),
        "megabytes": round(sum(sizes) / 1e6, 3), "train_seconds": round(sum(seconds), 1),
        "seconds_per_expert": round(median(seconds), 2) if seconds else None,
    }  # fmt: skip
    return facts, compared.column_N


def size(store: Store, digest: str) -> int:
    """Bytes of weights on disk."""
    files = store.load(digest, Expert).files
    return sum(store.get(blob).stat().st_size for name, blob in files.items() if name.endswith(".safetensors"))


def paired(mixed_N: np.ndarray, other_N: np.ndarray, held: Holdout, domains: int) -> list[float]:
    """Bits per byte better than another, and its standard error over documents, on the test half."""
    row = row_of("", mixed_N, held, domains=domains, against_N=other_N)
    return [round(row.gain or 0.0, 4), round(row.gain_error or 0.0, 4)]


def compare_ranks(bench: Bench, division: Partition, asked: Namespace) -> tuple[list[Series], tuple[str, float]]:
    held = open_holdout(bench.holdout(division), bench.store)
    steps = bench.study.tokens // (len(division.domains) * bench.study.batch * bench.study.length)
    base = Recipe(steps=steps, batch=bench.study.batch, length=bench.study.length, threads=max(1, cores() // asked.workers))
    levels = integers(asked.ranks)
    middle = levels[len(levels) // 2]
    kinds = {"full": (base, asked.full_rates), **{
        name: (base.model_copy(update={"method": "lora", "rank": middle, "late": late}), asked.rates)
        for name, late in (("all layers", 1.0), ("last third", LATE))
    }}  # fmt: skip
    found: dict[str, dict[int, tuple[dict[str, object], np.ndarray]]] = {}
    for name, (recipe, grid) in kinds.items():
        tried = []
        for rate in numbers(grid):
            facts, mixed_N = arm(bench, division, recipe.model_copy(update={"learning_rate": rate}))
            say("adapters_in_forest", study="ranks", arm=name, tuning=True, **facts)
            tried.append((float(str(facts["tune_nats"])), rate, facts, mixed_N))
        _, rate, facts, mixed_N = min(tried, key=lambda one: one[0])
        found[name] = {recipe.rank: (facts, mixed_N)}
        for rank in levels if name != "full" else []:
            if rank != middle:
                facts, mixed_N = arm(bench, division, recipe.model_copy(update={"learning_rate": rate, "rank": rank}))
                found[name][rank] = (facts, mixed_N)
    full_N = next(iter(found["full"].values()))[1]
    for name, arms in found.items():
        for _, (facts, mixed_N) in sorted(arms.items()):
            say("adapters_in_forest", study="ranks", arm=name, **facts, over_full=paired(mixed_N, full_N, held, len(division.domains)))
    lines = [
        Series(name, [float(rank) for rank in sorted(arms)], [float(str(arms[rank][0]["bits_per_byte"])) for rank in sorted(arms)])
        for name, arms in found.items() if name != "full"
    ]  # fmt: skip
    return lines, ("tuned in full", float(str(next(iter(found["full"].values()))[0]["bits_per_byte"])))


def compare_numbers(bench: Bench, asked: Namespace, divisions: Sequence[Partition]) -> tuple[list[Series], tuple[str, float] | None]:
    lines: dict[str, dict[int, float]] = {}
    single_N = level = None
    for division in divisions:
        k = len(division.domains)
        rank = max(1, min(asked.cap, asked.product // k))
        batch = min(bench.study.batch, max(1, bench.study.tokens // (k * bench.study.length * asked.least)))
        recipe = Recipe(
            method="lora", rank=rank, batch=batch, length=bench.study.length, steps=bench.study.tokens // (k * batch * bench.study.length),
            learning_rate=numbers(asked.rates)[0] * (batch / bench.study.batch) ** 0.5, threads=max(1, cores() // asked.workers),
        )  # fmt: skip
        held = open_holdout(bench.holdout(division), bench.store)
        facts, mixed_N = arm(bench, division, recipe, asked.together)
        single_N = mixed_N if single_N is None else single_N
        if k == 1:
            dense = recipe.model_copy(update={"method": "full", "learning_rate": numbers(asked.full_rates)[0]})
            facts_dense, dense_N = arm(bench, division, dense)
            level = ("one model tuned in full", float(str(facts_dense["bits_per_byte"])))
            say("adapters_in_forest", study="numbers", batch=batch, **facts_dense, over_one=paired(dense_N, single_N, held, k))
        say("adapters_in_forest", study="numbers", batch=batch, **facts, over_one=paired(mixed_N, single_N, held, k))
        lines.setdefault(division.method, {})[k] = float(str(facts["bits_per_byte"]))
    return [Series(name, [float(k) for k in points], list(points.values())) for name, points in lines.items()], level


def main() -> None:
    options = parser(__doc__)
    options.add_argument("study", choices=["ranks", "numbers"])
    options.add_argument("folder", type=Path)
    options.add_argument("--corpus", nargs="+", default=["sample"])
    options.add_argument("--seed", help="a seed in FOLDER; without it one is trained from scratch")
    options.add_argument("--seed-tokens", default="4M")
    options.add_argument("--tokens", default="0.75M", help="of further training, all experts together")
    options.add_argument("--domains", default="8", help="several for `numbers`")
    options.add_argument("--clusters", default="plain")
    options.add_argument("--random", default="", help="numbers of random clusters beside them")
    options.add_argument("--ranks", default="2,8,32,128")
    options.add_argument("--cap", type=int, default=64, help="the largest rank of `numbers`")
    options.add_argument("--product", type=int, default=64, help="rank times experts of `numbers`, where the rank is not capped")
    options.add_argument("--together", type=int, default=1, help="experts of `numbers` that train at once over one copy of the seed")
    options.add_argument("--least", type=int, default=12, help="steps an expert gets at least, by smaller batches")
    options.add_argument("--rates", default="6e-3,1.2e-2", help="of adapters")
    options.add_argument("--full-rates", default="1.5e-3")
    options.add_argument("--documents", type=int, default=60)
    options.add_argument("--workers", type=int, default=cores())
    options.add_argument("--plot", type=Path)
    asked = options.parse_args()
    store = Store(asked.folder)
    study = Study(
        seed_tokens=parse_count(asked.seed_tokens), seed_threads=cores(), tokens=parse_count(asked.tokens), documents=asked.documents,
    )  # fmt: skip
    progress = Lines()
    corpus = build(asked.corpus, store, progress=progress)
    seed = store.load(asked.seed, Seed) if asked.seed else scratch(study, corpus, store, progress)
    bench = Bench(study, corpus, seed, store, asked.workers, progress)
    ks = integers(asked.domains)
    plans = [(k, asked.clusters) for k in ks] + [(k, "random") for k in integers(asked.random)]
    divisions = [divide(corpus, store, domains=k, method=method, progress=progress) for k, method in plans]
    lines, level = compare_ranks(bench, divisions[0], asked) if asked.study == "ranks" else compare_numbers(bench, asked, divisions)
    if asked.plot:
        asked.plot.write_text(experts_plot(lines, reference=level, by="rank" if asked.study == "ranks" else "number of experts"))


if __name__ == "__main__":
    main()
