"""What tests of several verbs start from."""

import json

import numpy as np
import pytest
from tiny_models import tiny_seed

from elmwood.corpus.build import build
from elmwood.domains.partition import partition
from elmwood.store import Store


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Store:
    """A seed, and three domains of words that nothing shares."""
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(120)]
    texts = [" ".join(rng.choice(words[number % 3 :: 3], 60)) for number in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store = Store(folder / "store")
    store.name("domains", partition(build([str(folder / "text.jsonl")], store), store, domains=3).digest)
    store.name("seed", tiny_seed(store).digest)
    return store
