"""A forest without a trained seed, and every share of a seed between that and one dense model, at equal tokens.

    python -m benches.seedless.forest FOLDER [--shares 0,0.1,0.3] [--total 3M] [--domains 6] [--rates 1e-3,3e-3] [--rng-seeds 0]

A seed gets its share of all tokens, and the experts, together, the rest; so does each dense control, so that every side has read as many.
With a share of 0 all begin with the same random weights, and the domains are those of router LMs (SmallTalk, arXiv:2410.03529) and, in
their place, those of tf-idf. Every side takes the rate that is best on the tune half; figures are of the test half. `sequence`: one expert
for a whole document, chosen by its first 256 tokens, as the paper does, so the choice has seen what it predicts. About ten minutes for each
share, rate and rng seed on two cores. Finished steps in FOLDER are found again.
"""

from pathlib import Path

import numpy as np

from benches.common import Lines, integers, numbers, parser, say, words
from benches.seedless.share import at_rate, cell, tune
from elmwood.corpus.build import build
from elmwood.domains.grow import Means
from elmwood.engine import cores
from elmwood.evaluate.comparison import compare
from elmwood.evaluate.losses import bits_per_byte
from elmwood.records import Corpus, Partition, Seed
from elmwood.store import Store
from elmwood.study.demo import Arms, Study, branch, scratch
from elmwood.study.routers import find_domains
from elmwood.study.seeds import llama
from elmwood.train.tasks import start_seed
from elmwood.units import parse_count

READ = 256  # tokens of a document that choose its expert, in the paper


def by_sequence(arms: Arms) -> float:
    """Bits per byte of the test half where each document has one expert, the nearest by its first READ tokens."""
    held, side = arms.held, arms.experts
    begins_N = np.diff(held.document_N, prepend=-1) != 0
    first_D = np.flatnonzero(begins_N)
    last_D = np.append(first_D[1:], len(begins_N))
    chosen_D = side.dist2_NK[np.minimum(first_D + READ, last_D - 1)].argmin(1)
    loglik_N = side.loglik_NK[np.arange(len(begins_N)), np.repeat(chosen_D, last_D - first_D)]
    return round(bits_per_byte(loglik_N, held, ~held.tune_D).value, 4)


def routers(corpus: Corpus, study: Study, store: Store, rounds: int, tokens: str, progress: Lines) -> tuple[Partition, Seed]:
    """The domains of router LMs, and the seed that has their shape."""
    shape = llama(2, 64, study.vocabulary, READ)
    small = start_seed(corpus, shape, study.rng_seed, store, name="router", progress=progress)
    found = find_domains(
        corpus, small, store, domains=study.domains, rounds=rounds, tokens=tokens, rng_seed=study.rng_seed, means=Means(cores()),
        progress=progress,
    )  # fmt: skip
    return found, small


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--corpus", default="sample")
    options.add_argument("--shares", default="0,0.1,0.3")
    options.add_argument("--total", default="3M")
    options.add_argument("--domains", type=int, default=6)
    options.add_argument("--rates", default="1e-3,3e-3")
    options.add_argument("--rng-seeds", default="0")
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--router-tokens", default="200k")
    options.add_argument("--documents", type=int, default=None)
    asked = options.parse_args()
    store, progress, total = Store(asked.folder), Lines(), parse_count(asked.total)
    corpus = build(words(asked.corpus), store, progress=progress)
    for rng_seed in integers(asked.rng_seeds):
        for share in numbers(asked.shares):
            study = Study(
                seed_tokens=round(share * total), tokens=round((1 - share) * total), domains=asked.domains, documents=asked.documents,
                rng_seed=rng_seed,
            )  # fmt: skip
            partitions: dict[str, Partition | None] = {"tf-idf": None}
            if share:
                seed = scratch(study, corpus, store, progress)
            else:
                seed = start_seed(corpus, study.shape, rng_seed, store, progress=progress)
                partitions["router LMs"], small = routers(corpus, study, store, asked.rounds, asked.router_tokens, progress)
                read = asked.rounds * asked.domains * parse_count(asked.router_tokens)
                say("routers", parameters=small.parameters, of_expert=small.parameters / seed.parameters, tokens=read)
            for name, partition in partitions.items():
                each = [study.model_copy(update=at_rate(rate)) for rate in numbers(asked.rates)]
                arms = [branch(one, corpus, seed, store, partition=partition, progress=progress) for one in each]
                best, chosen = tune(arms, numbers(asked.rates))
                compared = compare(best.held, best.seed_N, best.experts, best.dense, best.random)
                say(
                    "seedless", share=share, total=total, domains=name, rng_seed=rng_seed, rates=chosen, sequence=by_sequence(best),
                    rows={row.name: cell(row) for row in compared.rows},
                )  # fmt: skip


if __name__ == "__main__":
    main()
