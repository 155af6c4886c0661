"""Acceptance: each check on its own, and copies found whatever they are dressed in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmwood.evaluate.admission import Evidence, Policy, cosine, judge_evidence, novelty
from elmwood.records import Verdict, canonical, parse
from elmwood.weights.similarity import Factors, gram, inner

GOOD = Evidence(
    expert="a" * 64, own_low=0.05, ensemble_low=0.001, ensemble_wealth=6.0, domain_low={"sea": 0.0, "code": -0.001}, cosine=0.2,
    novelty=0.95, public_gain=0.06, secret_gain=0.05, finite=True, level=0.01,
)  # fmt: skip


def delta(rng, rank=3):
    return {name: Factors(rng.standard_normal((8, rank)), rng.standard_normal((rank, 6))) for name in ("up", "down")}


def dense(one):
    return np.concatenate([(one[name].b_OR @ one[name].a_RI).ravel() for name in sorted(one)])


def against(one, others):
    gram_EE = gram(others)
    own, with_E = inner(one, one), np.array([inner(one, other) for other in others])
    return cosine(own, with_E, gram_EE), novelty(own, with_E, gram_EE)


def failed(**changes):
    verdict = judge_evidence(GOOD.model_copy(update=changes), Policy())
    assert verdict.accepted == all(check.passed for check in verdict.checks)
    return [check.name.split(":")[0].split(",")[0].split(";")[0] for check in verdict.checks if not check.passed]


def test_a_good_expert_is_accepted_and_the_verdict_is_a_record():
    verdict = judge_evidence(GOOD, Policy())
    assert verdict.accepted
    assert parse(canonical(verdict)) == verdict
    assert isinstance(verdict, Verdict)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"own_low": 0.0009}, "better than the seed on its own domain"),  # surely better, and by too little
        ({"ensemble_low": -0.0001}, "ensemble better with it than without"),
        ({"ensemble_wealth": 4.0}, "evidence for that"),
        ({"level": 0.0}, "evidence for that"),
        ({"domain_low": {"sea": 0.1, "code": -0.02}}, "no domain harmed"),
        ({"domain_low": {}}, "no domain harmed"),
        ({"cosine": 0.93}, "not a copy"),
        ({"novelty": 0.01}, "not a blend"),
        ({"public_gain": 0.12}, "gain on public over gain on secret text"),
        ({"secret_gain": 0.0}, "gain on public over gain on secret text"),
        ({"finite": False}, "weights are finite"),
    ],
)
def test_each_check_can_fail_alone(changes, name):
    assert failed(**changes) == [name]


@pytest.mark.parametrize("field", ["own_low", "ensemble_low", "cosine", "novelty", "public_gain", "ensemble_wealth", "level"])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_what_was_not_measured_has_failed(field, value):
    assert len(failed(**{field: value})) == 1


def test_the_worst_domain_is_named():
    names = [check.name for check in judge_evidence(GOOD, Policy()).checks]
    assert any("worst is code" in name for name in names)


# ---- copies and blends


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_inner_products_are_those_of_the_products(rng_seed):
    rng = np.random.default_rng(rng_seed)
    one, other = delta(rng, 2), delta(rng, 5)
    assert inner(one, other) == pytest.approx(dense(one) @ dense(other))
    np.testing.assert_allclose(gram([one, other]), [[a @ b for b in (dense(one), dense(other))] for a in (dense(one), dense(other))])


def test_a_copy_in_another_basis_is_a_copy():
    rng = np.random.default_rng(0)
    others = [delta(rng) for _ in range(4)]
    turned = {name: Factors(2 * b_OR @ (turn := rng.standard_normal((3, 3))), np.linalg.inv(turn) @ a_RI)
              for name, (b_OR, a_RI) in others[2].items()}  # fmt: skip
    assert against(turned, others) == pytest.approx((1, 0), abs=1e-9)


def test_a_blend_is_near_none_and_inside_the_span_of_all():
    rng = np.random.default_rng(1)
    others = [delta(rng) for _ in range(4)]
    blend = {
        name: Factors(np.hstack([one[name].b_OR for one in others]), np.vstack([one[name].a_RI for one in others])) for name in others[0]
    }
    near, new = against(blend, others)
    assert near < 0.85
    assert new == pytest.approx(0, abs=1e-9)


def test_an_expert_of_its_own_is_new():
    rng = np.random.default_rng(2)
    near, new = against(delta(rng), [delta(rng) for _ in range(4)])
    assert near < 0.5
    assert new > 0.5
    assert against(delta(rng), []) == (0, 1)


def test_copies_among_the_accepted_and_deltas_of_nothing_do_no_harm():
    rng = np.random.default_rng(3)
    one, other = delta(rng), delta(rng)
    nothing = {name: Factors(np.zeros((8, 1)), np.zeros((1, 6))) for name in one}
    np.testing.assert_allclose(against(one, [other, other, nothing]), against(one, [other]))
    assert against(nothing, [one]) == (0, 0)


def test_experts_of_other_modules_share_nothing():
    rng = np.random.default_rng(4)
    one = delta(rng)
    assert inner({"up": one["up"]}, {"down": one["down"]}) == 0
