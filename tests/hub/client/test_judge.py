"""A submission is judged from its case alone: honest ones pass, each dishonest kind fails by its own check, faults are the verifier's."""

import hashlib

import numpy as np
import pytest
from small_run import changed, honest, tensors_of, with_weights

from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, Damaged
from elmwood.evaluate.sequential.error_budget import slices_key
from elmwood.hub import messages
from elmwood.hub.client.judge import FAULTS, Case, fault_of, judge
from elmwood.hub.client.verify import Fault, Limits, run_case
from elmwood.hub.messages import Gate
from elmwood.lm import probe
from elmwood.records import Ensemble, Forest
from elmwood.study.quality.scoring import Columns, holdout_spec

GATE = Gate(length=48, norm_low=0.4, norm_high=2.5)


def case(run, expert, base=None, number=0, **fields):
    key = hashlib.sha256(f"{number} {expert.digest}".encode()).hexdigest()
    trial = messages.Trial(number=number, level=0.02, key=key, slices_key=slices_key(b"secret").hex(), earlier=0)
    fields = {"trial": trial, "gate": GATE} | fields
    return Case(store=run.store.root, expert=expert.digest, base=base or run.base, **fields)


def joined(run, *experts):
    forest = run.store.add(Forest(seed=run.seed.digest, partition=run.partition.digest, experts=tuple(one.digest for one in experts)))
    return run.store.add(Ensemble(forest=forest, top_k=1, temperature=0.1, seed_distance=0.99))


def test_an_honest_expert_passes_all_checks_and_twice_the_same(run):
    found = judge(case(run, run.experts[2]))
    assert found.verdict.accepted, found.verdict.checks
    assert (found.code, found.copied_by) == (None, ())
    assert found.evidence.ensemble_gain > 0
    again = judge(case(run, run.experts[2]))
    assert again.verdict == found.verdict
    assert again.evidence == found.evidence


def test_without_its_trial_only_the_weights_are_looked_at(run):
    found = judge(case(run, run.experts[2], trial=None))
    assert not found.verdict.accepted
    assert found.code is None
    assert (found.tokens_forwarded, found.blocks) == (0, {})


def turn(rng):
    def change(name, a_RI, b_OR):
        mix_RR = rng.standard_normal((len(a_RI), len(a_RI)))
        return np.linalg.inv(mix_RR) @ a_RI, b_OR @ mix_RR

    return change


def test_what_the_weights_refuse_needs_no_trial(run):
    store, rng = run.store, np.random.default_rng(0)
    copy = changed(run.experts[0], store, turn(rng))
    noisy = changed(run.experts[0], store, lambda name, a, b: (a, b + 0.1 * np.abs(b).mean() * rng.standard_normal(b.shape)))
    zero = changed(run.experts[2], store, lambda name, a, b: (a, 0 * b))
    broken = changed(run.experts[2], store, lambda name, a, b: (np.full_like(a, np.nan), b))
    for expert, code in ((copy, "duplicate"), (noisy, "duplicate"), (zero, "not-novel"), (broken, "not-finite")):
        found = judge(case(run, expert))
        assert (found.code, found.tokens_forwarded) == (code, 0)
        assert not found.verdict.accepted


def test_a_blend_is_refused_by_its_novelty(run):
    store = run.store
    one, other = (tensors_of(expert, store) for expert in run.experts[:2])
    # of the same rank: the best of rank 4 of the mean of the two deltas, as one would send it
    made = {}
    for name in one:
        if "lora_A" in name:
            b = name.replace("lora_A", "lora_B")
            u, s, v = np.linalg.svd((one[b] @ one[name] + other[b] @ other[name]) / 2, full_matrices=False)
            made[b], made[name] = (u[:, :4] * s[:4]).astype(np.float32), np.ascontiguousarray(v[:4], np.float32)
    found = judge(case(run, with_weights(run.experts[2], store, made)))
    assert found.code in ("duplicate", "not-novel")


def test_the_earliest_commitment_wins(run):
    """A was committed to first and judged last: a copy of it that was accepted meanwhile does not count against it, and is named."""
    original = run.experts[2]
    copy = changed(original, run.store, turn(np.random.default_rng(3)))
    base = joined(run, *run.experts[:2], copy)
    assert judge(case(run, original, base)).code == "duplicate"
    found = judge(case(run, original, base, later=(copy.digest,)))
    assert found.copied_by == (copy.digest,)
    assert found.code != "duplicate"


