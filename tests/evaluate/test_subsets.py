"""What the table says of ensembles nobody ran: optimal weights with their gap, choices, values, screens, rankings, surrogates."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from elmwood.domains.route import Routing, Signals, weights
from elmwood.evaluate.losses import mix
from elmwood.evaluate.subsets import greedy, member_weights, optimum, probabilities, rank, values, would_help
from elmwood.evaluate.surrogate import interpolation, mixture, pool


def columns(rng_seed, tokens=600, experts=5):
    rng = np.random.default_rng(rng_seed)
    return -rng.gamma(2.0, 1.5, (tokens, experts)) - rng.gamma(1.0, 0.3, experts)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_optimal_weights_are_optimal_and_the_gap_is_a_bound(rng_seed, experts):
    loglik_NE = columns(rng_seed, experts=experts)
    found = optimum(loglik_NE)

    def loss(weight_E):
        return -float(mix(loglik_NE, np.broadcast_to(weight_E, loglik_NE.shape)).mean())

    assert found.weight_E.sum() == pytest.approx(1)
    assert (found.weight_E >= 0).all()
    assert found.nats == pytest.approx(loss(found.weight_E), abs=1e-5)
    assert found.gap < 1e-5
    assert found.passes <= 60
    peer = minimize(
        lambda x_E: loss(np.abs(x_E) / np.abs(x_E).sum()), np.full(experts, 1 / experts), method="SLSQP", bounds=[(1e-9, 1)] * experts
    )
    assert found.nats <= peer.fun + found.gap + 1e-5


def test_of_two_columns_that_are_the_same_either_will_do():
    loglik_NE = columns(0)[:, [0, 0, 1]]
    assert optimum(loglik_NE).nats == pytest.approx(optimum(loglik_NE[:, 1:]).nats, abs=1e-5)


@pytest.mark.parametrize("router", ["centroid", "live", "posterior"])
def test_members_are_routed_as_if_there_were_no_others(router):
    rng = np.random.default_rng(0)
    dist2_NE, memory_NC = 2 * rng.random((50, 5)), -9 * rng.random((50, 6))
    routing = Routing(router, 2, 0.3, 0.9)
    some_NC = member_weights(Signals(dist2_NE, memory_NC), routing, (1, 3, 4))
    alone = Signals(dist2_NE[:, [1, 3, 4]], memory_NC[:, [1, 3, 4, 5]])
    np.testing.assert_array_equal(some_NC[:, [1, 3, 4, 5]], weights(alone, routing))
    assert (some_NC[:, [0, 2]] == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_lazy_choice_is_the_plain_one_where_gains_shrink(rng_seed):
    rng = np.random.default_rng(rng_seed)
    worth_XE = rng.random((30, 7))
    looked = []

    def loss(members):
        looked.append(members)
        return -float(worth_XE[:, list(members)].max(1).sum()) if members else 0.0

    lazy = greedy(loss, range(7), 5)
    held, plain = (), []
    for _ in range(5):
        plain.append(min((one for one in range(7) if one not in held), key=lambda one: loss(tuple(sorted((*held, one))))))
        held = (*held, plain[-1])
    assert list(lazy.order) == plain
    assert lazy.looked <= 7 + 6 + 5 + 4 + 3
    assert greedy(lambda members: float(len(members)), range(3), 3).order == (0,)  # none that only costs


def test_values_are_losses_without():
    loss = {(0, 1): 1.0, (0,): 3.0, (1,): 1.5}.__getitem__
    assert values(loss, (0, 1)) == (0.5, 2.0)


def test_the_screen_is_the_slope_of_the_loss():
    loglik_NE = columns(3, tokens=4000, experts=2)
    block_N = np.arange(4000) // 40
    ratio = would_help(loglik_NE[:, 1], loglik_NE[:, 0], block_N, np.ones(4000, bool))
    little = 1e-9
    mixed_N = mix(loglik_NE, np.broadcast_to([1 - little, little], loglik_NE.shape))
    assert (mixed_N - loglik_NE[:, 0]).mean() / little == pytest.approx(ratio.value - 1, rel=1e-3)
    drawn = np.random.default_rng(0).integers(100, size=(2000, 100))
    sum_B = np.exp(loglik_NE[:, 1] - loglik_NE[:, 0]).reshape(100, 40).mean(1)
    assert ratio.standard_error == pytest.approx(sum_B[drawn].mean(1).std(), rel=0.1)


@pytest.mark.parametrize("experts", [40, 250])
def test_experts_that_are_nearly_the_same_have_best_weights(experts):
    rng = np.random.default_rng(2)
    loglik_NE = (-3 * rng.random((2000, 1)) - 1e-3 * rng.random((2000, experts))).astype(np.float16)
    found = optimum(loglik_NE)
    assert found.gap < 1e-5
    assert found.weight_E.min() >= 0
    assert found.weight_E.sum() == pytest.approx(1)
    assert found.nats == pytest.approx(-mix(loglik_NE, np.broadcast_to(found.weight_E, loglik_NE.shape)).mean(), abs=1e-6)


def test_a_ranking_is_exact_for_the_best():
    rng = np.random.default_rng(1)
    loglik_NE = columns(4, tokens=6000, experts=6)
    weight_CE = rng.dirichlet(np.full(6, 0.5), 300)
    block_N = np.arange(6000) // 30
    found = rank(*probabilities(loglik_NE), weight_CE, block_N, keep=((1 / 4, 60), (1 / 2, 20)))
    exact_C = np.array([-mix(loglik_NE, np.broadcast_to(one_E, loglik_NE.shape)).mean() for one_E in weight_CE])
    assert sorted(found.order_C) == list(range(300))
    assert found.order_C[0] == exact_C.argmin()
    np.testing.assert_allclose(found.nats_C[found.order_C[:20]], np.sort(found.nats_C[found.order_C[:20]]))
    np.testing.assert_allclose(found.nats_C[found.order_C[:20]], exact_C[found.order_C[:20]], atol=1e-5)
    sampled_C = found.order_C[60:]
    assert (np.abs(found.nats_C - exact_C)[sampled_C] < 5 * found.error_C[sampled_C]).all()


def test_surrogates_of_nothing_and_of_one_are_the_seed_and_the_expert():
    loglik_NE, seed_N = columns(5, experts=2), columns(6, experts=1)[:, 0]
    for surrogate in (pool, mixture, interpolation):
        np.testing.assert_allclose(surrogate(loglik_NE, seed_N, np.zeros(2)), seed_N)
        np.testing.assert_allclose(surrogate(loglik_NE, seed_N, np.array([0, 1.0])), loglik_NE[:, 1])
