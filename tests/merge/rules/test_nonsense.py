"""Weights, settings and values that make no sense: refused with a cure before anything is stored, or taken at their word."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_merges import deltas_of, equally, fitting, weights_of

from elmwood.errors import BadInput
from elmwood.merge.adapters import merge_adapters
from elmwood.merge.checkpoint import Answer, finalize, merge
from elmwood.merge.export.folder import export
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.moe.build import Mixing, mix
from elmwood.merge.moe.gates import random_rows
from elmwood.merge.rules.table import RULES
from elmwood.merge.states import seed_places, state
from elmwood.records import Expert, Forest, Recipe
from elmwood.study import merging, mixing

SIGNED = {"average", "task_arithmetic", "dare", "breadcrumbs", "della", "iso_c", "tsv"}
NAMES = ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")


def weighted(experts, *weights):
    return {expert.digest: everywhere(weight) for expert, weight in zip(experts, weights, strict=True)}


@pytest.mark.parametrize("method", sorted(RULES))
def test_a_weight_below_zero_subtracts_or_is_refused(forest, method):
    store, seed, experts = forest
    members = weighted(fitting(method, experts)[:2], 2.0, -1.0)
    if method in SIGNED:
        merge(seed, members, [Answer(method, {})], store)
        return
    with pytest.raises(BadInput, match="task_arithmetic, which adds and subtracts"):
        merge(seed, members, [Answer(method, {})], store)
    held = state(seed, members, method, {}, store)
    with pytest.raises(BadInput, match="task_arithmetic, which adds and subtracts"):
        finalize([held], {}, store)


def test_signed_weights_are_those_of_the_formula(forest):
    """Against float64: a subtracted expert moves the result away from it."""
    store, seed, experts = forest
    pair = sorted(experts[:2], key=lambda one: one.digest)
    base, (one, other) = deltas_of(seed, pair, store)
    for weights in ((2.0, -1.0), (1.0, -1.0), (-1.0, -1.0)):
        answers = [Answer("task_arithmetic", {}), Answer("ties", {"density": 0.4, "normalise": 0}), Answer("average", {"normalise": 0})]
        plain, ties, summed = merge(seed, weighted(pair, *weights), answers, store)
        assert plain.files["model.safetensors"] == summed.files["model.safetensors"]
        for name in NAMES:
            sides = [weight * delta[name] for weight, delta in zip(weights, (one, other), strict=True)]
            np.testing.assert_allclose(weights_of(plain, store)[name], base[name] + sum(sides), rtol=1e-6, atol=1e-7)
            kept = np.stack([
                np.where(np.abs(side) >= np.sort(np.abs(side).ravel())[::-1][int(0.4 * side.size) - 1] * (1 - 1e-7), side, 0)
                for side in sides
            ])  # fmt: skip
            wanted = base[name] + (kept * (np.sign(kept) == np.where(kept.sum(0) >= 0, 1, -1))).sum(0)
            np.testing.assert_allclose(weights_of(ties, store)[name], wanted, rtol=1e-6, atol=1e-7)


def test_means_over_weights_that_add_up_to_nothing_are_refused(forest):
    store, seed, experts = forest
    with pytest.raises(BadInput, match="add up to 0"):
        merge(seed, weighted(experts[:2], 1.0, -1.0), [Answer("average", {})], store)
    with pytest.raises(BadInput, match="add up to 0"):
        finalize([state(seed, weighted(experts[:2], 1.0, -1.0), "average", {}, store)], {}, store)
    with pytest.raises(BadInput, match="add up to 0"):
        merge_adapters(seed, weighted(experts[3:], 1.0, -1.0), [("concat", {"normalise": 1.0})], store)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_and_settings_are_finite(forest, bad):
    store, seed, experts = forest
    with pytest.raises(BadInput, match="finite"):
        merge(seed, weighted(experts[:2], 1.0, bad), [Answer("average", {})], store)
    with pytest.raises(BadInput, match="finite"):
        state(seed, weighted(experts[:1], bad), "average", {}, store)
    with pytest.raises(BadInput, match="finite"):
        merge_adapters(seed, weighted(experts[3:], 1.0, bad), [("svd", {})], store)
    for method, rule in RULES.items():
        for name in (*rule.begins, *rule.ends):
            with pytest.raises(BadInput, match=f"{name.replace('_', '-')} is .*finite"):
                merge(seed, equally(fitting(method, experts)), [Answer(method, {name: bad})], store)


@pytest.fixture(scope="module")
def half(forest):
    """The seed and two experts in float16, the experts with deltas near the end of its range."""
    store, seed, experts = forest

    def in_half(record, factor, **changes):
        weights = {name: value.half() for name, value in load_file(store.get(record.files["model.safetensors"])).items()}
        weights[NAMES[1]] = weights[NAMES[1]].sign() * factor
        save_file(weights, path := store.root / "half.safetensors", {"format": "pt"})
        made = record.model_copy(update={"files": record.files | {"model.safetensors": store.put(path)}, **changes})
        store.add(made)
        return made

    start = in_half(seed, 1.0)
    return start, [in_half(one, 40_000.0, seed=start.digest) for one in experts[:2]]


def test_what_overflows_a_dtype_is_refused(forest, half, tmp_path):
    store, _, experts = forest
    seed, pair = half
    (fits,) = merge(seed, equally(pair), [Answer("average", {})], store)
    assert torch.isfinite(load_file(store.get(fits.files["model.safetensors"]))[NAMES[1]]).all()
    for method in ("task_arithmetic", "wudi"):  # in pieces, and whole
        with pytest.raises(BadInput, match=f"{NAMES[1]} would contain a value of magnitude .* F16 ends"):
            merge(seed, equally(pair), [Answer(method, {"scale": 4.0})], store)
    adapter = loud(experts[3], seed, store)
    with pytest.raises(BadInput, match="F16 ends"):
        export(adapter, store, tmp_path / "out", "transformers")
    forest_of = Forest(seed=seed.digest, partition="0" * 64, experts=(adapter.digest, pair[0].digest))
    store.add(forest_of)
    rows = random_rows(seed_places(seed, store), ["a", "b"], 0, 1.0)
    with pytest.raises(BadInput, match="F16 ends"):
        mix(forest_of, rows, Mixing(method="seed"), store)


def loud(expert, seed, store):
    """An adapter whose products are beyond float16."""
    factors = {name: value * 3e3 for name, value in load_file(store.get(expert.files["adapter_model.safetensors"])).items()}
    save_file(factors, path := store.root / "loud.safetensors")
    files = expert.files | {"adapter_model.safetensors": store.put(path)}
    made = expert.model_copy(update={"files": files, "seed": seed.digest})
    store.add(made)
    return made


def test_a_seed_that_is_not_finite_is_not_merged(forest):
    store, seed, experts = forest
    weights = load_file(store.get(seed.files["model.safetensors"]))
    weights[NAMES[1]][3, 5] = torch.nan
    save_file(weights, path := store.root / "bad.safetensors", {"format": "pt"})
    broken = seed.model_copy(update={"files": seed.files | {"model.safetensors": store.put(path)}})
    store.add(broken)
    pair = []
    for one in experts[:2]:
        pair.append(Expert(seed=broken.digest, data=(), recipe=Recipe(method="full", steps=1), files=one.files))
        store.add(pair[-1])
    for method in ("task_arithmetic", "ties", "karcher"):
        with pytest.raises(BadInput, match=NAMES[1]):
            merge(broken, equally(pair), [Answer(method, {})], store)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"layers": range(99, 100)}, "has 2 layers, 0 to 1"),
        ({"tensors": "nothing-like-it"}, "no tensor of the seed"),
        ({"parts": 0}, "parts is 0: choose 1 or more"),
        ({"parts": -1}, "parts is -1: choose 1 or more"),
        ({"run": 0}, "run is 0: choose 1 or more"),
        ({"documents": 3}, "documents is 3: choose 4 or more"),
    ],
)
def test_options_that_would_merge_nothing_are_refused(forest, options, complaint):
    store, _, experts = forest
    with pytest.raises(BadInput, match=complaint):
        merging.merge(experts[:2], store, **options)
    if {"layers", "tensors"} & options.keys():
        with pytest.raises(BadInput, match=complaint):
            merging.state_make(experts[:1], store, **options)


def test_a_mixture_has_gates_for_at_least_one_expert(forest):
    store, _, _ = forest
    for options, complaint in (({"top_k": 0}, "top-k is 0"), ({"rng_seed": -1}, "rng-seed is -1")):
        with pytest.raises(BadInput, match=complaint):
            mixing.mix("no-forest", store, **options)
