"""A small forest to open as ensembles."""

import numpy as np
import pytest
from tiny_models import full_expert, lora_expert, tiny_seed
from topics import TOPICS, build_corpus, some_texts

from elmwood.domains.partition import partition
from elmwood.lm.files import tokenizer
from elmwood.records import Ensemble, Forest
from elmwood.store import Store

TEXT = "the captain sailed. def path(open): return read. le jardin, la pomme — naïve 海 猫 the sea"


class House:
    """A store with a partition of three topics, a seed, and experts: two adapters and a full one."""

    def __init__(self, folder):
        self.store = Store(folder / "store")
        corpus = build_corpus(folder / "text", self.store, some_texts(TOPICS[:3], 20, np.random.default_rng(0)))
        self.partition = partition(corpus, self.store, domains=3)
        self.seed = tiny_seed(self.store)
        place = {"partition": self.partition.digest}
        self.experts = [lora_expert(self.seed, self.store, n, domain=n, **place) for n in range(2)]
        self.experts.append(full_expert(self.seed, self.store, 2, domain=2, **place))
        self.tokenizer = tokenizer(self.seed, self.store)
        self.tokens = [0, *self.tokenizer.encode(TEXT).ids]

    def forest(self, experts) -> Forest:
        return self.add(Forest(seed=self.seed.digest, partition=self.partition.digest, experts=[expert.digest for expert in experts]))

    def add(self, record):
        self.store.add(record)
        return record

    def ensemble(self, experts=None, **fields) -> Ensemble:
        return self.add(Ensemble(forest=self.forest(experts or self.experts).digest, **fields))

    def copies(self, expert, count=3):
        """The same weights under other digests, one in each domain."""
        return [self.add(expert.model_copy(update={"domain": n, "contributor": str(n)})) for n in range(count)]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("house"))
