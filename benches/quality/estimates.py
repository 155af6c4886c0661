"""How estimates from statistics rank merges, beside their losses on held-out text.

    python -m benches.quality.estimates STORE EXPERT [EXPERT …] [--documents 60]     # names or digests; statistics are made where absent

One line for each candidate, and Spearman's rank correlation of both estimates with the loss (tune half, bits per byte), over all candidates
and over those that are better than the seed. Seconds are of this machine: for all estimates together, and for all losses.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter

from scipy.stats import spearmanr

from elmwood.engine import silent
from elmwood.errors import BadInput
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.estimate import estimates
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.statistics import found
from elmwood.records import Expert, Record, Seed
from elmwood.store import Store
from elmwood.study.selection import tune
from elmwood.train.statistics import statistics

CANDIDATES = [
    *(Answer("task_arithmetic", {"scale": scale}) for scale in (0.1, 0.2, 0.3, 0.5, 0.8)),
    Answer("average", {}),
    *(Answer("ties", {"density": density, "scale": scale}) for density in (0.2, 0.6) for scale in (0.5, 1.0)),
    Answer("dare", {"density": 0.5, "scale": 0.2}),
    Answer("della_ties", {"density": 0.5, "scale": 0.5}),
    Answer("breadcrumbs", {"scale": 0.2}),
    Answer("sce", {}),
    Answer("model_stock", {}),
    Answer("multislerp", {}),
    Answer("karcher", {}),
    *(Answer(method, {}) for method in ("fisher", "uncertainty", "regmean", "wudi")),
    *(Answer(method, {"scale": scale}) for method in ("iso_c", "tsv") for scale in (0.3, 1.0)),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("experts", nargs="+")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--rows", type=int, default=64)
    asked = parser.parse_args()
    store = Store(asked.store)
    experts = [store.load(name, Expert) for name in asked.experts]
    started = perf_counter()
    for expert in experts:
        try:
            found(expert.digest, store)
        except BadInput:
            statistics(expert, store, rows=asked.rows)
    left = perf_counter() - started
    seed = store.load(experts[0].seed, Seed)
    members = {expert.digest: everywhere(1.0) for expert in experts}
    started = perf_counter()
    made = merge(seed, members, CANDIDATES, store)
    merging = perf_counter() - started
    titles = [" ".join([one.method, *(f"{key}={value:g}" for key, value in one.settings.items())]) for one in CANDIDATES]
    candidates = dict(zip(titles, made, strict=True))
    started = perf_counter()
    both = {kind: estimates(seed, list(members), candidates, store, kind) for kind in ("gram", "fisher")}
    estimating = perf_counter() - started
    totals = {kind: {name: sum(rows.values()) for name, rows in table.items()} for kind, table in both.items()}
    started = perf_counter()
    models: dict[str, Record] = {**candidates, "seed": seed}
    losses = tune(models, seed, experts[0].partition or "", asked.documents, store, silent).losses
    scoring = perf_counter() - started
    for name in titles:
        print(json.dumps({"bench": "estimates", "merge": name, "bits_per_byte": round(losses[name].value, 4),
                          **{kind: round(totals[kind][name], 6) for kind in totals}}), flush=True)  # fmt: skip
    better = [name for name in titles if losses[name].value < losses["seed"].value]
    line = {"bench": "estimates", "experts": len(experts), "seed": round(losses["seed"].value, 4), "better_than_seed": len(better)}
    for kind, values in totals.items():
        for what, names in (("all", titles), ("better", better)):
            if len(names) > 2:
                line[f"{kind}_{what}"] = round(
                    float(spearmanr([values[name] for name in names], [losses[name].value for name in names])[0]), 3
                )
        first = min(values, key=lambda name: values[name])
        line[f"{kind}_first"], line[f"{kind}_first_loss"] = first, round(losses[first].value, 4)
    best = min(titles, key=lambda name: losses[name].value)
    line |= {"best": best, "best_loss": round(losses[best].value, 4)}
    seconds = {"statistics": left, "merges": merging, "estimates": estimating, "losses": scoring}
    print(json.dumps(line | {f"{name}_s": round(value, 1) for name, value in seconds.items()}), flush=True)


if __name__ == "__main__":
    main()
