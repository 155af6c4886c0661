"""A small forest with its columns, for files that do not make one of their own."""

import numpy as np
import pytest
from tiny_models import full_expert, lora_expert, tiny_seed

from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.ensemble.mixture import open_model
from elmwood.evaluate.columns import column
from elmwood.evaluate.holdout import HoldoutSpec, open_holdout
from elmwood.evaluate.partial import score
from elmwood.store import Store

TOPICS = ("the {0} sailed over the sea with captain {1}", "def {0}(path): return open({1}).read()", "le {0} mange une pomme — {1} aussi")
K = len(TOPICS)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A store with a partition of three topics, a tiny seed and an expert of each domain."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    for n in range(60):
        sentences = (TOPICS[n % K].format(*("".join(rng.choice(list("abcdefghij"), 4)) for _ in range(2))) for _ in range(6))
        (folder / "text" / f"{n}.txt").write_text(". ".join(sentences))
    store = Store(folder / "store")
    partition = divide(build([str(folder / "text")], store, holdout=0.4), store, domains=K)
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
