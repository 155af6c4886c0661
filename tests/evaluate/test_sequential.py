"""Sequential tests as laws: errors under every look, exactness without replacement, and what changes nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmwood.errors import BadInput
from elmwood.evaluate.sequential import error_budget
from elmwood.evaluate.sequential.betting import Draws, average, draws_to_reject, limit, wealth
from elmwood.evaluate.sequential.decision import Population, StoppingRule, decide, find_touched, look, per_byte, population, predict, worst
from elmwood.records import Ledger

RULE = StoppingRule(worthless=0.2)  # differences here have a spread of one


def heavy(rng, shape, low=-6.0, high=6.0):
    """Differences half near zero and half with heavy tails, of mean exactly zero, within bounds."""
    value = np.where(rng.random(shape) < 0.5, 0.1 * rng.standard_normal(shape), rng.standard_t(3, shape))
    value = np.clip(value, low + 1, high - 1)
    return value - value.mean(-1, keepdims=True)


def rare(rng, shape):
    """A little better nearly everywhere, broken on one block in a hundred; of mean exactly zero."""
    value = 0.05 * rng.standard_normal(shape) - np.where(rng.random(shape) < 0.01, np.minimum(rng.lognormal(1, 1, shape), 30), 0)
    return value - value.mean(-1, keepdims=True)


def bounds(size, low=-6.0, high=6.0, **fields):
    return Population(np.full(size, low), np.full(size, high), size, **fields)


# ---- betting


@pytest.mark.parametrize(("draw", "low"), [(heavy, -6.0), (rare, -31.0)])
def test_a_right_mean_is_rarely_rejected_at_any_look(draw, low):
    value_ST = draw(np.random.default_rng(1), (400, 1500))
    path_ST = wealth(Draws(value_ST, 1500, low, 31.0), np.array(0.0))
    assert (draws_to_reject(path_ST, 0.05) > 0).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    mirrored_ST = wealth(Draws(-value_ST, 1500, -31.0, -low), np.array(0.0))
    assert (draws_to_reject(mirrored_ST, 0.05) > 0).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_wealth_has_no_trend_when_the_mean_is_right():
    """Averaged over every order of a small population, wealth stays one: exactly, not in the limit."""
    from itertools import permutations

    orders = np.array(list(permutations([-1.0, -0.5, 0.2, 0.3, 1.0, 0.9])))
    value_ST = orders - orders.mean(1, keepdims=True)
    mean_T = np.exp(wealth(Draws(value_ST, 6, -1.5, 1.5), np.array(0.0))).mean(0)
    np.testing.assert_allclose(mean_T, 1, atol=1e-9)


def test_wealth_has_no_trend_whatever_is_predicted():
    from itertools import permutations

    rng = np.random.default_rng(3)
    value_B, guess_B = rng.normal(size=6), rng.normal(size=6)
    value_B -= value_B.mean()
    order_SB = np.array(list(permutations(range(6))))
    seen_SB = guess_B[order_SB]
    left_SB = (guess_B.sum() - (np.cumsum(seen_SB, 1) - seen_SB)) / (6 - np.arange(6))
    low_SB = (value_B - guess_B).min() + left_SB
    path = wealth(Draws(value_B[order_SB], 6, value_B.min(), value_B.max(), left_SB - seen_SB), np.array(0.0), low_SB)
    np.testing.assert_allclose(np.exp(path).mean(0), 1, atol=1e-9)


def weighted(rng, size):
    """Weights of mean one, and values whose weighted mean is zero."""
    weight_B = rng.dirichlet(np.ones(size)) * size
    value_B = rng.normal(size=size)
    return weight_B, value_B - (weight_B * value_B).sum() / size


def test_wealth_has_no_trend_where_chances_differ_and_something_is_predicted():
    """Over every order with its chance: exactly one, at every look."""
    from itertools import permutations

    rng = np.random.default_rng(4)
    (weight_B, value_B), guess_B = weighted(rng, 6), rng.normal(size=6)
    order_SB = np.array(list(permutations(range(6))))
    weight_SB, seen_SB = weight_B[order_SB], (weight_B * guess_B)[order_SB]
    left_SB = 6 - (np.cumsum(weight_SB, 1) - weight_SB)
    chance_S = (weight_SB / left_SB).prod(1)
    assert chance_S.sum() == pytest.approx(1)
    guess_SB = (seen_SB.sum(1, keepdims=True) - (np.cumsum(seen_SB, 1) - seen_SB)) / left_SB
    for shift_SB, low_SB in ((0.0, None), (guess_SB - guess_B[order_SB], (value_B - guess_B).min() + guess_SB)):
        drawn = Draws(value_B[order_SB], 6, value_B.min(), value_B.max(), shift_SB, weight_SB)
        np.testing.assert_allclose(chance_S @ np.exp(wealth(drawn, np.array(0.0), low_SB)), 1, atol=1e-9)


def test_a_right_weighted_mean_is_rarely_rejected_at_any_look():
    rng, wrong = np.random.default_rng(5), 0
    for run in range(300):
        weight_B, _ = weighted(rng, 500)
        value_B = rare(rng, 500) / np.maximum(weight_B, 0.1)
        value_B -= (weight_B * value_B).mean()
        order_B = error_budget.random_order(f"{run}".encode(), 500, weight_B)
        drawn = Draws(value_B[order_B], 500, value_B.min(), value_B.max(), weight_T=weight_B[order_B])
        wrong += int(draws_to_reject(wealth(drawn, np.array(0.0)), 0.05)) > 0
    assert wrong / 300 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_a_mean_that_cannot_be_any_more_is_refuted():
    path_T = wealth(Draws(np.array([1.0, 1.0, 1.0, 0.0]), 4, 0.0, 1.0), np.array(0.5))
    assert path_T[0] < np.inf
    assert path_T[-1] == np.inf


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(10, 200))
def test_later_draws_change_no_earlier_wealth(rng_seed, cut):
    value_T = heavy(np.random.default_rng(rng_seed), 300)
    whole_T, part_T = (wealth(Draws(value_T[:end], 300, -6, 6), np.array(-0.1)) for end in (300, cut))
    np.testing.assert_allclose(whole_T[:cut], part_T)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.floats(0.1, 10))
def test_units_and_origin_do_not_matter(rng_seed, offset, scale):
    value_T = heavy(np.random.default_rng(rng_seed), 100)
    plain_T = wealth(Draws(value_T, 200, -6, 6), np.array(-0.2))
    moved_T = wealth(Draws(scale * (value_T + offset), 200, scale * (offset - 6), scale * (offset + 6)), np.array(scale * (offset - 0.2)))
    np.testing.assert_allclose(plain_T, moved_T, atol=1e-6)


def test_the_average_of_bettors_is_between_them():
    path_VT = np.log(np.array([[1.0, 4.0], [3.0, 2.0]]))
    np.testing.assert_allclose(np.exp(average(path_VT)), [2, 3])


def test_a_limit_is_rounded_outward():
    """Means below 0.3 are rejected: the limit is just below, from either side."""
    assert 0.2999 < limit(lambda mean_G: np.where(mean_G < 0.3, 9.0, 0.0)[:, None], 0.05, -1, 1) <= 0.3
    assert 0.3 <= limit(lambda mean_G: np.where(mean_G > 0.3, 9.0, 0.0)[:, None], 0.05, 1, -1) < 0.3001


def test_more_draws_than_blocks_are_refused():
    with pytest.raises(BadInput, match="draw each block once"):
        wealth(Draws(np.zeros(5), 4, -1, 1), np.array(0.0))


# ---- the three outcomes


def test_intervals_cover_at_every_look():
    """The mean of all blocks lies within every interval of a whole run, but for the errors allowed."""
    rng, missed, runs, size = np.random.default_rng(2), 0, 60, 400
    for _ in range(runs):
        value_B = heavy(rng, size) + 0.1
        order_B, rule = rng.permutation(size), StoppingRule(better=-9, worthless=9, cap=size)
        found = [look(value_B[order_B[:count]], order_B, bounds(size), rule) for count in (20, 60, 150, 300, 399)]
        missed += any(one.low > 0.1 or one.high < 0.1 for one in found)
    assert missed <= runs * 0.15 + 3 * np.sqrt(runs * 0.15 * 0.85)


def test_all_blocks_drawn_leave_no_doubt():
    value_B = heavy(np.random.default_rng(4), 50) + 0.05
    found = look(value_B, np.arange(50), bounds(50), StoppingRule(worthless=0.2, alpha=1e-9, beta=1e-9))
    assert found.low == found.high == pytest.approx(0.05)
    assert (found.outcome, found.estimand) == ("not better", "mean")
    near = look(value_B[:49], np.arange(50), bounds(50), StoppingRule(worthless=0.2, alpha=1e-9, beta=1e-9))
    assert near.low <= 0.05 <= near.high
    assert near.high - near.low < 13 / 50  # one block can move the mean by no more


@pytest.mark.parametrize(("mean", "outcome"), [(0.4, "better"), (-0.2, "not better"), (0.0, "not better")])
def test_outcomes(mean, outcome):
    rng = np.random.default_rng(5)
    value_B = heavy(rng, 5000) + mean
    found = decide(lambda places: value_B[places], rng.permutation(5000), bounds(5000), RULE)
    assert found.outcome == outcome
    assert found.drawn < 2500
    assert found.low <= mean <= found.high
    assert (found.low >= 0) == (outcome == "better")  # what decided bounds the interval too
    assert (found.high < RULE.worthless) == (outcome == "not better")


def test_at_the_cap_it_stays_undecided():
    rng = np.random.default_rng(6)
    value_B = heavy(rng, 2000) + 0.1
    found = decide(lambda places: value_B[places], rng.permutation(2000), bounds(2000), RULE.model_copy(update={"cap": 50}))
    assert (found.outcome, found.drawn) == ("undecided", 50)
    assert found.low < 0 < RULE.worthless < found.high


def test_no_block_is_drawn_twice_and_batches_change_nothing():
    rng = np.random.default_rng(7)
    value_B, order_B, asked = heavy(rng, 900) + 0.3, rng.permutation(900), []
    found = decide(lambda places: asked.extend(places) or value_B[places], order_B, bounds(900), RULE)
    assert asked == list(order_B[: found.drawn])
    at_once = look(value_B[order_B[: found.drawn]], order_B, bounds(900), RULE)
    assert at_once.outcome == found.outcome
    np.testing.assert_array_equal(at_once.for_T, found.for_T)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_names_of_blocks_do_not_matter(rng_seed):
    rng = np.random.default_rng(rng_seed)
    value_B, order_B, renamed_B = heavy(rng, 80), rng.permutation(80), rng.permutation(80)
    one = look(value_B[order_B[:40]], order_B, bounds(80), RULE)
    other = look(value_B[order_B[:40]], renamed_B[order_B], bounds(80), RULE)
    assert (one.low, one.high) == (other.low, other.high)


def test_a_good_prediction_saves_draws_and_a_worthless_one_costs_few():
    drawn = {"none": [], "good": [], "noise": []}
    for rng_seed in range(8):
        rng = np.random.default_rng(rng_seed)
        known_BF = rng.standard_normal((8000, 2))
        value_B = np.clip(known_BF @ [0.8, 0.5] + 0.3 * rng.standard_normal(8000), -5, 5)
        value_B += 0.06 - value_B.mean()
        order_B = rng.permutation(8000)
        for name, feature_BF in (("none", None), ("good", known_BF), ("noise", rng.standard_normal((8000, 2)))):
            blocks = bounds(8000, feature_BF=feature_BF)
            drawn[name].append(decide(lambda places, value_B=value_B: value_B[places], order_B, blocks, StoppingRule(worthless=0.05)).drawn)
    assert np.mean(drawn["good"]) < 0.7 * np.mean(drawn["none"])
    assert np.mean(drawn["noise"]) < 1.3 * np.mean(drawn["none"])


def test_predictions_come_from_earlier_draws_alone():
    rng = np.random.default_rng(8)
    value_B, place_T = rng.standard_normal(400), np.arange(400)
    known = rng.standard_normal((400, 3)), np.ones(400), (np.full(400, -6.0), np.full(400, 6.0))
    whole, part = predict(value_B, place_T, *known), predict(value_B[:250], place_T[:250], *known)
    for one, other in zip(whole, part, strict=True):
        np.testing.assert_allclose(one[:250], other)


def test_blocks_drawn_by_the_weight_that_moves_save_draws_and_change_no_mean():
    rng, drawn = np.random.default_rng(10), {"alike": [], "by weight": []}
    for run in range(8):
        moved_B = rng.beta(0.4, 2.0, 2000)
        value_B = np.maximum(moved_B, 0.02) * (0.03 + 0.1 * rng.standard_normal(2000)).clip(-0.5, 0.5)
        endless = np.full(2000, np.inf)
        for name, share_B in (("alike", None), ("by weight", moved_B)):
            blocks = population(-endless, endless, 9000, moved_B=share_B)
            order_B = error_budget.random_order(f"{run}".encode(), 2000, blocks.scale_B)
            found = decide(lambda places, value_B=value_B: value_B[places], order_B, blocks, StoppingRule(cap=2000))
            drawn[name].append(found.drawn)
            assert found.low <= value_B.mean()
            assert found.outcome == "better"
            whole = look(value_B[order_B], order_B, blocks, StoppingRule())
            assert whole.effect == pytest.approx(value_B.mean())
            assert whole.low == whole.high == pytest.approx(value_B.mean())
    assert np.mean(drawn["by weight"]) < 0.3 * np.mean(drawn["alike"])


# ---- bounds and populations


def test_what_a_clip_does_is_said():
    rng = np.random.default_rng(9)
    value_B = 0.3 + 0.05 * rng.standard_normal(300)
    value_B[::30] = -4
    clipped = population(np.full(300, -np.inf), np.full(300, 3.0), 600, clip=0.5)
    order_B = rng.permutation(300)
    found = look(value_B[order_B[:150]], order_B, clipped, RULE)
    assert (found.outcome, found.estimand, found.share) == ("better", "clipped mean", 0.5)
    assert found.clipped > 0
    assert found.clip_effect < 0
    proven = population(np.full(300, -0.5), np.full(300, 0.4), 600, clip=0.5)
    assert (proven.proven_low, proven.proven_high) == (True, True)
    assert look(np.full(200, 0.3), np.arange(300), proven, RULE).estimand == "mean"


def test_bad_bounds_are_refused():
    with pytest.raises(BadInput, match="give a clip"):
        population(np.full(3, -np.inf), np.ones(3), 3, clip=None)
    with pytest.raises(BadInput, match="touches no block"):
        population(np.zeros(0), np.zeros(0), 3)
    with pytest.raises(BadInput, match="above its ceiling"):
        population(np.full(3, 0.2), np.full(3, 0.1), 3)
    with pytest.raises(BadInput, match="list each block once"):
        decide(lambda places: places, np.array([0, 0, 1]), bounds(3), RULE)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_an_untouched_block_differs_by_nothing_and_no_loss_is_below_the_worst(rng_seed):
    rng = np.random.default_rng(rng_seed)
    loglik_NE, block_N = -3 * rng.random((60, 3)), np.repeat(np.arange(6), 10)
    one_NE, other_NE = (rng.dirichlet(np.ones(3), 60) for _ in range(2))
    other_NE[20:] = one_NE[20:]
    difference_B = np.bincount(block_N, worst(loglik_NE, other_NE) - worst(loglik_NE, one_NE), 6)
    touched_B = find_touched(one_NE, other_NE, block_N, 6)
    assert touched_B.tolist() == [True, True, False, False, False, False]
    assert (difference_B[~touched_B] == 0).all()
    assert (worst(loglik_NE[:, :2], one_NE[:, :2]) <= worst(loglik_NE, one_NE)).all()
    assert (worst(loglik_NE[:, :0], one_NE[:, :0]) == -np.inf).all()


def test_the_mean_over_blocks_is_bits_over_bytes():
    nats_B, bytes_B = np.array([3.0, 5.0, 1.0]), np.array([10, 20, 7])
    assert per_byte(nats_B, bytes_B).mean() == pytest.approx(9 / np.log(2) / 37)


# ---- the error budget


def test_levels_add_up_to_the_budget():
    assert sum(error_budget.budget_share(n) for n in range(1, 100_000)) < 1
    assert 1 - sum(error_budget.budget_share(n) for n in range(1, 1000)) == pytest.approx(1 / np.log2(1001))
    ledger = Ledger(budget=0.1)
    for n in range(300):
        ledger = error_budget.begin(ledger, f"{n:064x}")
    assert sum(entry.level for entry in ledger.entries) < 0.1


def test_an_acceptance_earns_room_for_later_ones():
    ledger = Ledger(budget=0.1)
    begun = error_budget.begin(ledger, "0" * 64)
    lost, won = (error_budget.level(error_budget.finish(begun, 0, accepted)) for accepted in (False, True))
    assert won == pytest.approx(2 * lost)
    assert error_budget.level(begun) == lost  # undecided counts as refused


def test_worthless_submissions_are_rarely_accepted_though_all_look_at_the_same_blocks():
    rng, accepted = np.random.default_rng(10), 0
    for _ in range(20):  # projects
        ledger = Ledger(budget=0.1)
        noise_B = heavy(rng, 400)
        for n in range(25):
            order_B = error_budget.random_order(error_budget.derive_key(b"secret", f"{n}"), 400)
            path_T = wealth(Draws(noise_B[order_B], 400, -6, 6), np.array(0.0))
            ledger = error_budget.begin(ledger, f"{n:064x}")
            ledger = error_budget.finish(ledger, n, bool(draws_to_reject(path_T, ledger.entries[n].level)))
        accepted += any(entry.accepted for entry in ledger.entries)
    assert accepted <= 20 * 0.1 + 3 * np.sqrt(20 * 0.1 * 0.9)


def test_orders_are_fresh_secret_and_repeatable():
    keys = [error_budget.derive_key(secret, name) for secret, name in ((b"a", "x"), (b"a", "y"), (b"b", "x"))]
    weight_B = np.repeat([1.0, 3.0], [10, 10])
    first = np.array([error_budget.random_order(f"{n}".encode(), 20, weight_B)[0] for n in range(2000)])
    assert (first >= 10).mean() == pytest.approx(0.75, abs=0.04)
    assert sorted(error_budget.random_order(b"x", 20, weight_B)) == list(range(20))
    orders = [error_budget.random_order(key, 500) for key in keys]
    assert all(sorted(one) == list(range(500)) for one in orders)
    assert len({one.tobytes() for one in orders}) == 3
    np.testing.assert_array_equal(orders[0], error_budget.random_order(error_budget.derive_key(b"a", "x"), 500))


def test_slices_serve_and_retire():
    served = [error_budget.open_slice(error_budget.slices_key(b"a"), 100, 4, submission, uses=3) for submission in range(12)]
    assert all((one == served[3 * (n // 3)]).all() for n, one in enumerate(served))
    assert sorted(np.concatenate(served[::3])) == list(range(100))
    with pytest.raises(BadInput, match="hold out new documents"):
        error_budget.open_slice(error_budget.slices_key(b"a"), 100, 4, 12, uses=3)


def test_a_mixture_of_columns_in_half_precision_is_summed_in_double():
    rng = np.random.default_rng(11)
    loglik_NE, weight_NE = (-6 * rng.random((500, 4))).astype(np.float16), rng.dirichlet(np.ones(4), 500)
    np.testing.assert_allclose(worst(loglik_NE, weight_NE), worst(loglik_NE.astype(np.float64), weight_NE), rtol=1e-12)
