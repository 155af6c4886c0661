"""The loss, and what a model allows."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import LLAMA, MODELS, packed_of, tiny
from torch.nn.functional import cross_entropy

from elmwood.records import Recipe
from elmwood.train.data import UNSCORED, batches
from elmwood.train.loss import Abilities, ChunkedLoss, find_abilities, loss


@pytest.mark.parametrize("frozen", [False, True])
@given(positions=st.integers(1, 700), vocabulary=st.integers(2, 5000), rng_seed=st.integers(0, 9))
@settings(max_examples=12, deadline=None)
def test_chunked_loss_is_cross_entropy(frozen, positions, vocabulary, rng_seed):
    torch.manual_seed(rng_seed)
    hidden, head = torch.randn(positions, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=not frozen)
    target = torch.randint(0, vocabulary, (positions,))
    target[torch.rand(positions) < 0.3] = UNSCORED
    target[0] = 0
    wanted = [hidden] if frozen else [hidden, head]
    ours = ChunkedLoss.apply(hidden * 1, head, target)
    theirs = cross_entropy((hidden * 1) @ head.t(), target, ignore_index=UNSCORED)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, two in zip(torch.autograd.grad(ours * 3, wanted), torch.autograd.grad(theirs * 3, wanted), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_loss_of_nothing_scored_is_nothing():
    hidden = torch.randn(4, 8, requires_grad=True)
    value = ChunkedLoss.apply(hidden, torch.randn(5, 8), torch.full((4,), UNSCORED))
    assert value.item() == 0
    assert not torch.autograd.grad(value, hidden)[0].any()


@pytest.mark.parametrize("way", ["mask", "positions"])
def test_both_ways_of_keeping_documents_apart_agree(way):
    model = tiny("llama", **LLAMA)
    tokens, targets, positions = map(torch.from_numpy, next(batches(packed_of(*[7] * 9), Recipe(steps=1, batch=2, length=20))))
    with torch.no_grad():
        ours = loss(model, Abilities(way, True), tokens, targets, positions)
    torch.testing.assert_close(ours, documents_alone(model, tokens, targets, positions), rtol=1e-5, atol=1e-5)


ALLOWED = {
    "llama": Abilities("mask", True),
    "qwen3": Abilities("mask", True),
    "gemma2": Abilities("positions", False),  # windows, capped logits
    "gpt2": Abilities("mask", True),
    "opt": Abilities("mask", True),
    "bloom": Abilities("no", True),  # positions by ALiBi alone
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_what_a_model_allows_is_found_out_and_true(kind):
    model = tiny(kind, **MODELS[kind])
    able = find_abilities(model)
    packed = packed_of(*[11] * 6)
    packed = packed._replace(tokens=packed.tokens % 64)
    batch = next(batches(packed, Recipe(steps=1, batch=2, length=30)))
    tokens, targets, positions = map(torch.from_numpy, batch)
    with torch.no_grad():
        ours = loss(model, able, tokens, targets, positions)
        if able.packed != "no":
            alone = documents_alone(model, tokens, targets, positions)
            torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(ours, cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED))
    assert able == ALLOWED[kind]


def documents_alone(model, tokens, targets, positions) -> torch.Tensor:
    """The loss of rows whose documents are given one at a time."""
    total, scored = torch.zeros(()), 0
    for row in range(len(tokens)):
        begins = [*torch.nonzero(positions[row] == 0).flatten().tolist(), tokens.shape[1]]
        for first, last in pairwise(begins):
            logits = model(tokens[row : row + 1, first:last]).logits[0]
            total += cross_entropy(logits, targets[row, first:last], ignore_index=UNSCORED, reduction="sum")
            scored += int((targets[row, first:last] != UNSCORED).sum())
    return total / scored
