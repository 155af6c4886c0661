"""Merges: the laws of the sums, each rule against its formula in float64, and checkpoints that other tools open."""

import math
import os
import random
import shutil
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import config_seed, full_expert, leave_statistics, lora_expert, tiny_seed
from transformers import AutoModelForCausalLM, LlamaConfig

from elmwood.errors import BadInput, ForeignExpert, UnknownName
from elmwood.lm.load import load_model
from elmwood.merge.checkpoint import Answer, finalize, merge
from elmwood.merge.layer_weights import everywhere, weight_of
from elmwood.merge.rules.base import Local
from elmwood.merge.rules.elementwise import cut, voted
from elmwood.merge.rules.table import RULES
from elmwood.merge.states import add, remove, state
from elmwood.merge.sums import kth as kth_module
from elmwood.records import Expert, Recipe, Share
from elmwood.store import Store
from elmwood.weights import exact, kernels
from elmwood.weights.tensors import Files, Reader, decode, encode, places


@pytest.fixture(scope="module")
def forest(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    seed = tiny_seed(store)
    experts = [full_expert(seed, store, n) for n in range(3)] + [lora_expert(seed, store, n) for n in range(2)]
    for place, expert in enumerate(experts):
        leave_statistics(expert, seed, store, place)
    return store, seed, experts


def fitting(method, experts):
    """As many experts as a rule takes."""
    return experts[2:4] if method in ("slerp", "nuslerp") else experts


def equally(experts, weight=1.0):
    return {expert.digest: everywhere(weight) for expert in experts}


def weights_of(record, store) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in load_file(store.get(record.files["model.safetensors"])).items()}


def deltas_of(seed, experts, store) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The seed's tensors and each expert's deltas in float64; an adapter's by its own factors."""
    base = weights_of(seed, store)
    found = []
    for expert in sorted(experts, key=lambda one: one.digest):
        if expert.recipe.method == "full":
            mine = weights_of(expert, store)
            found.append({name: mine[name] - base[name] for name in base})
            continue
        factors = {n: v.double().numpy() for n, v in load_file(store.get(expert.files["adapter_model.safetensors"])).items()}
        delta = {name: np.zeros_like(value) for name, value in base.items()}
        for key, a in factors.items():
            if ".lora_A." in key:
                name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                delta[name] = factors[key.replace("lora_A", "lora_B")] @ a * 2  # alpha 8, rank 4
        found.append(delta)
    return base, found


# ---- sums


