"""Each merge rule against its formula in float64."""

import shutil

import numpy as np
import pytest
from tiny_merges import deltas_of, equally, weights_of

from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.rules.spherical import average_directions, find_karcher_mean, follow_arc
from elmwood.merge.rules.table import RULES
from elmwood.records import Expert


def test_average_and_task_arithmetic(forest):
    store, seed, experts = forest
    base, deltas = deltas_of(seed, experts, store)
    average, task = merge(seed, equally(experts), [Answer("average", {}), Answer("task_arithmetic", {"scale": 0.3})], store)
    for record, factor in ((average, 1 / 5), (task, 0.3)):
        got = weights_of(record, store)
        for name, value in base.items():
            wanted = value + factor * sum(delta[name] for delta in deltas)
            half_ulp = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.float64) / 2
            assert (np.abs(got[name] - wanted) <= half_ulp + 1e-12).all(), name


@pytest.mark.parametrize("across", [0.0, 1.0])
def test_ties(forest, across):
    store, seed, experts = forest
    base, deltas = deltas_of(seed, experts, store)
    (record,) = merge(seed, equally(experts), [Answer("ties", {"density": 0.3, "across": across, "scale": 0.8})], store)
    got = weights_of(record, store)
    everything = [np.concatenate([np.abs(delta[name]).ravel() for name in base]) for delta in deltas]
    for name, value in base.items():
        kept = []
        for delta, whole in zip(deltas, everything, strict=True):
            pool = whole if across else np.abs(delta[name]).ravel()
            cut = np.sort(pool)[::-1][int(0.3 * pool.size) - 1]
            kept.append(np.where(np.abs(delta[name]) >= cut * (1 - 1e-7), delta[name], 0))
        tau = np.stack(kept)
        side = np.where(tau.sum(0) >= 0, 1, -1)
        agree = np.sign(tau) == side
        wanted = value + 0.8 * (tau * agree).sum(0) / np.maximum(agree.sum(0), 1)
        np.testing.assert_allclose(got[name], wanted, rtol=1e-6, atol=1e-8)


def test_dare_is_drawn_by_what_it_is_for_and_keeps_the_mean(forest):
    store, seed, experts = forest
    full = experts[:2]
    one, again, other = (merge(seed, equally(full), [Answer("dare", {"density": 0.5, "rng_seed": s})], store)[0] for s in (1.0, 1.0, 2.0))
    assert one.digest == again.digest
    assert one.files["model.safetensors"] != other.files["model.safetensors"]
    base, deltas = deltas_of(seed, full, store)
    name = "model.embed_tokens.weight"
    drawn = weights_of(one, store)[name] - base[name]
    assert abs(drawn.mean() - sum(delta[name] for delta in deltas).mean()) < 0.01
    untouched = (np.abs(drawn) < 1e-7).mean()  # both left it out
    assert 0.2 < untouched < 0.3


def test_breadcrumbs_leaves_out_both_ends(forest):
    store, seed, experts = forest
    (record,) = merge(seed, equally(experts[:2]), [Answer("breadcrumbs", {"density": 0.5, "gamma": 0.1})], store)
    base, deltas = deltas_of(seed, experts[:2], store)
    name = "model.embed_tokens.weight"
    total = 0
    for delta in deltas:
        falling = np.sort(np.abs(delta[name]).astype(np.float32).ravel())[::-1]
        low, high = falling[int(0.6 * falling.size) - 1], falling[int(0.1 * falling.size) - 1]
        magnitude = np.abs(delta[name]).astype(np.float32)
        total = total + np.where((magnitude >= low) & (magnitude < high), delta[name], 0)
    np.testing.assert_allclose(weights_of(record, store)[name], base[name] + total, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["average", "ties", "dare_ties"])
def test_copies_of_one_expert_merge_to_it(forest, method):
    store, seed, experts = forest
    one = experts[0]
    twin = Expert(**(one.model_dump() | {"contributor": "twin"}))
    store.add(twin)
    density = {} if method == "average" else {"density": 1.0}
    (record,) = merge(seed, equally([one, twin]), [Answer(method, density)], store)
    got, wanted = weights_of(record, store), weights_of(one, store)
    assert all(np.array_equal(got[name], wanted[name]) for name in wanted)


def test_what_no_adapter_changes_stays_the_seed_s_under_every_rule(forest):
    store, seed, experts = forest
    base, deltas = deltas_of(seed, experts[3:], store)
    untouched = [name for name in base if not any(delta[name].any() for delta in deltas)]
    assert "model.embed_tokens.weight" in untouched
    made = merge(seed, equally(experts[3:]), [Answer(method, {}) for method in RULES], store)
    for method, one in zip(RULES, made, strict=True):
        got = weights_of(one, store)
        for name in untouched:
            np.testing.assert_allclose(got[name], base[name], atol=1e-12, err_msg=f"{method} {name}")
        changed = sum(np.abs(got[name] - base[name]).sum() for name in base)
        assert 0 < changed < 9 * sum(np.abs(delta[name]).sum() for delta in deltas for name in base), method


def test_several_rules_from_one_reading_are_those_of_one_each(forest):
    store, seed, experts = forest
    answers = [Answer(method, {}) for method in ("average", "ties", "sce", "karcher", "regmean", "tsv", "iso_c")]
    members = equally(experts, 0.5)
    together = merge(seed, members, answers, store)
    shutil.rmtree(store.root / "refs" / "done")  # so that each is done again
    for answer, record in zip(answers, together, strict=True):
        (alone,) = merge(seed, members, [answer], store)
        assert alone.files["model.safetensors"] == record.files["model.safetensors"]


# what mergekit 0.1.5 makes of these vectors, one of which is of an expert that leaves a tensor alone
A, B, ZERO = (3.0, 4.0), (0.0, 5.0), (0.0, 0.0)
WITH_ZERO = [
    (follow_arc, (A, ZERO), (1, 3), (1.1481, 1.5307)),
    (follow_arc, (ZERO, A), (1, 3), (2.7716, 3.6955)),
    (average_directions, (A, ZERO), (1, 1), (1.5, 2.0)),
    (average_directions, (A, B, ZERO), (1, 3, 4), (0.3899, 2.4694)),
    (find_karcher_mean, (A, ZERO), (1, 3), (0.75, 1.0)),
    (find_karcher_mean, (A, B, ZERO), (1, 1, 2), (0.7906, 2.3717)),
]


@pytest.mark.parametrize(("rule", "points", "weights", "wanted"), WITH_ZERO)
def test_an_expert_that_leaves_a_tensor_alone_counts_on_spheres_as_in_mergekit(rule, points, weights, wanted):
    point_ED = np.array(points)
    settings = {"straight": 1.0, "iterations": 100, "tolerance": 1e-14}
    got_D = rule(point_ED @ point_ED.T, np.array(weights, float), settings) @ point_ED
    np.testing.assert_allclose(got_D, wanted, atol=1e-4)
