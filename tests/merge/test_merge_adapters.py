"""LoRA experts merged to one LoRA: against the dense sum, against PEFT, and as models."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import full_expert, lora_expert, tiny_seed

from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput, UnknownName
from elmwood.lm.load import load_model
from elmwood.merge.adapters import (
    LOW_RULES,
    distance,
    flatten_cores,
    merge_adapters,
    merged_pair,
    norm,
    orthogonalise_cores,
    sum_cores,
    vote_cores,
)
from elmwood.merge.layer_weights import everywhere
from elmwood.store import Store, lineage

TOKENS = [[0, 5, 9, 33, 71, 2, 5, 8]]
FEW = {"target_modules": ["q_proj", "down_proj"], "r": 2, "lora_alpha": 3, "use_rslora": True}


@pytest.fixture(scope="module")
def forest(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    seed = tiny_seed(store)
    return store, seed, [lora_expert(seed, store, n) for n in range(3)] + [lora_expert(seed, store, 3, settings=FEW)]


def weighted(experts, *weights):
    return {expert.digest: everywhere(weight) for expert, weight in zip(experts, weights, strict=True)}


def deltas(files, store) -> dict[str, np.ndarray]:
    """What an adapter adds to each layer, as PEFT's documentation says: scale * B A."""
    said = json.loads(store.get(files["adapter_config.json"]).read_text())
    factors = {name: value.double().numpy() for name, value in load_file(store.get(files["adapter_model.safetensors"])).items()}
    found = {}
    for key, a in factors.items():
        if ".lora_A." in key:
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = said["alpha_pattern"].get(layer, said["lora_alpha"])
            found[layer] = factors[key.replace("lora_A", "lora_B")] @ a * alpha / (len(a) ** 0.5 if said["use_rslora"] else len(a))
    return found


def exact(experts, weights, store) -> dict[str, np.ndarray]:
    total = {}
    for expert, weight in zip(experts, weights, strict=True):
        for layer, delta in deltas(expert.files, store).items():
            total[layer] = total.get(layer, 0) + weight * delta
    return total


# ---- one layer


def some_pairs(chance, experts, ranks=(1, 2, 3)):
    """Layers of experts of differing rank, 9 inputs and 7 outputs: together they may span more than there is."""
    return [(chance.normal(size=(7, r)), chance.normal(size=(r, 9))) for r in chance.choice(ranks, experts)]


