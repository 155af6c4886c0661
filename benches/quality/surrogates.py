"""Whether merges can be ranked without running them.

    python -m benches.quality.surrogates STORE FOREST [--merges 24] [--documents N]

Makes real merges of a forest's experts (random subsets, weights and scales by task arithmetic, and one in four by ties), scores each on
the held-out text, and measures how well each surrogate ranks them: from the experts' columns (log-linear pool, probability mixture,
interpolated log-likelihoods), and from statistics, if the experts left them ("gram", "fisher"; see elmwood/merge/estimate.py). One JSON
line per surrogate and kind of merge: rank correlation with the true losses, mean error in bits per byte, and the mean over merges of the
share of variance between blocks of (merge - seed) that it explains, which is what a control variate would save.

N tokens, E experts, C candidates
"""

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benches.common import open_forest, parser, say
from elmwood.engine import silent
from elmwood.errors import BadInput
from elmwood.evaluate.holdout import Holdout
from elmwood.evaluate.losses import bits_per_byte, block_nats
from elmwood.evaluate.surrogate import interpolation, mixture, pool
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.estimate import estimates
from elmwood.merge.layer_weights import everywhere
from elmwood.records import Forest, Merged, Seed
from elmwood.store import Store
from elmwood.study.quality.scoring import Columns, ensure

Floats = NDArray[np.floating]
SURROGATES = {"pool": pool, "mixture": mixture, "interpolation": interpolation}


def candidates(forest: Forest, seed: Seed, count: int, store: Store) -> list[tuple[str, Merged, Floats]]:
    """(rule, merge, coefficient of each expert [E]); of ties, the coefficients it would have if nothing were trimmed."""
    rng = np.random.default_rng(5)
    made = []
    for n in range(count):
        size = int(rng.integers(2, len(forest.experts) + 1))
        chosen = np.sort(rng.choice(len(forest.experts), size, replace=False))
        scale = float(rng.choice([0.5, 1.0, 1.5]))
        weight_M = scale * (np.ones(size) / size if n % 2 else rng.dirichlet(np.ones(size)))
        rule = "ties" if n % 4 == 3 else "task_arithmetic"
        answer = Answer(rule, {"density": 0.3, "scale": scale} if rule == "ties" else {})
        members = {forest.experts[e]: everywhere(float(w)) for e, w in zip(chosen, weight_M, strict=True)}
        coefficient_E = np.zeros(len(forest.experts))
        coefficient_E[chosen] = weight_M
        made.append((rule, merge(seed, members, [answer], store)[0], coefficient_E))
    return made


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store", type=Path)
    options.add_argument("forest")
    options.add_argument("--merges", type=int, default=24)
    options.add_argument("--documents", type=int)
    asked = options.parse_args()
    store = Store(asked.store)
    opened = open_forest(store, asked.forest)
    forest, seed = opened.forest, opened.seed
    made = candidates(forest, seed, asked.merges, store)
    models = [("seed", seed.digest), *((digest[:8], digest) for digest in forest.experts), *(("merge", one.digest) for _, one, _ in made)]
    found = ensure(models, Columns(opened.holdout(asked.documents), store), progress=silent)
    say(
        "surrogates",
        measured="columns",
        merges=len(made),
        tokens=len(found.holdout.document_N),
        forwarded=found.tokens,
        seconds=round(found.seconds, 1),
    )
    guessed_SC: dict[str, list[Floats]] = {}
    started = time.perf_counter()
    seed_N = found.columns[seed.digest]
    expert_NE = np.column_stack([found.columns[digest] for digest in forest.experts])
    for name, surrogate in SURROGATES.items():
        guessed_SC[name] = [surrogate(expert_NE, seed_N, coefficient_E) for _, _, coefficient_E in made]
    seconds = (time.perf_counter() - started) / len(made) / len(SURROGATES)
    report(made, guessed_SC, found.columns, seed_N, found.holdout, seconds)
    by_weights(made, found.columns, seed, forest, found.holdout, store)


def report(made, guessed_SC, columns, seed_N, held, seconds) -> None:
    every_D = np.ones(len(held.bytes_D), bool)

    def loss(loglik_N: Floats) -> float:
        return bits_per_byte(loglik_N, held, every_D).value

    true_C = np.array([loss(columns[one.digest]) for _, one, _ in made])
    gain_CB = [block_nats(columns[one.digest], held) - block_nats(seed_N, held) for _, one, _ in made]
    convex_C = np.array([coefficient_E.sum() <= 1 + 1e-9 for _, _, coefficient_E in made])
    for kind, mine_C in kinds(made, convex_C).items():
        places = np.flatnonzero(mine_C)
        for name, guesses in guessed_SC.items():
            value_c = np.array([loss(guesses[c]) for c in places])
            explained = [np.corrcoef(block_nats(guesses[c], held) - block_nats(seed_N, held), gain_CB[c])[0, 1] ** 2 for c in places]
            say("surrogates", measured="surrogate", surrogate=name, merges=kind, count=len(places), seed=round(loss(seed_N), 4),
                true=[round(float(true_C[places].min()), 4), round(float(true_C[places].max()), 4)],
                rank_correlation=round(float(spearmanr(value_c, true_C[places]).statistic), 3),
                mean_error=round(float(np.abs(value_c - true_C[places]).mean()), 4),
                variance_explained=round(float(np.mean(explained)), 3), seconds_each=round(seconds, 3))  # fmt: skip


def kinds(made, convex_C: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    ties_C = np.array([rule == "ties" for rule, _, _ in made])
    groups = {"sums up to one": ~ties_C & convex_C, "sums beyond": ~ties_C & ~convex_C, "ties": ties_C, "all": ties_C | True}
    return {kind: mine_C for kind, mine_C in groups.items() if mine_C.sum() > 2}


def by_weights(made, columns, seed: Seed, forest: Forest, held: Holdout, store: Store) -> None:
    true_C = [-float(columns[one.digest].sum(dtype=np.float64)) for _, one, _ in made]
    for kind in ("gram", "fisher"):
        try:
            found = estimates(seed, forest.experts, {str(c): one for c, (_, one, _) in enumerate(made)}, store, kind)
        except BadInput as error:
            return say("surrogates", measured="surrogate", surrogate="statistics", left_out=str(error))
        value_C = [sum(found[str(c)].values()) for c in range(len(made))]
        say(
            "surrogates",
            measured="surrogate",
            surrogate=kind,
            merges="all",
            count=len(made),
            rank_correlation=round(float(spearmanr(value_C, true_C).statistic), 3),
        )


if __name__ == "__main__":
    main()
