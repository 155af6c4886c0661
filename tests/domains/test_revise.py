"""Revisions of a partition: domains split and added, and which experts serve them."""

import numpy as np
import pytest
from topics import TOPICS, build_corpus, some_texts

from elmwood.corpus.build import documents
from elmwood.domains import distances
from elmwood.domains.partition import add, assign, centroids, heirs, partition, serving, split
from elmwood.errors import BadInput, ForeignExpert


def test_splitting_leaves_the_others_as_they_were(made):
    store, corpus, first = made
    parted = split(first, 1, store)
    assert split(first, 1, store) == parted
    assert parted.parent == first.digest
    for place in (0, 2):
        assert parted.domains[place].model_copy(update={"origin": None}) == first.domains[place]
    for kind in ("dense", "sparse"):
        old, new = centroids(first, store, kind), centroids(parted, store, kind)
        old, new = ((x.term_VK.toarray().T if isinstance(x, distances.Sparse) else x)[[0, 2]] for x in (old, new))
        np.testing.assert_array_equal(old, new)
    for role in ("train", "holdout"):
        parts = [document.id for place in (1, 3) for document in documents(getattr(parted.domains[place], role), store)]
        assert sorted(parts) == sorted(document.id for document in documents(getattr(first.domains[1], role), store))
    assert heirs(first, parted, store) == [(0,), (1, 3), (2,)]
    twice = split(parted, 3, store)
    assert heirs(first, twice, store) == [(0,), (1, 3, 4), (2,)]
    with pytest.raises(ForeignExpert, match="does not come from"):
        heirs(parted, first, store)
    with pytest.raises(BadInput, match="cannot split domain 9"):
        split(first, 9, store)
    with pytest.raises(BadInput, match="random"):
        split(partition(corpus, store, domains=3, method="random"), 0, store)


def test_experts_serve_until_their_parts_have_experts_of_their_own(made):
    store, _, first = made
    parted = split(first, 1, store)
    twice = split(parted, 3, store)
    old = [(first.digest, domain) for domain in range(3)]
    assert serving(first, old, store) == [(0,), (1,), (2,)]
    assert serving(twice, old, store) == [(0,), (1, 3, 4), (2,)] == heirs(first, twice, store)
    assert serving(twice, [*old, (twice.digest, 4)], store) == [(0,), (1, 3), (2,), (4,)]
    assert serving(twice, [*old, (parted.digest, 3)], store) == [(0,), (1,), (2,), (3, 4)]
    assert serving(twice, [old[1], (parted.digest, 1), (parted.digest, 3)], store) == [(), (1,), (3, 4)]
    assert serving(twice, [old[1], old[1]], store) == [(1, 3, 4), (1, 3, 4)]
    for strange, complaint in (
        ((first.digest, None), "no domain"),
        (("0" * 64, 1), "partition 00000000"),
        ((twice.digest, 1), "partition"),
    ):
        with pytest.raises(ForeignExpert, match=complaint):
            serving(parted, [*old, strange], store)


def test_adding_domains_leaves_the_others_as_they_were(made, tmp_path):
    store, _, first = made
    new = "the {0} plays the violin in an orchestra of the harbour with captain and crew"
    more = build_corpus(tmp_path / "more", store, some_texts([new], 12, np.random.default_rng(9)))
    grown = add(first, more, store)
    assert [domain.model_copy(update={"origin": None}) for domain in grown.domains[:3]] == list(first.domains)
    assert grown.domains[3].origin is None
    assert grown.corpus == more.digest
    assert heirs(first, grown, store) == [(0,), (1,), (2,)]
    assert assign(grown, store, [new])[0] == [3]
    assert assign(grown, store, list(TOPICS[:3]))[0].tolist() == assign(first, store, list(TOPICS[:3]))[0].tolist()
