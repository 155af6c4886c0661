"""Domains: words, embedders, clustering, routing, partitions."""

import numpy as np
import pytest

from elmwood.corpus.build import build, documents
from elmwood.domains import cluster, embed, route
from elmwood.domains.partition import assign, centroids, partition
from elmwood.domains.words import finished
from elmwood.store import Store

TOPICS = (
    "the {0} sailed over the sea with its captain and crew toward the harbour",
    "def read_{0}(path): return open(path).read() if path else None",
    "le {0} mange une pomme dans le jardin de la maison avec plaisir",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus of three topics, and its partition."""
    folder = tmp_path_factory.mktemp("domains")
    text = folder / "text"
    text.mkdir()
    rng = np.random.default_rng(0)
    for n in range(90):
        some = ["".join(rng.choice(list("abcdefghij"), 4)) for _ in range(6)]
        (text / f"{n}.txt").write_text(" ".join(TOPICS[n % 3].format(word) for word in some))
    store = Store(folder / "store")
    corpus = build([str(text)], store)
    return store, corpus, partition(corpus, store, domains=3)


def test_a_partition_is_made_once_and_holds_every_document(made):
    store, corpus, first = made
    assert partition(corpus, store, domains=3) == first
    assert sum(domain.documents for domain in first.domains) == sum(shard.documents for shard in corpus.train)
    assert max(first.fit_sizes) - min(first.fit_sizes) <= 1


def test_prefix_distances_equal_embedding_every_prefix(made):
    store, corpus, first = made
    fitted, centroid_KD = embed.load(first.embedder, store), centroids(first, store)
    text = next(documents(corpus.train, store)).text
    cut_P = np.arange(len(text) + 1)
    expected = route.distances(fitted, centroid_KD, [finished(text[:cut]) for cut in cut_P])
    np.testing.assert_allclose(route.prefix_distances(fitted, centroid_KD, text, cut_P), expected, atol=1e-6)


def test_assign_finds_the_topics(made):
    store, _, first = made
    label_N, dist2_NK = assign(first, store, [topic.format("x") for topic in TOPICS])
    assert len(set(label_N.tolist())) == 3
    assert dist2_NK.shape == (3, 3)


def test_gate_keeps_the_nearest():
    weight = route.gate(route.ROUTERS["centroid"](np.array([[0.2, 0.5, 1.0]])), temperature=0.1, top_k=2)
    np.testing.assert_allclose(weight, [[1 / (1 + np.exp(-3)), np.exp(-3) / (1 + np.exp(-3)), 0]])


def test_balanced_sizes_differ_by_at_most_one():
    x_ND = np.random.default_rng(0).normal(size=(103, 4))
    sizes = cluster.kmeans(x_ND, 7).sizes
    assert max(sizes) - min(sizes) <= 1
