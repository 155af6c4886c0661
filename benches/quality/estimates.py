"""How estimates from statistics rank merges, beside their losses on held-out text.

    python -m benches.quality.estimates STORE EXPERT [EXPERT …] [--documents 60]     # names or digests; missing statistics are computed

One line for each candidate; then Spearman's rank correlation of both estimates with the loss (tune half, bits per byte), over all
candidates and over those that are better than the seed. Seconds are of this machine: for all estimates together, and for all losses.
"""

from pathlib import Path

from scipy.stats import spearmanr

from benches.common import parser, say, timed
from benches.models import leave_statistics
from elmwood.engine import silent
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.estimate import estimates
from elmwood.merge.layer_weights import everywhere
from elmwood.records import Expert, Record, Seed
from elmwood.store import Store
from elmwood.study.quality.selection import tune

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


def say_ranks(losses: dict[str, float], totals: dict[str, dict[str, float]], seconds: dict[str, float]) -> None:
    """How each estimate orders the merges, all of them and those that are better than the seed."""
    titles = [name for name in losses if name != "seed"]
    better = [name for name in titles if losses[name] < losses["seed"]]
    line: dict[str, object] = {"seed": losses["seed"], "better_than_seed": len(better)}
    for kind, value_of in totals.items():
        for what, names in (("all", titles), ("better", better)):
            if len(names) > 2:
                line[f"{kind}_{what}"] = float(spearmanr([value_of[name] for name in names], [losses[name] for name in names])[0])
        first = min(value_of, key=lambda name: value_of[name])
        line |= {f"{kind}_first": first, f"{kind}_first_loss": losses[first]}
    best = min(titles, key=lambda name: losses[name])
    say("estimates", **line, best=best, best_loss=losses[best], **{f"{name}_s": value for name, value in seconds.items()})


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store", type=Path)
    options.add_argument("experts", nargs="+")
    options.add_argument("--documents", type=int, default=60)
    options.add_argument("--rows", type=int, default=64)
    asked = options.parse_args()
    store = Store(asked.store)
    experts = [store.load(name, Expert) for name in asked.experts]
    seed, members = store.load(experts[0].seed, Seed), {expert.digest: everywhere(1.0) for expert in experts}
    _, leaving = timed(lambda: leave_statistics(experts, store=store, rows=asked.rows))
    made, merging = timed(lambda: merge(seed, members, CANDIDATES, store))
    titles = [" ".join([one.method, *(f"{key}={value:g}" for key, value in one.settings.items())]) for one in CANDIDATES]
    candidates = dict(zip(titles, made, strict=True))
    both, estimating = timed(lambda: {kind: estimates(seed, list(members), candidates, store, kind) for kind in ("gram", "fisher")})
    totals = {kind: {name: float(sum(rows.values())) for name, rows in table.items()} for kind, table in both.items()}
    models: dict[str, Record] = {**candidates, "seed": seed}
    tuned, scoring = timed(lambda: tune(models, seed, experts[0].partition or "", asked.documents, store, silent))
    losses = {name: loss.value for name, loss in tuned.losses.items()}
    for name in titles:
        say("estimates", merge=name, bits_per_byte=losses[name], **{kind: totals[kind][name] for kind in totals})
    say_ranks(losses, totals, {"statistics": leaving, "merges": merging, "estimates": estimating, "losses": scoring})


if __name__ == "__main__":
    main()
