"""Ensembles from columns: they are what runs live; their settings; the table with every control."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmwood.domains.route import ROUTERS, Routing, Signals, places, remember, weights
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, UnknownName
from elmwood.evaluate.calibration import DECAYS, calibrate, minimise
from elmwood.evaluate.columns import run
from elmwood.evaluate.comparison import Control, Cost, Side, compare, top_ks
from elmwood.evaluate.holdout import distances
from elmwood.evaluate.losses import bits_per_byte, mix
from elmwood.evaluate.subsets import optimum
from elmwood.records import Ensemble, Forest

K = 3

ROUTINGS = [
    Routing("centroid", 1, 0.3),
    Routing("centroid", 2, 0.3, 1.0),
    Routing("cbtm", 4, 0.3, 0.9),
    Routing("sparse", 2, 0.1),
    Routing("sparse", 2, 0.1, 1.9),
    Routing("live", 1, 0.5, 1.1, memory=0.5),
    Routing("live", 2, 0.5, 1.1, memory=0.3, decay=0.9),
    Routing("live", 2, 0.5, None, memory=0.3, decay=1.0),
    Routing("live", 1, 0.5, None, memory=0.3, every=8, shortlist=2, margin=0.02),
    Routing("live-sparse", 2, 0.5, 1.9, memory=0.3, every=8),
    Routing("live", 2, 0.5, 1.1, memory=1.0, every=8, sure=0.6, margin=0.05, far=1.3),
    Routing("posterior", 4, 2.0, 0.5),
    Routing("uniform", 4, 1.0, 1.0),
]


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_the_table_equals_the_live_ensemble(routing, grown, held, columns, monkeypatch):
    """Token by token before rounding, on documents longer than a window; on average, and so in bits per byte, as it is kept."""
    monkeypatch.setattr("elmwood.domains.route.EARLY", 4)
    store, partition, seed, experts = grown
    assert (np.bincount(held.windows.document_W) > 2).all()
    members = sorted(experts, key=lambda one: one.digest)
    forest = Forest(seed=seed.digest, partition=partition.digest, experts=tuple(one.digest for one in members))
    store.add(forest)
    kept_NC = np.column_stack([columns[1][:, [experts.index(one) for one in members]], columns[0]])
    exact_NC = np.column_stack([run(open_model(one, store, "cpu"), held) for one in (*members, seed)])
    dist2_NE = distances(held, partition, store, signal=ROUTERS[routing.router].distances or "dense")
    dist2_NE = dist2_NE[:, [one.domain for one in members]]
    live = open_model(Ensemble(forest=forest.digest, **asdict(routing)), store, "cpu")
    live_N = run(live, held)

    def mixed(loglik_NC):
        memory_NC = remember(loglik_NC, routing.fading, held.document_N)
        return mix(loglik_NC, weights(Signals(dist2_NE, memory_NC, places(held.document_N)), routing))

    np.testing.assert_allclose(mixed(exact_NC), live_N, atol=1e-5)
    some_W = np.array([1, 4, 5, 11])  # some windows alone are what they are among all
    np.testing.assert_allclose(run(live, held, wanted_W=some_W), live_N[np.isin(held.window_N, some_W)], atol=1e-5)
    if routing.sure is not None:
        return  # a threshold: rounding can move a weight across it
    mixed_N = mixed(kept_NC)
    # two bytes a number: each is off by 1e-3 (one sigma), and so the mean of these tokens by
    sigma = np.spacing(np.float16(6)) / np.sqrt(12 * len(live_N))
    assert abs(mixed_N.mean() - live_N.mean(dtype=np.float64)) < 3 * sigma < 6e-5
    two = [bits_per_byte(one_N, held, ~held.tune_D).value for one_N in (mixed_N, live_N)]
    tokens, size = np.isin(held.document_N, np.flatnonzero(~held.tune_D)).sum(), held.bytes_D[~held.tune_D].sum()
    sigma = np.spacing(np.float16(6)) * np.sqrt(tokens / 12) / (size * np.log(2))  # of the same rounding, over the bytes of a half
    assert abs(two[0] - two[1]) < 3 * sigma < 1e-4


def test_a_memory_that_fades_has_only_late_windows_read_before(grown, held, monkeypatch):
    """And what was not read changes nothing."""
    store, partition, seed, experts = grown
    forest = Forest(seed=seed.digest, partition=partition.digest, experts=tuple(one.digest for one in experts))
    store.add(forest)
    routing = Routing("live", 2, 0.5, 1.1, memory=0.3, decay=0.6)
    assert 0.6**routing.reach / (1 - 0.6) * 30 == pytest.approx(1e-6)
    assert Routing("live", decay=1.0).reach == Routing("posterior").reach == np.inf
    live = open_model(Ensemble(forest=forest.digest, **asdict(routing)), store, "cpu")
    live_N, read = run(live, held), []
    score = live.experts.score
    monkeypatch.setattr(live.experts, "score", lambda c, rows, *since: read.append(len(rows)) or score(c, rows, *since))
    last_W = np.flatnonzero(np.diff(held.windows.document_W, append=-1))
    longest = last_W[np.argmax(np.diff(last_W, prepend=-1))]
    some_n = run(live, held, wanted_W=np.array([longest]))
    assert max(read) < (held.windows.document_W == held.windows.document_W[longest]).sum()
    np.testing.assert_allclose(some_n, live_N[held.window_N == longest], atol=1e-5)


# ---- settings


def test_minimise_finds_the_bottom():
    calls = []
    assert minimise(lambda x: calls.append(x) or (x - 0.3) ** 2, np.linspace(-1, 1, 9)) == pytest.approx(0.3, abs=0.01)
    assert len(calls) <= 20


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 4]))
def test_a_calibration_is_never_worse_than_where_it_started(rng_seed, top_k):
    rng = np.random.default_rng(rng_seed)
    dist2_NE, loglik_NC, document_N = 2 * rng.random((50, 3)), -5 * rng.random((50, 4)), np.repeat(np.arange(5), 10)

    def loss(routing):
        signals = Signals(dist2_NE, remember(loglik_NC, routing.fading, document_N))
        return -mix(loglik_NC, weights(signals, routing)).mean()

    for router in ("centroid", "sparse", "live", "posterior"):
        found = calibrate(loglik_NC, dist2_NE, document_N, top_k, router)
        assert (found.routing.router, found.routing.top_k) == (router, top_k)
        assert found.nats == pytest.approx(loss(found.routing))
        for temperature in (0.3, 1.0, 10.0):
            assert found.nats <= loss(Routing(router, top_k, temperature, memory=0.0 if router == "live" else 0.1)) + 1e-2


def test_the_memory_s_settings_are_found():
    """Two experts take turns of 40 tokens, the distance says nothing: a fading memory that follows them is worth most."""
    rng = np.random.default_rng(0)
    turn_N = np.arange(4000) // 40 % 2
    good_N, bad_N = -1.0 - 0.5 * rng.random(4000), -2.0 - 0.5 * rng.random(4000)
    loglik_NC = np.column_stack([np.where(turn_N == 0, good_N, bad_N), np.where(turn_N == 1, good_N, bad_N), np.full(4000, -4.0)])
    dist2_NE, document_N = np.ones((4000, 2)), np.zeros(4000, int)
    found = calibrate(loglik_NC, dist2_NE, document_N, 2, "live")
    alone = calibrate(loglik_NC, dist2_NE, document_N, 2, "centroid")
    assert found.routing.decay == min(DECAYS)
    assert found.routing.memory > 0.3
    assert found.nats < 1.5 < alone.nats


def test_one_expert_without_a_domain_gets_the_best_static_weight():
    rng = np.random.default_rng(0)
    loglik_NC = -rng.gamma(2.0, 1.0, (3000, 2)) - np.array([0.0, 0.2])
    best = optimum(loglik_NC)
    assert 0.1 < best.weight_E[1] < 0.9
    found = calibrate(loglik_NC, np.zeros((3000, 1)), np.zeros(3000, int), 2, "centroid")
    assert found.nats == pytest.approx(best.nats, abs=1e-4)


# ---- compare


@pytest.fixture(scope="module")
def side(grown, held, columns):
    store, partition, _, _ = grown
    cost = Cost(batch=8, steps=10, tokens=300, machine_seconds=3.0, wall_seconds=1.0)
    sparse2_NK = distances(held, partition, store, signal="sparse")
    return Side(columns[1], distances(held, partition, store), cost, sparse2_NK=sparse2_NK)


def test_the_table_has_every_control(held, columns, side):
    seed_N, expert_NK = columns
    dense = [Control("dense", expert_NK[:, 1] + 0.1, side.cost), Control("dense, large batch", expert_NK[:, 1])]
    made = compare(held, seed_N, side, dense, random=side, router="centroid")
    named = {one.name: one for one in made.rows}
    assert [one.role for one in made.rows] == ["seed", *["control"] * 6, *["result"] * len(made.fits), "bound"]
    result = made.chosen
    assert result.startswith("c-BTM ")
    assert {"seed", "dense", "uniform routing", "oracle routing", "dense + seed, centroid routing", f"random clusters, {result}"} <= set(
        named
    )
    assert sum(name.startswith("random clusters, posterior routing") for name in named) == 1
    assert named["dense"].gain is None
    assert named["dense, large batch"].gain < 0
    assert named[result].gain == pytest.approx(named["dense"].bits_per_byte - named[result].bits_per_byte)
    assert named[result].tokens == 300
    assert named[f"random clusters, {result}"].bits_per_byte == named[result].bits_per_byte  # the same experts by the same router
    bytes_K = np.bincount(held.domain_D[~held.tune_D], held.bytes_D[~held.tune_D], K)
    for one in made.rows:
        assert len(one.domains) == K
        loss_K = np.array([value or 0.0 for value in one.domains])
        assert one.macro == pytest.approx(loss_K[bytes_K > 0].mean())
        assert one.bits_per_byte == pytest.approx(np.average(loss_K, weights=bytes_K))
    np.testing.assert_allclose(np.sum(made.routing, 1), 1)
    assert made.best in made.fits
    assert made.growth[-1][0] == pytest.approx(named[result].bits_per_byte)


def test_experts_that_only_harm_are_in_the_growth_too(held, columns, side):
    seed_N, expert_NK = columns
    worse = side._replace(loglik_NK=expert_NK - np.array([0.0, 3.0, 9.0]))
    made = compare(held, seed_N, worse, [Control("dense", seed_N)], router="centroid")
    named = {one.name: one for one in made.rows}
    assert len(made.growth) == K
    assert made.growth[-1][0] == pytest.approx(named[made.chosen].bits_per_byte)


@pytest.mark.parametrize("router", [None, "centroid", "sparse", "live", "posterior"])
def test_the_result_and_its_controls_have_one_router(router, held, columns, side):
    made = compare(held, columns[0], side, [Control("dense", columns[0] + 0.01)], random=side, router=router)
    name = made.best.routing.router
    assert router in (None, name)
    assert {"live", "posterior"} <= {one.routing.router for one in made.fits}
    if router is None:
        allowed = [one for one in made.fits if one.routing.router != "posterior"]
        assert made.best.nats == min(one.nats for one in allowed)
    for start in ("random clusters, ", "dense + seed, "):
        assert any(one.name.startswith(start) and (name in one.name or "c-BTM" in one.name) for one in made.rows)
    for one in made.rows:  # every fitted row has its settings
        fitted = one.role == "result" or one.name.startswith(("random", "dense + seed"))
        assert (f"{one.name}: temperature" in made.fitted) == (f"{one.name}: top_k" in made.fitted) == fitted
    assert made.fitted["temperature"] == made.fitted[f"{made.chosen}: temperature"] == made.best.routing.temperature
    assert ("decay" in made.fitted) == (name == "live")


def test_a_row_is_what_its_settings_say(held, columns, side):
    """The chosen row, by the formula of its router written a second time: one document after another, token by token."""
    seed_N, expert_NK = columns
    made = compare(held, seed_N, side, router="live")
    chosen = made.best.routing
    loglik_NC = np.column_stack([expert_NK, seed_N]).astype(np.float64)
    mixed_N = np.zeros(len(seed_N))
    for d in np.unique(held.document_N):
        memory_C = np.zeros(K + 1)
        for n in np.flatnonzero(held.document_N == d):
            live = [] if np.isinf(side.dist2_NK[n]).all() else [int(e) for e in np.argsort(side.dist2_NK[n])[: chosen.top_k]]
            score = {e: -side.dist2_NK[n, e] / chosen.temperature + chosen.memory * memory_C[e] for e in live}
            if chosen.seed_distance is not None:
                score[K] = -chosen.seed_distance / chosen.temperature + chosen.memory * memory_C[K]
            score = score or dict.fromkeys(range(chosen.top_k), 0.0)
            weight = {c: np.exp(value - max(score.values())) for c, value in score.items()}
            mixed_N[n] = np.log(sum(w * np.exp(loglik_NC[n, c]) for c, w in weight.items()) / sum(weight.values()))
            memory_C = chosen.decay * memory_C + loglik_NC[n]
    np.testing.assert_allclose(made.column_N, mixed_N, atol=1e-9)
    row = next(one for one in made.rows if one.name == made.chosen)
    assert row.bits_per_byte == pytest.approx(bits_per_byte(mixed_N, held, ~held.tune_D).value)


def test_routers_that_a_table_cannot_have_are_refused(held, columns, side):
    with pytest.raises(UnknownName, match="no router 'oracle'"):
        compare(held, columns[0], side, router="oracle")
    with pytest.raises(BadInput, match="no terms"):
        compare(held, columns[0], side._replace(sparse2_NK=None), router="sparse")


def test_settings_do_not_look_at_the_test_half(grown, held, columns):
    store, partition, _, _ = grown
    seed_N, expert_NK = columns
    dist2_NK = distances(held, partition, store)
    spoiled_NK = np.where(held.tune_N[:, None], expert_NK, -9.0)
    fits = [compare(held, seed_N, Side(column, dist2_NK)).fits for column in (expert_NK, spoiled_NK)]
    assert fits[0] == fits[1]


def test_columns_of_another_holdout_are_refused(held, columns):
    seed_N, expert_NK = columns
    with pytest.raises(BadInput, match="score the model on this holdout"):
        compare(held, seed_N[:-1], Side(expert_NK, expert_NK))


def test_top_k_goes_as_far_as_there_are_experts():
    sides = [Side(np.zeros((1, n)), np.zeros((1, n))) for n in (1, 2, 4, 6)]
    assert [top_ks("centroid", one) for one in sides] == [[2], [1, 3], [1, 2, 5], [1, 2, 4, 7]]
    assert [top_ks("live", one) for one in sides] == [[1], [1, 2], [1, 2], [1, 2]]