@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(1, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_factors_of_a_sum_are_the_best_of_their_rank(rng_seed, experts, rank):
    chance = np.random.default_rng(rng_seed)
    pairs, weight_E = some_pairs(chance, experts), chance.normal(size=experts).tolist()
    dense = sum(weight * b @ a for weight, (b, a) in zip(weight_E, pairs, strict=True))
    b, a = merged_pair(pairs, weight_E, LOW_RULES["concat"], {"scale": -0.5, "normalise": 0.0})
    np.testing.assert_allclose(b @ a, -0.5 * dense, atol=1e-12)
    u, s, v = np.linalg.svd(-0.5 * dense, full_matrices=False)
    b, a = merged_pair(pairs, weight_E, LOW_RULES["svd"], {"scale": -0.5, "normalise": 0.0, "rank": rank})
    assert a.shape[0] <= rank
    np.testing.assert_allclose(b @ a, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-9)
    assert norm((b, a)) == pytest.approx(np.linalg.norm(b @ a))
    assert distance((b, a), (u * s, v)) == pytest.approx(np.linalg.norm(s[rank:]), abs=1e-9)


def test_rules_in_the_core_are_their_dense_formulas():
    chance = np.random.default_rng(0)
    pairs = [(chance.normal(size=(20, 2)), chance.normal(size=(2, 30))) for _ in range(3)]
    plain = {"scale": 1.0, "normalise": 0.0, "rank": 0.0}
    dense = [b @ a for b, a in pairs]
    found = [np.linalg.svd(delta, full_matrices=False) for delta in dense]  # TSV: each keeps rank / experts, here all it has
    u, s, v = (np.concatenate([getattr(one, part)[cut] for one in found], axis) for part, cut, axis in
               (("U", np.s_[:, :2], 1), ("S", np.s_[:2], 0), ("Vh", np.s_[:2], 0)))  # fmt: skip
    polar = [x @ z for x, _, z in (np.linalg.svd(one, full_matrices=False) for one in (u, v))]
    b, a = merged_pair(pairs, [1.0] * 3, LOW_RULES["core_space"], plain)
    np.testing.assert_allclose(b @ a, (polar[0] * s) @ polar[1], atol=1e-10)
    x, y, z = np.linalg.svd(sum(dense), full_matrices=False)
    b, a = merged_pair(pairs, [1.0] * 3, LOW_RULES["core_space_iso"], plain)
    np.testing.assert_allclose(b @ a, y[:6].mean() * x[:, :6] @ z[:6], atol=1e-10)
    cores = [np.array([[3.0, -1.0]]), np.array([[1.0, 2.0]]), np.array([[-2.0, 4.0]])]
    np.testing.assert_allclose(vote_cores(cores, [1.0, 1.0, 1.0], {"density": 0.5}), [[3.0, 3.0]])
    for rule in (sum_cores, flatten_cores, orthogonalise_cores):
        assert np.allclose(rule(iter(cores), [1.0, 1.0, 1.0], {}), rule(iter(cores[::-1]), [1.0, 1.0, 1.0], {}))


# ---- whole adapters


@pytest.mark.parametrize("method", sorted(LOW_RULES))
def test_an_adapter_of_adapters_opens_here_and_in_peft_and_says_how_far_it_is(forest, method, tmp_path):
    store, seed, experts = forest
    (record,) = merge_adapters(seed, weighted(experts, 1.0, 0.5, -0.3, 2.0), [(method, {"scale": 0.4})], store)
    ours, wanted = deltas(record.files, store), exact(experts, [0.4, 0.2, -0.12, 0.8], store)
    off = sum(np.linalg.norm(ours[layer] - wanted[layer]) ** 2 for layer in wanted) ** 0.5
    assert ours.keys() == wanted.keys()
    assert record.error == pytest.approx(off / sum(np.linalg.norm(delta) ** 2 for delta in wanted.values()) ** 0.5, rel=1e-3, abs=1e-7)
    assert record.error < 1e-6 or method not in ("concat", "svd")
    lm = open_model(record, store)
    peft = PeftModel.from_pretrained(load_model(seed, store, device="cpu"), store.folder(record.files)).eval()
    with torch.inference_mode():
        logp_TV = peft(torch.tensor(TOKENS)).logits[0].log_softmax(-1)
    theirs_T = logp_TV[:-1].gather(1, torch.tensor(TOKENS[0][1:])[:, None])[:, 0]
    torch.testing.assert_close(lm.score(TOKENS)[0, 1:], theirs_T, atol=1e-4, rtol=1e-4)
    text = (store.folder(record.files) / "README.md").read_text()
    assert all(one.digest in text for one in (seed, *experts))
    assert f"`{method}` ({LOW_RULES[method].paper})" in text
    assert f"{record.error:.6g}" in text
    assert {one.digest for _, one in lineage(store, store.add(record))} >= {seed.digest, *(expert.digest for expert in experts)}


def test_the_exact_sum_is_peft_s_cat_and_not_its_linear(forest):
    """PEFT's `linear` sums A and B each for itself: A1 B2 and A2 B1 come in, and the sum of products is missed."""
    store, seed, experts = forest
    mine = exact(experts[:3], [1.0, 0.5, 0.25], store)
    model = PeftModel.from_pretrained(load_model(seed, store, device="cpu"), store.folder(experts[0].files), adapter_name="0")
    for number in (1, 2):
        model.load_adapter(store.folder(experts[number].files), str(number))
    off = {}
    for kind in ("cat", "linear"):
        model.add_weighted_adapter(["0", "1", "2"], [1.0, 0.5, 0.25], kind, combination_type=kind)
        off2 = all2 = 0.0
        for name, module in model.base_model.model.named_modules():
            if name in mine:
                theirs = module.get_delta_weight(kind).double().numpy()
                off2, all2 = off2 + np.linalg.norm(theirs - mine[name]) ** 2, all2 + np.linalg.norm(mine[name]) ** 2
        off[kind] = (off2 / all2) ** 0.5
    (record,) = merge_adapters(seed, weighted(experts[:3], 1.0, 0.5, 0.25), [("concat", {})], store)
    assert off["cat"] < 1e-6
    assert record.error < 1e-7
    assert off["linear"] > 0.5


def test_one_reading_makes_what_many_make_in_any_order(forest):
    store, seed, experts = forest
    asked = [("concat", {}), ("svd", {"rank": 2.0}), ("core_space", {"rank": 3.0, "scale": 0.5})]
    together = merge_adapters(seed, weighted(experts, 1.0, 1.0, 1.0, 1.0), asked, store)
    other = Store(store.root.parent / "other")
    for one in (seed, *experts):
        for digest in one.files.values():
            other.put(store.get(digest))
        other.add(one)
    for answer, record in zip(asked, together, strict=True):
        assert merge_adapters(seed, weighted(experts[::-1], 1.0, 1.0, 1.0, 1.0), [answer], other) == [record]
    half = merge_adapters(seed, weighted(experts[:2], 1.0, 3.0), [("concat", {"normalise": 1.0})], store)[0]
    for layer, delta in exact(experts[:2], [0.25, 0.75], store).items():
        np.testing.assert_allclose(deltas(half.files, store)[layer], delta, atol=1e-6)


def test_nonsense_is_refused(forest):
    store, seed, experts = forest
    full = full_expert(seed, store, 9)
    for members, answer, kind, words in (
        (weighted(experts[:1], 1.0), ("concat", {}), BadInput, "two experts"),
        (weighted([experts[0], full], 1.0, 1.0), ("svd", {}), BadInput, "full checkpoint"),
        (weighted(experts[:2], 1.0, 1.0), ("linear", {}), UnknownName, "no rule 'linear'"),
        (weighted(experts[:2], 1.0, 1.0), ("concat", {"rank": 4.0}), BadInput, "no setting 'rank'"),
        (weighted(experts[:2], 1.0, 1.0), ("svd", {"rank": 1.5}), BadInput, "an integer"),
    ):
        with pytest.raises(kind, match=words):
            merge_adapters(seed, members, [answer], store)
