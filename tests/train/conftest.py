"""What the tests of training share: a store with a corpus of random words and a seed trained on it."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_training import SEED_RECIPE, SHAPE

from elmwood.corpus.build import build
from elmwood.records import Corpus, Seed
from elmwood.store import Store
from elmwood.train.tasks import train_seed


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A store with a corpus of random words and a seed trained on it, read only by convention: tests copy what they change."""
    folder = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklm"), rng.integers(2, 8))) for _ in range(400)]
    texts = [" ".join(rng.choice(words, rng.integers(3, 60))) for _ in range(120)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store = Store(folder / "store")
    corpus = build([str(folder / "text.jsonl")], store)
    store.name("corpus", corpus.digest)
    store.name("seed", train_seed(corpus, SHAPE, SEED_RECIPE, store).digest)
    return folder / "store"


@pytest.fixture
def case(place) -> tuple[Store, Corpus, Seed]:
    store = Store(place)
    return store, store.load("corpus", Corpus), store.load("seed", Seed)


@pytest.fixture
def fresh(case, tmp_path) -> tuple[Store, Corpus, Seed]:
    """The same corpus and seed in a store where nothing else was done."""
    store, corpus, seed = case
    other = Store(tmp_path / "fresh")
    for blob in [*(shard.blob for shard in corpus.train), *seed.files.values()]:
        other.put(store.get(blob))
    other.name("corpus", other.add(corpus))
    other.name("seed", other.add(seed))
    return other, corpus, seed
