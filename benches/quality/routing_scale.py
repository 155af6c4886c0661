"""Routing as the number of domains grows: what it costs, what it finds, and rules that run fewer experts beside those that run more.

python -m benches.quality.routing_scale grow STORE --corpus LARGER [--domains 24] [--tokens 1.5M] [--seed-tokens 4M]
"""

from pathlib import Path

from benches.common import Lines, parser, say
from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.evaluate.holdout import HoldoutSpec
from elmwood.records import Forest
from elmwood.store import Store
from elmwood.study.demo import LARGE, Study, plan, scratch, train_and_score
from elmwood.units import parse_count

TWICE = "dense, twice the tokens"


def grow(store: Store, corpus_at: str, study: Study) -> None:
    """A seed, experts of domains and of random parts, a dense control at their tokens and one at twice as many; all scored."""
    progress = Lines()
    corpus = build([corpus_at], store, progress=progress)
    seed = scratch(study, corpus, store, progress)
    store.name("scale/seed", seed.digest)
    divisions = {
        name: divide(corpus, store, domains=study.domains, method=method, rng_seed=study.rng_seed, progress=progress)
        for name, method in (("expert", "balanced"), ("random", "random"))
    }
    sides = plan(study, seed, corpus, divisions, store)
    (dense,) = sides[LARGE]
    twice = dense.model_copy(update={"recipe": dense.recipe.model_copy(update={"steps": 2 * dense.recipe.steps}), "label": TWICE})
    sides = {"expert": sides["expert"], "random": sides["random"], "dense": [dense], "twice": [twice]}
    spec = HoldoutSpec(partition=divisions["expert"].digest, seed=seed.digest, length=study.length, documents=study.documents)
    trained = train_and_score(seed, sides, spec, store, workers=1, progress=progress)
    for name, side in trained.items():
        for place, digest in enumerate(side):
            store.name(f"scale/{name}" + (f"/{place}" if len(side) > 1 else ""), digest)
    forest = Forest(seed=seed.digest, partition=divisions["expert"].digest, experts=tuple(trained["expert"]))
    store.add(forest)
    store.name("scale/forest", forest.digest)
    say("routing_scale", measured="grow", domains=study.domains, tokens_per_side=study.tokens, holdout=spec.model_dump())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=("grow",))
    options.add_argument("store", type=Path)
    options.add_argument("--corpus", default="sample")
    options.add_argument("--domains", type=int, default=24)
    options.add_argument("--tokens", default="1.5M")
    options.add_argument("--seed-tokens", default="4M")
    options.add_argument("--documents", type=int, default=300)
    asked = options.parse_args()
    study = Study(
        domains=asked.domains, tokens=parse_count(asked.tokens), seed_tokens=parse_count(asked.seed_tokens), documents=asked.documents
    )
    grow(Store(asked.store), asked.corpus, study)


if __name__ == "__main__":
    main()
