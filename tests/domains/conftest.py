"""A partition of three topics, and an embedder of five."""

import numpy as np
import pytest
from topics import PIECES, TOPICS, build_corpus, some_texts

from elmwood.domains import embed
from elmwood.domains.partition import partition
from elmwood.store import Store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, a corpus of three topics, and its partition."""
    folder = tmp_path_factory.mktemp("domains")
    store = Store(folder / "store")
    corpus = build_corpus(folder / "text", store, some_texts(TOPICS[:3], 30, np.random.default_rng(0)))
    return store, corpus, partition(corpus, store, domains=3)


@pytest.fixture(scope="module")
def fitted():
    """tf-idf of texts of five topics."""
    return embed.fit("tfidf", [*some_texts(TOPICS, 20, np.random.default_rng(1)), *PIECES, *PIECES])
