"""Where specialisation pays: gain of c-BTM over its controls against the seed's share of all tokens, and against k.

    python -m benches.seedless.share FOLDER [--seed-tokens 0.4M,1.25M,3M,6M] [--domains 6] [--tokens 0.75M] [--rates 1e-3,2e-3]

For each seed every side (experts, random clusters, dense controls) is trained at every learning rate and takes the rate with the least
loss on the tune half. All figures are of the test half. One JSON line per setting. About ten minutes per setting on two cores. Finished
steps in FOLDER are found again.
"""

from pathlib import Path

import numpy as np

from benches.common import Lines, integers, numbers, parser, say, words
from elmwood.corpus.build import build
from elmwood.engine import cores
from elmwood.evaluate.comparison import Side, compare
from elmwood.records import Row
from elmwood.store import Store
from elmwood.study.demo import DENSE, Arms, Study, branch, scratch
from elmwood.units import parse_count


def tune(arms: list[Arms], rates: list[float]) -> tuple[Arms, dict[str, float]]:
    """Each side at its own best rate on the tune half."""
    held = arms[0].held

    def loss(loglik_N: np.ndarray) -> float:
        return -float(loglik_N[held.tune_N].mean())

    def mixed(one: Arms, side: Side) -> float:
        return compare(held, one.seed_N, side).best.nats

    places = range(len(arms))
    experts = min(places, key=lambda i: mixed(arms[i], arms[i].experts))
    random = min(places, key=lambda i: mixed(arms[i], arms[i].random))
    dense = [min(places, key=lambda i: loss(arms[i].dense[j].loglik_N)) for j in range(len(arms[0].dense))]
    best = arms[experts]._replace(random=arms[random].random, dense=tuple(arms[i].dense[j] for j, i in enumerate(dense)))
    names = [control.name for control in best.dense]
    factor = {name: 1 if name == DENSE else 2 for name in names}
    chosen = {name: rates[i] * factor[name] for name, i in zip(names, dense, strict=True)}
    return best, {"experts": rates[experts], "random clusters": rates[random]} | chosen


def cell(row: Row) -> list[float | None]:
    """Bits per byte, gain over the strongest dense control, its standard error."""
    return [value and round(value, 4) for value in (row.bits_per_byte, row.gain, row.gain_error)]


def at_rate(rate: float) -> dict[str, float]:
    """The fields of a study with this rate on every side; larger batches take twice as much."""
    return dict.fromkeys(("expert_rate", "random_rate", "dense_rate"), rate) | dict.fromkeys(("middle_rate", "large_rate"), 2 * rate)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--seed-tokens", default="0.4M,1.25M,3M,6M")
    options.add_argument("--domains", default="6")
    options.add_argument("--tokens", default="0.75M")
    options.add_argument("--rates", default="1e-3,2e-3")
    options.add_argument("--documents", type=int, default=None)
    asked = options.parse_args()
    store = Store(asked.folder)
    rates = numbers(asked.rates)
    progress = Lines()
    corpus = build(["sample"], store, progress=progress)
    for seed_tokens in map(parse_count, words(asked.seed_tokens)):
        for domains in integers(asked.domains):
            base = Study(
                seed_tokens=seed_tokens, seed_threads=cores(), domains=domains, tokens=parse_count(asked.tokens),
                documents=asked.documents,
            )  # fmt: skip
            seed = scratch(base, corpus, store, progress)
            studies = [base.model_copy(update=at_rate(rate)) for rate in rates]
            arms = [branch(study, corpus, seed, store, workers=None, progress=progress) for study in studies]
            best, chosen = tune(arms, rates)
            compared = compare(best.held, best.seed_N, best.experts, best.dense, best.random)
            line = {
                "seed_tokens": seed_tokens, "tokens": base.tokens, "domains": domains,
                "share": round(seed_tokens / (seed_tokens + base.tokens), 3), "rates": chosen, "fitted": compared.fitted,
                "rows": {row.name: cell(row) for row in compared.rows},
            }  # fmt: skip
            say("seed_share", **line)


if __name__ == "__main__":
    main()