@given(st.lists(st.floats(-900, 900), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_sums_have_the_same_bits_in_any_order_and_addends_come_out_again(values, shuffle):
    def total(order, minus=()):
        total_N = np.zeros(1, np.int64)
        for sign, one in [*((1.0, v) for v in order), *((-1.0, v) for v in minus)]:
            exact.add(total_N, np.array([one]), sign)
        return int(total_N[0])

    other = random.Random(shuffle).sample(values, len(values))
    assert total(values) == total(other)
    assert total(values, minus=values[:1]) == total(values[1:])
    assert abs(total(values) * exact.LSB - np.sum(values)) < 1e-12 * max(1, len(values))


@pytest.mark.parametrize("weights", [[1.0] * 300, [0.3, 2.0, 0.3, 0.7] * 4, [100.0, 1.0, -0.5]])
def test_a_ballot_is_four_sums(weights):
    """Many votes, weights that change, numbers beyond the quick way of rounding."""
    rng, numbers = np.random.default_rng(len(weights)), 50
    total_4N, plain_4N = np.zeros((4, numbers), np.int64), np.zeros((4, numbers), np.int64)
    for weight in weights:
        part_N = rng.standard_normal(numbers) * (rng.random(numbers) < 0.6) * weight
        exact.vote(total_4N, part_N, weight)
        for total_N, each_N in zip(plain_4N, voted(part_N, weight), strict=True):
            exact.add(total_N, each_N)
    assert np.array_equal(total_4N, plain_4N)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_compiled_loops_give_the_bits_of_their_formulas(dtype):
    """Held against numpy, or whole numbers of any size: nothing is contracted or put in another order."""
    rng, numbers = np.random.default_rng(5), 999
    part_N = (rng.standard_normal(numbers) * 10.0 ** rng.integers(-12, 2, numbers)).astype(dtype)
    start_N = rng.integers(-(2**61), 2**61, numbers) >> rng.integers(0, 60, numbers)
    exact.add(total_N := start_N.copy(), part_N, 0.3)
    wanted = [round(Fraction(float(np.float64(one) * 0.3)) * 2**44) for one in part_N]
    assert (total_N - start_N).tolist() == wanted
    bits_N = encode(part_N.astype(np.float64), "BF16").view(np.uint16)
    for weight in (0.3, 30.0):  # and where the quick way of rounding ends
        exact.add(left_N := start_N.copy(), bits_N, weight)
        exact.add(right_N := start_N.copy(), decode(bits_N.view(np.uint8), "BF16"), weight)
        assert np.array_equal(left_N, right_N)
    assert np.array_equal(exact.value(total_N), total_N.astype(np.float64) * exact.LSB)
    assert exact.reach(part_N) == float(np.abs(part_N).max())
    for bad in (np.nan, np.inf, -np.inf):
        assert not exact.reach(np.append(part_N, dtype(bad))) < np.inf
    magnitude_N, inside_N = np.abs(part_N), np.empty(numbers + 1)
    above, inside = kernels.window(magnitude_N, 1e-6, 1e-3, inside_N)
    kept_N = (magnitude_N >= 1e-6) & (magnitude_N < 1e-3)
    assert above == (magnitude_N >= 1e-3).sum()
    assert np.array_equal(inside_N[:inside], magnitude_N[kept_N])
    (trimmed_N,) = cut(part_N.astype(np.float64), 0.3, Local(1e-6, 1e-3), {})
    assert np.array_equal(trimmed_N, part_N.astype(np.float64) * 0.3 * kept_N)


@given(st.integers(0, 999), st.integers(-1, 1100), st.sampled_from([0, 3, 12]), st.sampled_from([0, 20, 1000]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_threshold_is_the_number_at_its_rank(rng_seed, rank, digits, sampled):
    """In pieces, more of them than may wait; of few values or many; with a sample that helps, misleads, or is not there."""
    rng = np.random.default_rng(rng_seed)
    magnitude_N = np.abs(np.round(rng.standard_normal(1000), digits))
    with patch.object(kth_module, "WAITING", 64):
        kth = kth_module.Kth(1000, rank, rng.choice(magnitude_N, sampled) if sampled else None)
        for _ in range(5):
            for piece_N in np.split(magnitude_N, 10):
                kth.push(piece_N)
            kth.settle()
    assert kth.found == (np.inf if rank <= 0 else 0.0 if rank >= 1000 else np.sort(magnitude_N)[::-1][rank - 1])


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_wide_sums_keep_small_beside_large(values, shuffle):
    def total(order):
        sums = [sum(int(part[0]) for part in side) for side in zip(*(exact.wide(np.array([one])) for one in order), strict=True)]
        return sums, float(exact.wide_value(*(np.array([side]) for side in sums))[0])

    assert total(values) == total(random.Random(shuffle).sample(values, len(values)))
    assert total([1e-12, *values, *(-one for one in values)])[1] == pytest.approx(1e-12, abs=2**-64)
    assert abs(total(values)[1] - math.fsum(values)) <= 2**-60 * len(values) + 2**-51 * abs(math.fsum(values))


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_inner_products_are_good_to_the_largest_product(pairs):
    x_N, y_N = np.array(pairs).T
    largest = np.abs(x_N).max() * np.abs(y_N).max()
    assert abs(exact.inner(x_N, y_N) - math.fsum(x * y for x, y in pairs)) <= len(pairs) * largest * 2**-44 + 1e-280


def test_what_cannot_be_added_is_refused():
    for bad in (np.inf, np.nan, 1e9):
        with pytest.raises(BadInput):
            exact.add(np.zeros(1, np.int64), np.array([bad]))
    with pytest.raises(BadInput, match="fewer experts"):
        exact.check_room(exact.ROOM)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64, min_value=-1e30, max_value=1e30), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_bf16_is_the_nearest(values):
    value_N = np.array(values)
    got_N = decode(encode(value_N, "BF16"), "BF16").astype(np.float64)
    bits_N = encode(value_N, "BF16").view(np.uint16)
    for step in (-1, 1):
        other_N = decode((bits_N + np.uint16(step % 65536)).view(np.uint8), "BF16").astype(np.float64)
        assert all(abs(g - v) <= abs(o - v) or not np.isfinite(o) for g, o, v in zip(got_N, other_N, value_N, strict=True))


def test_bf16_remembers_the_side_of_the_middle():
    middle = 1 + 2.0**-8  # between 1 and 1 + 2^-7
    near_N = np.array([middle, middle + 2.0**-40, middle - 2.0**-40, -middle - 2.0**-40])
    assert decode(encode(near_N, "BF16"), "BF16").tolist() == [1, 1 + 2.0**-7, 1, -1 - 2.0**-7]
    single_N = np.random.default_rng(1).integers(0, 0x7F800000, 9999).astype(np.uint32).view(np.float32)  # of any size
    single_N = np.concatenate([single_N, -single_N, near_N.astype(np.float32)])
    assert np.array_equal(encode(single_N, "BF16"), encode(single_N.astype(np.float64), "BF16"))


# ---- rules against their formulas


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_read_past_the_cache_is_the_same_bytes(cached, tmp_path):
    """Parts that begin and end anywhere, of tensors that stand where no page begins, and the last byte of the file."""
    path, chance = tmp_path / "model.safetensors", np.random.default_rng(0)
    tensors = {name: torch.from_numpy(chance.standard_normal(size)).float() for name, size in (("a", 5001), ("b", 1), ("c", 300_000))}
    save_file(tensors | {"d": torch.arange(7, dtype=torch.bfloat16)}, path)
    if not cached:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found, files = places([path]), Files()
    ends = {name: sorted({0, one.numbers, *chance.integers(0, one.numbers + 1, 4).tolist()}) for name, one in found.items()}
    requests = [(found[name], *span) for name, cuts in ends.items() for span in pairwise(cuts)]
    with Reader(4 * 300_000) as reader:
        for step, raws in zip([requests, requests[::-1]], reader.stream([requests, requests[::-1]]), strict=True):
            kept = [raw.copy() for raw in raws]
            past = not reader.cached[path]
            assert not (cached and past)
            for request, raw in zip(step, kept, strict=True):
                np.testing.assert_array_equal(raw, files.read(*request))


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


# ---- states


@pytest.mark.parametrize("method", sorted(RULES))
def test_any_tree_of_states_ends_in_the_same_bytes_as_one_merge(forest, method):
    store, seed, experts = forest
    experts = fitting(method, experts)
    (whole,) = merge(seed, equally(experts), [Answer(method, {})], store)
    chance = random.Random(method)
    for _ in range(3):
        heap = [state(seed, equally([expert]), method, {}, store) for expert in experts]
        while len(heap) > 1:
            chance.shuffle(heap)
            heap.append(add(heap.pop(), heap.pop(), store))
        assert finalize(heap, {}, store).files == whole.files


@pytest.mark.parametrize("method", ["ties", "model_stock"])
@given(chance=st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_random_trees_of_states_have_one_digest(forest, method, chance):
    """`benches/peers/rules.py trees` does a hundred for each rule."""
    store, seed, experts = forest
    experts = fitting(method, experts)
    wanted = state(seed, equally(experts), method, {}, store)
    heap = [state(seed, equally([expert]), method, {}, store) for expert in experts]
    while len(heap) > 1:
        chance.shuffle(heap)
        heap.append(add(heap.pop(), heap.pop(), store))
    assert heap[0].digest == wanted.digest


@pytest.mark.parametrize("method", sorted(RULES))
def test_what_is_added_can_be_removed_and_what_is_there_is_not_added_again(forest, method):
    store, seed, experts = forest
    before = state(seed, equally(experts[:3]), method, {}, store)
    late = state(seed, equally(experts[3:4]), method, {}, store)
    both = add(before, late, store)
    assert add(both, late, store) == both
    assert remove(both, experts[3].digest, store).digest == before.digest
    with pytest.raises(BadInput, match="each holds others"):
        add(both, state(seed, equally(experts[3:5]), method, {}, store), store)
    with pytest.raises(BadInput, match="not in this state"):
        remove(before, experts[4].digest, store)


def test_parts_make_the_whole(forest):
    store, seed, experts = forest
    (whole,) = merge(seed, equally(experts), [Answer("ties", {})], store)
    parts = [state(seed, equally(experts), "ties", {}, store, part=(i, 3)) for i in range(3)]
    assert finalize(parts, {}, store).files["model.safetensors"] == whole.files["model.safetensors"]
    with pytest.raises(BadInput, match="each of them once"):
        finalize(parts[:2], {}, store)


def test_scale_changes_at_the_end_and_density_does_not(forest):
    store, seed, experts = forest
    held = state(seed, equally(experts), "ties", {}, store)
    (wanted,) = merge(seed, equally(experts), [Answer("ties", {"scale": 0.4})], store)
    assert finalize([held], {"scale": 0.4}, store).files == wanted.files
    with pytest.raises(BadInput, match="density"):
        finalize([held], {"density": 0.4}, store)


# ---- weights


def test_weights_by_depth_and_name(forest):
    store, seed, experts = forest
    shares = (Share(tensors="norm", values=(0.0,)), Share(values=(1.0, 0.0)))
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(3)]
    assert [weight_of(shares, name, 3) for name in names] == [1.0, 0.5, 0.0]
    assert weight_of(shares, "model.embed_tokens.weight", 3) == 1.0
    assert weight_of((Share(layers=(1, 2), values=(1.0,)),), names[0], 3) == 0.0
    (record,) = merge(seed, {one.digest: shares for one in experts[:2]}, [Answer("task_arithmetic", {})], store)
    got, base = weights_of(record, store), weights_of(seed, store)
    assert np.array_equal(got["model.norm.weight"], base["model.norm.weight"])
    last, first = (f"model.layers.{n}.mlp.up_proj.weight" for n in (1, 0))
    assert np.array_equal(got[last], base[last])
    assert not np.array_equal(got[first], base[first])


# ---- what comes out, and what is refused


def test_a_merge_opens_in_transformers(forest):
    store, seed, experts = forest
    (record,) = merge(seed, equally(experts), [Answer("average", {})], store)
    folder = store.folder(record.files)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.isfinite(model(torch.tensor([[0, 1, 2]])).logits).all()
    card = (folder / "README.md").read_text()
    assert all(expert.digest in card for expert in experts)
    assert seed.digest in card
    assert merge(seed, equally(experts), [Answer("average", {})], store)[0].digest == record.digest


def test_bf16_seeds_stay_bf16(tmp_path):
    store = Store(tmp_path)
    seed = tiny_seed(store)
    half = _in_bf16(seed, store)
    experts = [_in_bf16(full_expert(seed, store, n), store, seed=half.digest) for n in range(3)]
    (record,) = merge(half, equally(experts), [Answer("average", {})], store)
    made = load_file(store.get(record.files["model.safetensors"]))
    for name, value in made.items():
        assert value.dtype == torch.bfloat16
        mean = sum(load_file(store.get(one.files["model.safetensors"]))[name].double() for one in experts) / 3
        assert (value.double() - mean).abs().max() <= mean.abs().max() * 2**-8


def _in_bf16(record, store, **changes):
    weights = {name: value.bfloat16() for name, value in load_file(store.get(record.files["model.safetensors"])).items()}
    path = Path(store.root) / "half.safetensors"
    save_file(weights, path, {"format": "pt"})
    made = record.model_copy(update={"files": record.files | {"model.safetensors": store.put(path)}, **changes})
    store.add(made)
    return made


def test_nonsense_is_refused(forest, tmp_path):
    store, seed, experts = forest
    with pytest.raises(BadInput, match="two experts"):
        merge(seed, equally(experts[:1]), [Answer("average", {})], store)
    with pytest.raises(UnknownName, match="no merge rule"):
        merge(seed, equally(experts), [Answer("magic", {})], store)
    with pytest.raises(BadInput, match="no setting"):
        merge(seed, equally(experts), [Answer("average", {"density": 0.5})], store)
    other = tiny_seed(store, rng_seed=5)
    with pytest.raises(ForeignExpert, match="one seed"):
        merge(other, equally(experts), [Answer("average", {})], store)
    weights = load_file(store.get(experts[0].files["model.safetensors"]))
    name = "model.layers.0.mlp.up_proj.weight"
    broken = {
        "diverged": weights | {name: torch.full_like(weights[name], torch.nan)},
        "architecture": weights | {name: weights[name].T.contiguous()},
        "lacks": {key: value for key, value in weights.items() if key != name},
    }
    for words, bad in broken.items():
        save_file(bad, tmp_path / "bad.safetensors", {"format": "pt"})
        files = experts[0].files | {"model.safetensors": store.put(tmp_path / "bad.safetensors")}
        stranger = Expert(seed=seed.digest, data=(), recipe=Recipe(method="full", steps=1), files=files)
        store.add(stranger)
        for method in ("average", "ties"):
            with pytest.raises((BadInput, ForeignExpert), match=words):
                merge(seed, equally([experts[1], stranger]), [Answer(method, {})], store)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_even_where_nothing_is_trimmed_or_added(bad, forest, tmp_path):
    store, seed, experts = forest
    weights = load_file(store.get(experts[0].files["model.safetensors"]))
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = bad
    save_file(weights, tmp_path / "bad.safetensors", {"format": "pt"})
    files = experts[0].files | {"model.safetensors": store.put(tmp_path / "bad.safetensors")}
    stranger = Expert(seed=seed.digest, data=(), recipe=Recipe(method="full", steps=1), files=files)
    store.add(stranger)
    whole = {"density": 1.0}
    for answer in [Answer("average", {}), Answer("ties", whole), Answer("breadcrumbs", whole), Answer("dare", whole)]:
        with pytest.raises(BadInput, match="diverged"):
            merge(seed, equally([experts[1], stranger]), [answer], store)
    with pytest.raises(BadInput, match="diverged"):
        merge(seed, equally([experts[1], experts[2]]) | equally([stranger], 0.0), [Answer("average", {})], store)


def test_other_vocabularies_are_refused_or_resized(forest, tmp_path):
    store, seed, experts = forest
    weights = load_file(store.get(experts[0].files["model.safetensors"]))
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:300].contiguous()
    save_file(weights, tmp_path / "short.safetensors", {"format": "pt"})
    files = {"model.safetensors": store.put(tmp_path / "short.safetensors")}
    short = Expert(seed=seed.digest, data=(), recipe=Recipe(method="full", steps=1), files=files)
    store.add(short)
    with pytest.raises(BadInput, match="--resize"):
        merge(seed, equally([experts[1], short]), [Answer("average", {})], store)
    (record,) = merge(seed, equally([experts[1], short]), [Answer("average", {})], store, resize=True)
    base, one = weights_of(seed, store)[name], weights_of(experts[1], store)[name]
    np.testing.assert_array_equal(weights_of(record, store)[name][300:], ((base + one) / 2)[300:].astype(np.float32))


def test_an_adapter_merges_like_the_checkpoint_it_stands_for(forest, tmp_path):
    store, seed, experts = forest
    adapter = experts[3]
    folded = load_model(seed, store, adapter, device="cpu").merge_and_unload()
    folded.save_pretrained(tmp_path)
    full = Expert(seed=seed.digest, data=(), recipe=Recipe(method="full", steps=1), files=store.put_folder(tmp_path))
    store.add(full)
    one, other = (weights_of(merge(seed, equally([experts[0], e]), [Answer("average", {})], store)[0], store) for e in (adapter, full))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)


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


def test_an_adapter_for_other_modules_is_refused(forest):
    """Modules the seed does not have, or has in another shape: the adapter of a wider seed, and one of another layout."""
    store, seed, experts = forest
    wide = config_seed(LlamaConfig(hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=320), store)
    deep = config_seed(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=320), store)
    for other in (wide, deep):
        stranger = lora_expert(other, store, 0).model_copy(update={"seed": seed.digest})
        store.add(stranger)
        with pytest.raises(ForeignExpert, match="grew on another"):
            merge(seed, equally([experts[0], stranger]), [Answer("average", {})], store)


