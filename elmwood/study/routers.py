"""Domains found by tiny language models: each learns a part of the text, and takes what it finds likelier than the others do
(SmallTalk, arXiv:2410.03529). An ordinary partition, whose embedder is the router LMs; it is routed by what they say of the text so far.

K domains
"""

import pyarrow.parquet as pq

from elmwood.domains.dense import save_router_lms
from elmwood.domains.grow import Means
from elmwood.domains.partition import partition as divide
from elmwood.engine import Progress, run, silent
from elmwood.errors import BadInput
from elmwood.records import Corpus, Expert, Partition, Recipe, Seed
from elmwood.store import Store
from elmwood.study.tasks import TORCH, TrainJob, default_threads, experts_job
from elmwood.units import parse_count

BATCH, RATE = 8, 3e-3  # of router LMs, which are small and begin with random weights


def find_domains(
    corpus: Corpus, seed: Seed, store: Store, *, domains: int, rounds: int, tokens: int | str, method: str = "balanced",
    rng_seed: int = 0, means: Means, progress: Progress = silent,
) -> Partition:  # fmt: skip
    """Divide a corpus by hard expectation-maximisation: train a router LM on each part, give each document to the one under which its
    beginning is likeliest, in equal numbers if `balanced`, and train again. The first parts are random.

    `seed` gives the shape, the weights and the tokenizer that router LMs start with, and its context how far they read; `tokens` are
    those of one router LM in one round. Rounds are tasks that are done once; nothing but router LMs is exchanged. Raises BadInput.
    """
    if (count := parse_count(tokens)) < BATCH * seed.context:
        raise BadInput(f"--router-tokens {tokens}: one step of a router LM takes {BATCH * seed.context}; write 200k, say")
    recipe = Recipe(
        steps=count // (BATCH * seed.context), batch=BATCH, length=seed.context, learning_rate=RATE, rng_seed=rng_seed,
        threads=default_threads(seed),
    )  # fmt: skip
    found = divide(corpus, store, domains=domains, method="random", rng_seed=rng_seed, means=means, progress=progress)
    for number in range(1, rounds + 1):
        progress("rounds of router LMs", number - 1, rounds, "rounds")
        routers = _train(found, seed, recipe, store, means, progress)
        embedder = save_router_lms([router.files for router in routers], store)
        before, found = found, divide(
            corpus, store, domains=domains, embedder=embedder, method=method, rng_seed=rng_seed, means=means, progress=progress
        )  # fmt: skip
        if not store.logged(found.digest):
            store.log(found.digest, event="round", number=number, moved=round(_moved(before, found, store), 4))
    progress("rounds of router LMs", rounds, rounds, "rounds")
    return found


def _train(partition: Partition, seed: Seed, recipe: Recipe, store: Store, means: Means, progress: Progress) -> list[Expert]:
    """A router LM for each domain, in their order."""
    jobs = [
        TrainJob(
            store=store.root, label=f"router {place}", seed=seed.digest, data=domain.train, recipe=recipe,
            partition=partition.digest, domain=place,
        )
        for place, domain in enumerate(partition.domains)
    ]  # fmt: skip
    made = run(experts_job, jobs, workers=means.workers, engine=means.engine, gpu=True, torch=TORCH, progress=progress)
    return [store.load(digest, Expert) for digests in made for digest in digests]


def _moved(before: Partition, after: Partition, store: Store) -> float:
    """The share of the training documents that are in another domain."""
    old, new = _places(before, store), _places(after, store)
    return sum(new[document] != place for document, place in old.items()) / max(1, len(old))


def _places(partition: Partition, store: Store) -> dict[str, int]:
    return {
        document: place
        for place, domain in enumerate(partition.domains)
        for shard in domain.train
        for document in pq.read_table(store.get(shard.blob), columns=["id"])["id"].to_pylist()
    }