@pytest.mark.parametrize("times", [4.0, 0.1])
def test_a_length_far_from_the_others_is_refused(run, times):
    base = joined(run, *run.experts[:2], honest(run.store, run.seed, run.partition, 0, rng_seed=9))
    scaled = changed(run.experts[2], run.store, lambda name, a, b: (a, times * b))
    found = judge(case(run, scaled, base))
    assert (found.code, found.tokens_forwarded) == ("norm", 0)
    assert judge(case(run, run.experts[2], base)).code is None


def test_five_steps_of_twenty_five_are_refused_for_their_gain(run):
    short = honest(run.store, run.seed, run.partition, 2, steps=1, learning_rate=1e-5)
    found = judge(case(run, short))
    assert found.code in ("no-gain", "no-ensemble-gain")
    assert found.tokens_forwarded > 0


def test_one_that_was_trained_backwards_is_refused(run):
    backwards = changed(run.experts[2], run.store, lambda name, a, b: (a, -b))
    assert judge(case(run, backwards)).code == "no-gain"


def test_finite_weights_that_give_no_finite_score_are_refused(run):
    huge = changed(run.experts[2], run.store, lambda name, a, b: (a * 1e18, b * 1e18))
    found = judge(case(run, huge))
    assert found.code == "not-finite-scores"
    assert not found.verdict.accepted


def test_scores_that_are_not_finite_in_some_blocks_alone_are_refused(run):
    """H3: attention of the first layer overflows on some text, and is finite on the rest; those blocks are not left out."""
    held = Columns(holdout_spec(run.partition, run.seed, 48, None), run.store, stay=True).held
    rows_WL, low, high = np.asarray(held.windows.rows_WL)[:100], 18.0, 19.0

    def scaled(power):
        def scale(name, a, b):
            return a, b * (10.0**power if "layers.0" in name and ("q_proj" in name or "k_proj" in name) else 1)

        return changed(run.experts[2], run.store, scale)

    for _ in range(12):
        power = (low + high) / 2
        share = 1 - np.isfinite(np.asarray(open_model(scaled(power), run.store).score(rows_WL))).all(1).mean()
        low, high = (power, high) if share < 0.2 else (low, power)
        if 0.2 <= share <= 0.8:
            break
    assert 0.2 <= share <= 0.8
    found = judge(case(run, scaled(power)))
    assert (found.code, found.verdict.accepted) == ("not-finite-scores", False)


def test_one_that_does_not_say_what_its_record_has_is_refused(run):
    said = run.experts[2].probe
    assert len(said) == 32
    short, other = (run.experts[2].model_copy(update={"probe": one}) for one in (said[:1], tuple(number + 1 for number in said)))
    run.store.add(other)
    with pytest.raises(BadInput, match="32 are compared"):
        probe.check(short, run.store)
    found = judge(case(run, other, joined(run, other)))
    assert (found.code, found.verdict.accepted) == ("other-probe", False)
    assert [check.name for check in found.verdict.checks if not check.passed] == ["it says what its record has"]


def test_the_first_expert_joins_a_forest_of_itself(run):
    found = judge(case(run, run.experts[2], joined(run, run.experts[2])))
    assert found.verdict.accepted


def test_the_noise_floor_is_far_below_the_least_effect(run):
    found = judge(case(run, run.experts[2], noise=4))
    assert 0 <= found.noise_floor < GATE.policy.min_effect / 3


def test_in_a_process_of_its_own_with_limits(run, tmp_path):
    found = run_case(case(run, run.experts[2]), tmp_path, Limits())
    assert found.verdict.checks[:3] == judge(case(run, run.experts[2])).verdict.checks[:3]  # there blocks are of 2 KiB
    assert found.tokens_forwarded > 0
    with pytest.raises(Fault) as caught:
        run_case(case(run, run.experts[2], memory=200 << 20), tmp_path, Limits())
    assert caught.value.code in ("out-of-memory", "killed"), str(caught.value)  # C++ aborts where it gets none
    with pytest.raises(Fault) as caught:
        run_case(case(run, run.experts[2]), tmp_path, Limits(seconds=0))
    assert caught.value.code == "time"


def test_faults_have_codes_of_the_verifier():
    errors = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError(28, "No space left"), Damaged("x")]
    errors += [BadInput("all 3 slices are retired"), KeyError("x")]
    assert [FAULTS[fault_of(error)] for error in errors] == [
        "out-of-memory", "out-of-memory", "disk-full", "damaged", "slices-retired", "error",
    ]  # fmt: skip