def test_settings_and_experts_that_do_not_go_together_are_refused(forest):
    store, seed, experts = forest
    with pytest.raises(BadInput, match="between two"):
        merge(seed, equally(experts), [Answer("slerp", {})], store)
    with pytest.raises(BadInput, match="reach 1"):
        merge(seed, equally(experts), [Answer("della", {"density": 0.95})], store)
    one, other = (state(seed, equally([expert]), "fisher", {}, store) for expert in experts[:2])
    both = add(one, other, store)
    leave_statistics(experts[0], seed, store, 77, rows=99)
    with pytest.raises(BadInput, match="other statistics"):
        remove(both, experts[0].digest, store)
    twin = Expert(**(experts[0].model_dump() | {"contributor": "nobody"}))
    store.add(twin)
    with pytest.raises(BadInput, match="left no statistics"):
        merge(seed, equally([experts[1], twin]), [Answer("regmean", {})], store)


@pytest.mark.parametrize("method", ["della_ties", "wudi", "sce", "regmean"])
def test_tensors_that_are_summed_whole_are_shared_out_too(forest, method):
    store, seed, experts = forest
    (whole,) = merge(seed, equally(experts), [Answer(method, {})], store)
    parts = [state(seed, equally(experts), method, {}, store, part=(i, 3)) for i in range(3)]
    assert finalize(parts, {}, store).files["model.safetensors"] == whole.files["model.safetensors"]


def test_several_rules_from_one_reading_are_those_of_one_each(forest):
    store, seed, experts = forest
    answers = [Answer(method, {}) for method in ("average", "ties", "sce", "karcher", "regmean", "tsv", "iso_c")]
    members = equally(experts, 0.5)
    together = merge(seed, members, answers, store)
    shutil.rmtree(store.root / "refs" / "done")  # so that each is done again
    for answer, record in zip(answers, together, strict=True):
        (alone,) = merge(seed, members, [answer], store)
        assert alone.files["model.safetensors"] == record.files["model.safetensors"]
