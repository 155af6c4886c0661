"""Routing: squared distances of prefixes, and the weights that signals become."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from topics import PIECES, TOPICS, some_texts, texts

from elmwood.domains import distances, embed, route
from elmwood.domains.route import Routing, Signals
from elmwood.domains.words import complete_words
from elmwood.errors import BadInput, UnknownName


@pytest.fixture(scope="module")
def fitted():
    """tf-idf of texts of five topics."""
    return embed.fit("tfidf", [*some_texts(TOPICS, 20, np.random.default_rng(1)), *PIECES, *PIECES])


def rows(fitted, k):
    """Centroids, dense and sparse."""
    found = some_texts(TOPICS, 4, np.random.default_rng(5))[:k]
    return fitted.embed(found), distances.Sparse.of(fitted.tfidf(found))


@settings(deadline=None)
@given(texts)
def test_prefix_routing_equals_embedding_every_prefix(fitted, text):
    cut_P = np.arange(len(text) + 1)
    for places in rows(fitted, 4):
        known_P = fitted.embed([complete_words(text[:cut]) for cut in cut_P]).any(1)
        expected = distances.distances(fitted, places, [complete_words(text[:cut]) for cut in cut_P])
        expected = np.where(known_P[:, None], expected, np.inf)
        np.testing.assert_allclose(distances.prefix_distances(fitted, places, text, cut_P), expected, atol=1e-6)


@settings(deadline=None)
@given(texts, st.lists(st.integers(1, 5), min_size=40, max_size=40))
def test_tokens_and_a_growing_text_route_alike(fitted, text, sizes):
    data = text.encode("utf-8", "replace")
    edges = np.minimum(np.cumsum([0, *sizes]), len(data))
    pieces = [data[a:b] for a, b in pairwise(edges)]  # tokens that cut characters in two
    for places in rows(fitted, 3):
        at_tokens = distances.token_distances(fitted, places, range(len(pieces)), pieces)
        walk = distances.PrefixDistances(fitted, places)
        walked = [walk.push(b""), *(walk.push(piece) for piece in pieces)][:-1]
        np.testing.assert_allclose(at_tokens, walked, atol=1e-6)


def test_a_prefix_without_a_known_word_is_infinitely_far(fitted):
    for places in rows(fitted, 3):
        assert np.isinf(distances.prefix_distances(fitted, places, "12", [0, 2])).all()
        assert np.isinf(distances.PrefixDistances(fitted, places).push(b"12 ")).all()


def weigh(dist2_NE=None, memory_NC=None, **settings):
    return route.weights(Signals(*(None if one is None else np.asarray(one) for one in (dist2_NE, memory_NC))), Routing(**settings))


@given(
    arrays(np.float64, (3, 5), elements=st.floats(0, 4, allow_subnormal=False)),
    st.floats(0.01, 10),
    st.integers(1, 7),
    st.sampled_from([None, 0.5, 2.0]),
)
def test_the_best_are_kept_and_weights_sum_to_one(dist2_NE, temperature, top_k, seed_distance):
    weight_NC = weigh(dist2_NE, temperature=temperature, top_k=top_k, seed_distance=seed_distance)
    np.testing.assert_allclose(weight_NC.sum(1), 1)
    assert weight_NC.shape == (3, 6)
    assert (np.count_nonzero(weight_NC, axis=1) <= top_k).all()
    assert seed_distance is not None or not weight_NC[:, -1].any()
    for weight_C, dist2_E in zip(weight_NC, dist2_NE, strict=True):
        dist2_C = np.append(dist2_E, np.inf if seed_distance is None else seed_distance)
        assert dist2_C[weight_C > 0].max() <= np.sort(dist2_C)[: min(top_k, 6)].max()


def test_settings_that_make_no_sense_are_refused():
    for wrong, complaint in (({"temperature": 0}, "temperature is 0"), ({"top_k": 0}, "top_k 0"), ({"decay": 1.1}, "decay 1.1")):
        with pytest.raises(BadInput, match=complaint):
            Routing(**wrong)
    with pytest.raises(UnknownName, match="os:system"):
        weigh(np.ones((1, 2)), router="os:system")


def test_cbtm_is_what_the_published_code_computes():
    dist2_NK = np.random.default_rng(0).uniform(0.2, 2, size=(6, 5))
    weight_NK = np.exp(-(dist2_NK**2) / 0.1)  # there: softmax over all, then the top k, then scaled to sum to one
    weight_NK /= weight_NK.sum(1, keepdims=True)
    weight_NK[weight_NK < np.sort(weight_NK, axis=1)[:, [-2]]] = 0
    weight_NK /= weight_NK.sum(1, keepdims=True)
    np.testing.assert_allclose(weigh(dist2_NK, router="cbtm", temperature=0.1, top_k=2)[:, :-1], weight_NK, atol=1e-12)


def test_text_far_from_every_domain_falls_back_to_the_seed():
    weight_NC = weigh([[0.2, 0.9], [1.5, 1.6]], top_k=1, seed_distance=1.0)
    np.testing.assert_array_equal(weight_NC, [[1, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize("router", ["centroid", "cbtm", "sparse", "live"])
def test_where_nothing_is_known_the_seed_is_alone(router):
    """Without the seed, the first experts are alike, whatever they said."""
    dist2_NE, memory_NC = np.full((1, 3), np.inf), np.array([[-1.0, -2.0, -9.0, -3.0]])
    for top_k in (1, 2, 4):
        with_seed, without = (weigh(dist2_NE, memory_NC, router=router, top_k=top_k, seed_distance=one) for one in (0.7, None))
        np.testing.assert_array_equal(with_seed, [[0, 0, 0, 1]])
        expected_C = np.array([1, top_k > 1, top_k > 2, 0])
        np.testing.assert_allclose(without[0], expected_C / expected_C.sum())


@pytest.mark.parametrize("router", ["centroid", "live"])
def test_of_equal_distances_the_first_expert_is_kept(router):
    kept_C = weigh([[2.0, 0.5, 2.0, 2.0]], np.zeros((1, 5)), router=router, top_k=2)[0] > 0
    assert kept_C.tolist() == [True, True, False, False, False]


def test_uniform_weights_are_alike():
    np.testing.assert_allclose(weigh(np.eye(4), router="uniform", top_k=5)[:, :-1], 0.25)
    np.testing.assert_allclose(weigh(np.eye(4), router="uniform", top_k=5, seed_distance=0.0), 0.2)


def test_live_keeps_the_nearest_and_the_seed_and_weighs_them_by_both():
    rng = np.random.default_rng(0)
    dist2_NE, memory_NC = rng.uniform(0.2, 2, (40, 5)), -20 * rng.random((40, 6))
    got_NC = weigh(dist2_NE, memory_NC, router="live", top_k=2, temperature=0.5, seed_distance=1.1, memory=0.3)
    for got_C, dist2_E, memory_C in zip(got_NC, dist2_NE, memory_NC, strict=True):
        unscaled = {int(e): np.exp(-dist2_E[e] / 0.5) * np.exp(memory_C[e]) ** 0.3 for e in np.argsort(dist2_E)[:2]}
        unscaled[5] = np.exp(-1.1 / 0.5) * np.exp(memory_C[5]) ** 0.3
        expected_C = np.array([unscaled.get(c, 0.0) for c in range(6)]) / sum(unscaled.values())
        np.testing.assert_allclose(got_C, expected_C, rtol=1e-9)
    live_NC = route.candidates(Signals(dist2_NE, np.zeros((40, 6))), Routing("live", 2, 0.5, 1.1))
    assert (live_NC == (got_NC > 0)).all()
    nearest_NC = weigh(dist2_NE, memory_NC, router="live", top_k=1, temperature=0.5, memory=0.3)
    np.testing.assert_array_equal(nearest_NC.argmax(1), dist2_NE.argmin(1))


def test_the_posterior_is_bayes():
    loglik_TC = np.log([[0.5, 0.1, 0.3], [0.2, 0.2, 0.3], [0.9, 0.3, 0.4]])
    settings = {"router": "posterior", "top_k": 3, "temperature": 1.0}
    joint_TC = np.array([1, 1, np.exp(-0.7)]) * np.array([[1, 1, 1], [0.5, 0.1, 0.3], [0.1, 0.02, 0.09]])
    weight_TC = weigh(memory_NC=route.remember(loglik_TC), seed_distance=0.7, **settings)
    np.testing.assert_allclose(weight_TC, joint_TC / joint_TC.sum(1, keepdims=True))
    joint_TC[:, -1] = 0
    np.testing.assert_allclose(weigh(memory_NC=route.remember(loglik_TC), **settings), joint_TC / joint_TC.sum(1, keepdims=True))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([1.0, 0.98, 0.5, 1e-3]), st.integers(0, 2**32 - 1))
def test_the_memory_is_a_fading_sum_within_each_document(sizes, decay, rng_seed):
    loglik_NC = -5 * np.random.default_rng(rng_seed).random((sum(sizes), 3))
    document_N = np.repeat(np.random.default_rng(rng_seed).permutation(len(sizes)), sizes)
    expected_NC, memory_C = [], np.zeros(3)
    for n, loglik_C in enumerate(loglik_NC):  # token by token
        memory_C = np.zeros(3) if n == 0 or document_N[n] != document_N[n - 1] else decay * memory_C + loglik_NC[n - 1]
        expected_NC.append(memory_C)
        assert loglik_C.shape == (3,)
    np.testing.assert_allclose(route.remember(loglik_NC, decay, document_N), expected_NC, rtol=1e-12, atol=1e-12)
    assert route.remember(np.zeros((0, 2)), decay, np.zeros(0, int)).shape == (0, 2)
    np.testing.assert_allclose(route.remember(loglik_NC, decay)[: sizes[0]], expected_NC[: sizes[0]], rtol=1e-12, atol=1e-12)


def test_a_router_from_outside_must_have_been_typed_here(monkeypatch, tmp_path):
    (tmp_path / "my_routers.py").write_text(
        "from elmwood.domains.route import Router\n"
        "farthest = Router(lambda signals, routing: signals.dist2_NC / routing.temperature, 'dense', None, 'a joke')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with pytest.raises(UnknownName, match="not part of elmwood"):  # a record names it before the user has
        weigh([[0.1, 0.2]], router="my_routers:farthest", top_k=1)
    assert route.open_router("my_routers:farthest").source == "a joke"
    np.testing.assert_array_equal(weigh([[0.1, 0.2]], router="my_routers:farthest", top_k=1), [[0, 1, 0]])


# ---- which experts are live


def brute_live(dist2_NE, place_N, routing):
    """The rule of live experts a second time: whole sorts, token by token."""
    found, live, listed = [], [], []
    for dist2_E, place in zip(dist2_NE.astype(np.float32), place_N, strict=True):
        score_E = dist2_E.copy()
        live = [] if place == 1 else live
        score_E[live] -= np.float32(routing.margin if place >= 32 else 0)
        far_E = dist2_E > routing.far if routing.far is not None and routing.seed_distance is not None else np.zeros(len(dist2_E), bool)
        if place < 32 or place % routing.every == 0:
            order = [e for e in np.argsort(np.where(far_E, np.inf, score_E), kind="stable").tolist() if not far_E[e]]
            listed = sorted(order[: max(routing.top_k, routing.shortlist or 0)])
            live = order[: routing.top_k]
        elif (routing.shortlist or 0) > routing.top_k:
            live = [listed[n] for n in np.argsort(score_E[listed], kind="stable")[: routing.top_k]]
        found.append(np.isin(np.arange(len(dist2_E)), live))
    return np.array(found)


RULES = st.builds(
    lambda **fields: Routing("live", temperature=0.5, seed_distance=1.0, **fields),
    top_k=st.integers(1, 4), every=st.sampled_from([1, 4, 7, 64]), shortlist=st.sampled_from([None, 3, 6]),
    margin=st.sampled_from([0.0, 0.05, 0.5]), far=st.sampled_from([None, 0.7, 1.3]),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(RULES, st.integers(0, 2**32 - 1), st.lists(st.integers(1, 150), min_size=1, max_size=3))
def test_live_experts_are_those_of_full_sorts(routing, rng_seed, sizes):
    rng = np.random.default_rng(rng_seed)
    dist2_NE = np.round(1 + 0.3 * np.cumsum(rng.normal(size=(sum(sizes), 9)), 0) / 3, 2).clip(0, 4).astype(np.float32)  # ties, slow drift
    place_N = route.places(np.repeat(np.arange(len(sizes)), sizes))
    assert place_N.tolist() == [place for size in sizes for place in range(1, size + 1)]
    live_NE = route.live_experts(dist2_NE, place_N, routing)
    np.testing.assert_array_equal(live_NE, brute_live(dist2_NE, place_N, routing))
    weight_NC = route.weights(Signals(dist2_NE, np.zeros((len(dist2_NE), 10)), place_N), routing)
    np.testing.assert_array_equal(weight_NC[:, :-1] > 0, live_NE)
    np.testing.assert_allclose(weight_NC.sum(1), 1)
    anew = Routing("live", routing.top_k, 0.5, 1.0)
    if routing.every == 1 and not routing.margin and routing.far is None:
        np.testing.assert_array_equal(weight_NC, route.weights(Signals(dist2_NE, np.zeros((len(dist2_NE), 10))), anew))


@settings(deadline=None, max_examples=80)
@given(arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([0.25, 0.5, 0.75, 1.0, np.inf])), st.integers(1, 40))
def test_a_shortlist_holds_what_a_full_search_finds(dist2_E, count):
    """The 32 nearest, exactly, and of equal ones the first; the nearest of a list are the nearest of all."""
    order = np.argsort(dist2_E, kind="stable")
    np.testing.assert_array_equal(route.closest(dist2_E, count), np.sort(order[:count]))
    for seed_distance in (None, 0.9):
        routing = Routing("live", 4, seed_distance=seed_distance, every=64, shortlist=32)
        live = route.search(route.NOBODY, dist2_E, routing, 64)
        keep = order if seed_distance is None else order[np.isfinite(dist2_E[order])]
        np.testing.assert_array_equal(live.experts, np.sort(keep[:4]))
        np.testing.assert_array_equal(live.listed, np.sort(keep[:32]))
        np.testing.assert_array_equal(route.choose(live, dist2_E[live.listed], routing).experts, live.experts)
        for before in (live, route.search(live, dist2_E[::-1].copy(), routing, 64)):  # whatever was listed before
            np.testing.assert_array_equal(route.search(before, dist2_E, routing, 64).listed, live.listed)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["live", "centroid"]), st.sampled_from([0.6, 0.9]))
def test_a_candidate_that_is_sure_at_a_search_is_alone_until_the_next(rng_seed, router, sure):
    rng = np.random.default_rng(rng_seed)
    dist2_NE = np.cumsum(rng.normal(size=(200, 4)), 0).clip(0.2, 3).astype(np.float32)
    memory_NC = route.remember(-3 * rng.random((200, 5)), 0.98)
    signals = Signals(dist2_NE, memory_NC, np.arange(1, 201))
    routing = Routing(router, 2, 0.4, 1.0, every=16, sure=sure)
    got_NC = route.weights(signals, routing)
    all_NC = route.weights(signals, Routing(router, 2, 0.4, 1.0, every=16))
    at = 0
    for n, place in enumerate(signals.place_N):
        if place < 32 or place % 16 == 0:
            at = n
        expected_C = all_NC[n]
        if all_NC[at].max() >= sure and (n != at or router == "centroid"):
            expected_C = np.eye(5)[all_NC[at].argmax()]
        np.testing.assert_allclose(got_NC[n], expected_C)


def test_rules_that_do_not_fit_each_other_are_refused():
    for wrong in ({"every": 0}, {"margin": -1.0}, {"sure": 0.4}, {"sure": 0.9, "shortlist": 32}, {"shortlist": 0}):
        with pytest.raises(BadInput):
            Routing(**wrong)
    with pytest.raises(BadInput, match="looks at no distances"):
        weigh(memory_NC=[[-1.0, -2.0]], router="posterior", every=64)
