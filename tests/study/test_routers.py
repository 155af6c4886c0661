"""A forest without a seed: router LMs find the domains by EM, and route by what they say (SmallTalk, arXiv:2410.03529)."""

from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from tiny_models import full_expert
from topics import TOPICS, build_corpus, some_texts, topic_of

import elmwood as ew
from elmwood.corpus.build import documents
from elmwood.domains.partition import add, assign, split
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput
from elmwood.records import Corpus, Ensemble, Forest
from elmwood.store import Store


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """A store, a tiny seed with random weights, and a corpus of two topics divided by two router LMs of its shape."""
    folder = tmp_path_factory.mktemp("seedless")
    store = Store(folder / "store")
    corpus = build_corpus(folder / "text", store, some_texts(TOPICS[:2], 20, np.random.default_rng(0)), holdout=0.2)
    shape = ew.train_seed(corpus, store, tokens=0, layers=2, width=32, vocabulary=320, length=64)
    options = {"domains": 2, "embedder": "routers", "embedder_model": shape.digest, "rounds": 3, "router_tokens": "4k"}
    return store, shape, ew.cluster(corpus, store, **options), options


def test_router_lms_find_the_topics_from_random_parts(divided):
    store, _, partition, _ = divided
    topics = [[topic_of(one.text) for one in documents(domain.train, store)] for domain in partition.domains]
    (one, ones), (other, others) = (Counter(found).most_common(1)[0] for found in topics)
    assert one != other
    total = Counter(chain(*topics))
    assert sum(map(len, topics)) - ones - others <= abs(total[one] - total[other]) // 2 + 1  # equal sizes ask that some move
    assert max(partition.fit_sizes) - min(partition.fit_sizes) <= 1
    (line,) = store.logged(partition.digest)  # of the last round that changed anything
    assert line["moved"] < 0.2
    near_N, _ = assign(partition, store, some_texts(TOPICS[:2], 4, np.random.default_rng(5)))
    assert sorted(np.bincount(near_N)) == [4, 4]


def test_a_seed_of_no_tokens_has_random_weights_and_a_tokenizer_once(divided):
    store, shape, partition, _ = divided
    assert (shape.recipe, shape.curve, shape.corpus) == (None, (), partition.corpus)
    corpus, options = store.load(partition.corpus, Corpus), {"layers": 2, "width": 32, "vocabulary": 320, "length": 64}
    assert ew.train_seed(corpus, store, tokens="0", **options) == shape
    assert ew.train_seed(corpus, store, tokens=0, rng_seed=1, **options).files["model.safetensors"] != shape.files["model.safetensors"]


def test_rounds_are_done_once(divided):
    store, _, partition, options = divided
    before = len(list((store.root / "records").iterdir()))
    assert ew.cluster(store.load(partition.corpus, Corpus), store, **options) == partition
    assert len(list((store.root / "records").iterdir())) == before


def test_a_forest_of_its_domains_routes_live_as_its_table_does(divided):
    store, shape, partition, _ = divided
    experts = [full_expert(shape, store, place, partition=partition.digest, domain=place) for place in range(2)]
    forest = Forest(seed=shape.digest, partition=partition.digest, experts=[expert.digest for expert in experts])
    ensemble = Ensemble(forest=forest.digest, top_k=1)
    for record in (forest, ensemble):
        store.add(record)
    lm = open_model(ensemble, store)
    tokens = [0, 5, 20, 31, 8, 12, 40, 7, 9]
    table_T, state, live = lm.score([tokens])[0], lm.start(), []
    for before, token in pairwise(tokens):
        live.append(float(lm.extend([before], state)[0][token]))
    np.testing.assert_allclose(live, table_T[1:], atol=1e-5)


def test_its_domains_are_not_revised(divided):
    store, _, partition, options = divided
    corpus = store.load(partition.corpus, Corpus)
    for revise in (lambda: split(partition, 0, store), lambda: add(partition, corpus, store)):
        with pytest.raises(BadInput, match="cluster again"):
            revise()
    with pytest.raises(BadInput, match="router-tokens"):
        ew.cluster(corpus, store, **options | {"router_tokens": 10})
    with pytest.raises(BadInput, match="needs a model"):
        ew.cluster(corpus, store, **options | {"embedder_model": None})
