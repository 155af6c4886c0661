"""Partitions: made once, resumed, the same on every engine."""

import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from topics import TOPICS, build_corpus, topic_of

from elmwood.corpus.build import documents
from elmwood.domains import distances, embed, grow
from elmwood.domains.grow import Means
from elmwood.domains.partition import assign, centroids, partition
from elmwood.domains.words import words
from elmwood.errors import BadCorpus, BadInput
from elmwood.store import Store


def test_a_partition_is_made_once_and_holds_every_document(made):
    store, corpus, first = made
    assert partition(corpus, store, domains=3) == first
    for role in ("train", "holdout"):
        inside = [document.id for domain in first.domains for document in documents(getattr(domain, role), store)]
        assert sorted(inside) == sorted(document.id for document in documents(getattr(corpus, role), store))
    assert max(first.fit_sizes) - min(first.fit_sizes) <= 1
    assert sum(first.greedy_sizes) == sum(first.fit_sizes) == sum(domain.documents for domain in first.domains)
    assert len({domain.name for domain in first.domains}) == 3


def test_domains_are_the_topics_and_name_them(made):
    store, _, first = made
    found = [Counter(topic_of(document.text) for document in documents(domain.train, store)) for domain in first.domains]
    assert sorted(count.most_common(1)[0][0] for count in found) == [0, 1, 2]
    for domain, count in zip(first.domains, found, strict=True):
        assert max(count.values()) > 0.9 * domain.documents  # topics are not quite of one size, and domains are
        assert set(domain.name.lower().split()) <= {word for topic in TOPICS[:3] for word in words(topic)}
        assert set(domain.examples) <= {document.id for document in documents(domain.train, store)}


def test_random_domains_are_the_control(made):
    store, corpus, _ = made
    control = partition(corpus, store, domains=3, method="random")
    again = partition(corpus, store, domains=3, method="random", rng_seed=1)
    assert control.digest != again.digest
    for domain in control.domains:
        assert len({topic_of(document.text) for document in documents(domain.train, store)}) == 3
    x_ND = embed.load(control.embedder, store).embed([document.text for document in documents(control.domains[0].train, store)])
    np.testing.assert_allclose(np.asarray(centroids(control, store))[0], x_ND.mean(0), atol=1e-6)


@pytest.fixture(scope="module")
def sharded(made, tmp_path_factory):
    """The same documents in small shards, and their partition."""
    store, corpus, _ = made
    folder = tmp_path_factory.mktemp("sharded")
    found = [document.text for role in (corpus.train, corpus.holdout) for document in documents(role, store)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elmwood.corpus.build.SHARD", 10_000)
        small = build_corpus(folder / "text", Store(folder / "store"), found)
    assert len(small.train) >= 3
    return folder / "store", small, partition(small, Store(folder / "store"), domains=3)


def undone(root, folder):
    """A copy of a store in which no task has begun."""
    for part in ("blobs", "records"):
        shutil.copytree(root / part, folder / part)
    return Store(folder)


KILLED = """
import os, signal, sys
from elmwood.domains.partition import partition
from elmwood.store import Store
def stop(what, done, total, unit):
    if what == sys.argv[3] and done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
store = Store(sys.argv[1])
partition(store.load(sys.argv[2]), store, domains=3, progress=stop)
"""


def test_a_run_that_was_killed_goes_on_at_its_shard(sharded, tmp_path):
    root, corpus, expected = sharded
    store = undone(root, tmp_path)
    for stop_at, stem in (("embed", "shard-"), ("divide train documents", "train-")):
        command = [sys.executable, "-c", KILLED, str(store.root), corpus.digest, stop_at]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert len(list(store.root.glob(f"work/*/{stem}[0-9]*.*"))) >= 2
    kept = {path: path.stat().st_mtime_ns for path in store.root.glob("work/*/*") if path.suffix in (".safetensors", ".json")}
    told = []

    def watch(what, *_):
        told.append(what)
        assert all(path.stat().st_mtime_ns == when for path, when in kept.items())

    assert partition(corpus, store, domains=3, progress=watch) == expected
    assert "divide train documents" in told
    assert not any(what.startswith("embed shard") for what in told), "nothing is done twice"


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_every_engine_makes_the_same_bytes(sharded, engine, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")
    root, corpus, expected = sharded
    assert partition(corpus, undone(root, tmp_path), domains=3, means=Means(workers=2, engine=engine)) == expected


def test_documents_outside_the_fit_go_to_the_nearest(made, monkeypatch):
    store, corpus, _ = made
    monkeypatch.setattr(grow, "FIT", 40)
    found = partition(corpus, store, domains=3, rng_seed=5)
    assert sum(found.fit_sizes) == 40 < sum(domain.documents for domain in found.domains)
    fit = {document.id for document in islice(documents(corpus.train, store), 40)}
    for place, domain in enumerate(found.domains):
        others = [document.text for document in documents(domain.train, store) if document.id not in fit]
        assert (assign(found, store, others)[0] == place).all()


def test_sparse_centroids_route_too(made):
    store, _, first = made
    fitted = embed.load(first.embedder, store)
    dist2_NK = distances.distances(fitted, centroids(first, store, "sparse"), list(TOPICS[:3]))
    np.testing.assert_array_equal(dist2_NK.argmin(1), assign(first, store, TOPICS[:3])[0])
    assert centroids(first, store, "sparse")[[2, 0]].term_VK.shape[1] == 2


def test_partitions_refuse_what_cannot_be(made):
    store, corpus, _ = made
    with pytest.raises(BadCorpus, match="500 domains of"):
        partition(corpus, store, domains=500)
    with pytest.raises(BadInput, match="no clustering method 'best'"):
        partition(corpus, store, method="best")
    with pytest.raises(BadInput, match="needs a model"):
        partition(corpus, store, embedder="sentence")
