"""What the demo stands on: its packaged seed, the learning rate of each side, and how much luck is in its result.

    python -m benches.demo seed FOLDER [--into elmwood/study/demo_seed]    train the seed anew, and write the packaged files
    python -m benches.demo rates FOLDER [--sides expert,dense] [--rates 1e-3,2e-3]
    python -m benches.demo repeats FOLDER [--rng-seeds 1,2] [--tokens 1.2M]

`seed` takes six CPU minutes. `rates` trains each side at each rate, and prints its loss on the tune half: experts and random parts as
the ensemble that is best there, a dense control alone; about one CPU minute for each. `repeats` runs the demo's study once for each seed
of the random numbers (other clusters, another order of data), and with --tokens dense controls on more tokens than the experts; about
six CPU minutes for each. What was done in FOLDER is found again. One JSON line per measurement.
"""

from pathlib import Path

import numpy as np

from benches.common import Lines, integers, numbers, parser, say, words
from elmwood.corpus.build import build
from elmwood.engine import cores
from elmwood.evaluate.comparison import compare
from elmwood.records import Corpus, Seed
from elmwood.store import Store
from elmwood.study.demo import CONTROLS, DENSE, LARGE, MIDDLE, Arms, Study, branch, grow, scratch
from elmwood.study.demo_seed import compare_packaged, install_seed, pack_seed
from elmwood.units import parse_count

SIDES = {"expert": None, "random": None, "dense": DENSE, "middle": MIDDLE, "large": LARGE}  # field of Study -> its dense row


def train_seed(corpus: Corpus, store: Store, into: Path | None) -> None:
    """Train it; say whether it is the packaged one, and write the files where asked."""
    seed = scratch(Study(), corpus, store, Lines())
    found = None if into else compare_packaged(seed, store)
    say("demo seed", digest=seed.digest, loss=seed.curve[-1].loss, **(found._asdict() if found else {}))
    if into:
        pack_seed(seed, store, into)


def tune(corpus: Corpus, seed: Seed, store: Store, sides: list[str], rates: list[float], workers: int) -> None:
    """Loss on the tune half, nats per token, of each side at each rate."""
    for side in sides:
        for rate in rates:
            arms = branch(Study(**{f"{side}_rate": rate}), corpus, seed, store, workers=workers, progress=Lines())
            say("demo rates", side=side, rate=rate, tune_nats=tune_loss(arms, side))


def tune_loss(arms: Arms, side: str) -> float:
    if (row := SIDES[side]) is not None:
        loglik_N = next(one.loglik_N for one in arms.dense if one.name == row)
        return -float(loglik_N[arms.held.tune_N].mean(dtype=np.float64))
    experts = arms.experts if side == "expert" else arms.random
    return compare(arms.held, arms.seed_N, experts).best.nats


def repeat(corpus: Corpus, seed: Seed, store: Store, rng_seeds: list[int], tokens: int | None, workers: int) -> None:
    """The demo's table for each seed of the random numbers; then, on more tokens, the dense controls alone."""
    studies = [Study(rng_seed=number) for number in rng_seeds] + ([Study(tokens=tokens)] if tokens else [])
    for study in studies:
        made = grow(study, corpus, seed, store, workers=workers, progress=Lines())
        for row in made.comparison.rows:
            if study.tokens == Study().tokens or row.name in CONTROLS:
                say("demo repeats", rng_seed=study.rng_seed, tokens_asked=study.tokens, **row.model_dump(exclude={"domains"}))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=["seed", "rates", "repeats"])
    options.add_argument("folder", type=Path)
    options.add_argument("--into", type=Path)
    options.add_argument("--sides", default=",".join(SIDES))
    options.add_argument("--rates", default="1e-3,2e-3")
    options.add_argument("--rng-seeds", default="1,2")
    options.add_argument("--tokens")
    options.add_argument("--workers", type=int, default=cores())
    asked = options.parse_args()
    store = Store(asked.folder)
    corpus = build(["sample"], store, progress=Lines())
    if asked.what == "seed":
        return train_seed(corpus, store, asked.into)
    seed = install_seed(corpus, store)
    if asked.what == "rates":
        return tune(corpus, seed, store, words(asked.sides), numbers(asked.rates), asked.workers)
    repeat(corpus, seed, store, integers(asked.rng_seeds), asked.tokens and parse_count(asked.tokens), asked.workers)


if __name__ == "__main__":
    main()
