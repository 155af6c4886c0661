"""A small forest with its columns, for files that do not make one of their own."""

import numpy as np
import pytest
from tiny_models import full_expert, lora_expert, tiny_seed
from topics import SENTENCES, build_corpus, some_sentences

from elmwood.domains.partition import partition as divide
from elmwood.ensemble.mixture import open_model
from elmwood.evaluate.columns import column
from elmwood.evaluate.holdout import HoldoutSpec, open_holdout
from elmwood.evaluate.partial import score
from elmwood.store import Store

K = len(SENTENCES)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A store with a partition of three topics, a tiny seed and an expert of each domain."""
    folder = tmp_path_factory.mktemp("evaluate")
    store = Store(folder / "store")
    corpus = build_corpus(folder / "text", store, some_sentences(SENTENCES, 20, 6), holdout=0.4)
    partition = divide(corpus, store, domains=K)
    seed = tiny_seed(store)
    experts = [(full_expert if k == 0 else lora_expert)(seed, store, rng_seed=k, partition=partition.digest, domain=k) for k in range(K)]
    return store, partition, seed, experts


@pytest.fixture(scope="module")
def held(grown):
    store, partition, seed, _ = grown
    return open_holdout(HoldoutSpec(partition=partition.digest, seed=seed.digest, length=48), store)


@pytest.fixture(scope="module")
def columns(grown, held):
    """The seed's column [N] and the experts' [N, K]."""
    store, _, seed, experts = grown
    found = [
        column(score(model, lambda model=model: open_model(model, store, "cpu"), held, store), held, store) for model in (seed, *experts)
    ]
    return found[0], np.column_stack(found[1:])
