"""A forest for other benches to start from: seed, domains, experts in full and as adapters, dense controls and random clusters, all named.

    python -m benches.forest STORE [--corpus FOLDER_OR_FILE ...] [--domains 8] [--seed-tokens 6M] [--tokens 1M] [--rank 16]

Names: lab/seed, lab/partition, lab/random-partition, lab/full/N, lab/lora/N, lab/random/N, lab/dense/batch|middle|large, lab/forest and
lab/ensemble (full), lab/lora-forest and lab/lora-ensemble. One JSON line per row of each table; finished steps in STORE are found again.
"""

from benches.common import Lines, parser, say
from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.engine import cores
from elmwood.records import Expert
from elmwood.store import Store
from elmwood.study.demo import CONTROLS, Study, grow, plan, scratch
from elmwood.train.task_names import train_key
from elmwood.units import parse_count


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store")
    options.add_argument("--corpus", nargs="+", default=["sample"])
    options.add_argument("--domains", type=int, default=8)
    options.add_argument("--seed-tokens", default="6M")
    options.add_argument("--tokens", default="1M")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--workers", type=int, default=cores())
    asked = options.parse_args()
    store = Store(asked.store)
    full = Study(
        domains=asked.domains, seed_tokens=parse_count(asked.seed_tokens), seed_threads=cores(), tokens=parse_count(asked.tokens),
        documents=300,
    )  # fmt: skip
    # adapters take about three times the rate of full tuning on a seed this small (docs/log/)
    rates = {"expert_rate": 6e-3, "random_rate": 2e-3, "dense_rate": 2e-3, "middle_rate": 4e-3, "large_rate": 6e-3}
    lora = full.model_copy(update={"method": "lora", **rates})
    progress = Lines()
    corpus = build(asked.corpus, store, progress=progress)
    seed = scratch(full, corpus, store, progress)
    store.name("lab/seed", seed.digest)
    divisions = {
        name: divide(corpus, store, domains=full.domains, method=method, progress=progress)
        for name, method in (("expert", "balanced"), ("random", "random"))
    }
    store.name("lab/partition", divisions["expert"].digest)
    store.name("lab/random-partition", divisions["random"].digest)
    for study, kind, prefix in ((full, "full", "lab/"), (lora, "lora", "lab/lora-")):
        grown = grow(study, corpus, seed, store, workers=asked.workers, progress=progress)
        store.name(f"{prefix}forest", grown.forest.digest)
        store.name(f"{prefix}ensemble", grown.ensemble.digest)
        names = {"expert": kind, "random": "random" if kind == "full" else "lora-random"}
        names |= {row: f"{'' if kind == 'full' else 'lora-'}{name}" for row, name in CONTROLS.items()}
        for row, jobs in plan(study, seed, corpus, divisions, store).items():
            for place, job in enumerate(jobs):
                done = store.done(train_key(seed, job.data, job.recipe, job.partition, job.domain))
                expert = store.load(done or "", Expert)
                store.name(f"lab/{names[row]}" + (f"/{place}" if len(jobs) > 1 else ""), expert.digest)
        for row in grown.comparison.rows:
            say("forest", experts=kind, **row.model_dump(exclude={"domains"}))


if __name__ == "__main__":
    main()
