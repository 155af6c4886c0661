"""The small run, made once for all files of this folder."""

import pytest
from small_run import LETTERS, Run, honest
from tiny_models import tiny_seed
from topics import SENTENCES, build_corpus, some_sentences

from elmwood.domains.partition import partition as divide
from elmwood.evaluate import holdout
from elmwood.records import Ensemble, Forest
from elmwood.store import Store


@pytest.fixture(scope="module", autouse=True)  # the process goes on with files of other folders
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdout, "BLOCK", 128)
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    store = Store(folder / "store")
    corpus = build_corpus(folder / "text", store, some_sentences(SENTENCES, 20, 16, LETTERS), holdout=0.7)
    partition = divide(corpus, store, domains=3)
    seed = tiny_seed(store)
    experts = [honest(store, seed, partition, domain, rng_seed=domain) for domain in range(3)]
    forest = store.add(Forest(seed=seed.digest, partition=partition.digest, experts=tuple(one.digest for one in experts[:2])))
    base = store.add(Ensemble(forest=forest, top_k=1, temperature=0.1, seed_distance=0.99))
    return Run(store, seed, partition, experts, base)
