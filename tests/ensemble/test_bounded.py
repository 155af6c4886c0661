"""Bounded experts and other aggregations: one function for echo and generation, and the bound holds whatever an expert says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import lora_expert, tiny_seed
from topics import SENTENCES, build_corpus, some_sentences

from elmwood.domains.partition import partition as divide
from elmwood.ensemble.bounded import AGGREGATIONS, BoundedLM, bound, median
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, UnknownName
from elmwood.records import Ensemble, Forest
from elmwood.store import Store
from elmwood.study.ancestry import with_mixing
from elmwood.study.page import summary


@pytest.fixture(scope="module")
def forest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bounded")
    store = Store(folder / "store")
    partition = divide(build_corpus(folder / "text", store, some_sentences(SENTENCES, 6, 6), holdout=0.3), store, domains=3)
    seed = tiny_seed(store)
    experts = [lora_expert(seed, store, rng_seed=n, partition=partition.digest, domain=n) for n in range(3)]
    made = Forest(seed=seed.digest, partition=partition.digest, experts=tuple(one.digest for one in experts))
    store.add(made)
    return store, made


def opened(forest, **fields):
    store, made = forest
    return open_model(Ensemble(forest=made.digest, top_k=3, temperature=1.0, seed_distance=1.0, **fields), store, "cpu")


@pytest.mark.parametrize("router", ["centroid", "live"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("some", [(), (0, 2)])
def test_echo_and_generation_say_the_same_and_sum_to_one(forest, router, aggregation, some):
    fields = {"aggregation": aggregation, "bounded": tuple(forest[1].experts[e] for e in some), "router": router}
    lm = opened(forest, **fields)
    tokens = [0, *np.random.default_rng(0).integers(1, 300, 20).tolist()]
    echo_T = lm.score([tokens])[0]
    cache, said = lm.start(), [0.0]
    for place, token in enumerate(tokens[:-1]):
        logp_V, cache = lm.extend([token], cache)
        assert float(logp_V.exp().sum()) == pytest.approx(1, abs=1e-5)
        said.append(float(logp_V[tokens[place + 1]]))
    np.testing.assert_allclose(echo_T, said, atol=1e-4)


def test_without_bounds_it_is_the_plain_ensemble(forest):
    tokens = [[0, *range(5, 30)]]
    plain = opened(forest)
    assert not isinstance(plain, BoundedLM)
    far = opened(forest, bounded=forest[1].experts, bound=100.0)
    assert isinstance(far, BoundedLM)
    np.testing.assert_allclose(far.score(tokens), plain.score(tokens), atol=1e-4)


def test_a_bound_of_almost_nothing_leaves_the_seed(forest):
    store, made = forest
    tokens = [[0, *range(5, 30)]]
    lm = opened(forest, bounded=made.experts, bound=1e-6)
    seed = open_model(store.load(made.seed), store, "cpu")
    np.testing.assert_allclose(lm.score(tokens), seed.score(tokens), atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 4), st.floats(0, 50))
def test_no_token_moves_farther_than_the_bound(rng_seed, nats, loud):
    generator = torch.Generator().manual_seed(rng_seed)
    said_V, seed_V = (torch.log_softmax(size * torch.randn(40, generator=generator), -1) for size in (loud, 2.0))
    moved_V = bound(said_V, seed_V, nats) - seed_V
    assert float(moved_V.max() - moved_V.min()) <= 2 * nats + 1e-4  # odds between any two tokens
    assert float(moved_V.max()) <= 2 * nats + 1e-4
    assert float(bound(said_V, seed_V, nats).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_the_median_is_that_of_most_of_the_weight():
    logp_AV = torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.1], [9.0, 0.0, 0.0]]), -1)
    alone = median(logp_AV[:1], torch.ones(1))
    assert torch.allclose(alone, logp_AV[0])
    outvoted = median(logp_AV, torch.tensor([0.3, 0.3, 0.4]))
    assert float((outvoted - logp_AV[0]).abs().max()) < 0.2
    assert torch.allclose(median(logp_AV, torch.tensor([0.2, 0.2, 0.6])), logp_AV[2])


def test_settings_of_an_ensemble_are_chosen_by_name(forest):
    """What `--set` of serve, chat and eval says."""
    store, made = forest
    typed = {"every": "64", "shortlist": "32", "margin": "0.02", "top_k": "4", "seed_distance": "0.9", "router": "live"}
    found = with_mixing(made, None, store, typed)
    assert (found.every, found.shortlist, found.margin, found.top_k, found.seed_distance, found.router) == (64, 32, 0.02, 4, 0.9, "live")
    assert found == with_mixing(made, "outputs", store, {"every": 64, **typed})
    assert with_mixing(found, None, store, {"seed_distance": "none"}).seed_distance is None
    assert with_mixing(made, None, store) is made
    for wrong in ({"evry": "64"}, {"every": "0"}, {"every": "x"}, {"forest": "0" * 64}, {"sure": "0.9", "shortlist": "8"}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            with_mixing(made, None, store, wrong)
    with pytest.raises(UnknownName, match="router"):
        with_mixing(made, None, store, {"router": "nearby"})
    with pytest.raises(BadInput, match="--set"):
        with_mixing(store.load(made.seed), None, store, typed)


def test_a_forest_is_opened_with_any_mixing(forest):
    """What `--mixing` of serve, chat and eval says."""
    store, made = forest
    found = with_mixing(made, "median, bounded", store)
    assert (found.mixing, found.aggregation, found.bounded, found.bound) == ("outputs", "median", made.experts, 2.0)
    assert summary(found).endswith(", median, 3 experts within 2 nats of the seed")
    assert isinstance(open_model(found, store, "cpu"), BoundedLM)
    assert with_mixing(found, "arithmetic", store).aggregation == "arithmetic"
    assert with_mixing(made, "weights", store).mixing == "weights"
    for wrong in ("mean", "weights,bounded", "weights,median", ""):
        with pytest.raises(BadInput, match="mixing"):
            with_mixing(made, wrong, store)
