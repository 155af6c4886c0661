"""Merges as values: states add, subtract and come in parts, and end in the same bytes as one merge."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_merges import equally, fitting

from elmwood.errors import BadInput
from elmwood.merge.checkpoint import Answer, finalize, merge
from elmwood.merge.rules.table import RULES
from elmwood.merge.states import add, remove, state


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


@pytest.mark.parametrize("method", ["della_ties", "wudi", "sce", "regmean"])
def test_tensors_that_are_summed_whole_are_shared_out_too(forest, method):
    store, seed, experts = forest
    (whole,) = merge(seed, equally(experts), [Answer(method, {})], store)
    parts = [state(seed, equally(experts), method, {}, store, part=(i, 3)) for i in range(3)]
    assert finalize(parts, {}, store).files["model.safetensors"] == whole.files["model.safetensors"]
