"""Statistics that experts leave, and the rules and estimates that use them."""

import json

import numpy as np
import pytest
import torch
from tiny_models import WORDS, full_expert, tiny_seed

from elmwood.corpus.build import build
from elmwood.corpus.tokens import pack
from elmwood.errors import BadInput
from elmwood.lm.load import load_model, tokenizer
from elmwood.merge.statistics import opened
from elmwood.records import Recipe, Statistics
from elmwood.store import Store
from elmwood.train import statistics, train
from elmwood.train.data import batches

ROWS = 3


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A store with a seed, and two experts of it with their statistics: a full one and an adapter."""
    folder = tmp_path_factory.mktemp("grown")
    store = Store(folder / "store")
    texts = [" ".join(np.random.default_rng(n).choice(WORDS.split(), 60)) for n in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = build([str(folder / "text.jsonl")], store)
    seed = tiny_seed(store)
    recipes = [Recipe(steps=3, length=32, batch=2), Recipe(method="lora", rank=4, learning_rate=0.05, steps=3, length=32, batch=2)]
    experts = [train(seed, corpus.train, recipe, store, device="cpu") for recipe in recipes]
    for expert in experts:
        statistics(expert, store, rows=ROWS, device="cpu")
    return store, seed, corpus, experts


def test_statistics_are_what_their_words_say(grown):
    """Gram matrices from the layers' inputs and squared gradients from autograd, both worked out another way."""
    store, seed, corpus, experts = grown
    for expert in experts:
        held = opened(expert.digest, store)
        model = load_model(seed, store, expert, "cpu", torch.float32)
        model = model.merge_and_unload() if expert.recipe.method == "lora" else model
        model.requires_grad_(True)
        packed = pack(corpus.train, tokenizer(seed, store), seed.separator, store)
        recipe = expert.recipe.model_copy(update={"batch": 1, "rng_seed": expert.recipe.rng_seed + 1})
        name, read = "model.layers.1.mlp.down_proj.weight", []
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, inputs, read=read: read.append(inputs[0].detach())
        )
        squares = 0.0
        for _, batch in zip(range(ROWS), batches(packed, recipe), strict=False):
            tokens, targets, positions = (torch.from_numpy(part) for part in batch)
            begun = torch.arange(positions.shape[1]) - positions[0]
            apart = (begun[:, None] != begun[None, :]) | torch.ones(len(begun), len(begun)).triu(1).bool()
            mask = torch.zeros(len(begun), len(begun)).masked_fill(apart, -torch.inf)[None, None]
            logits = model(input_ids=tokens, position_ids=positions, attention_mask=mask).logits
            model.zero_grad()
            torch.nn.functional.cross_entropy(logits[0], targets[0]).backward()
            squares = squares + model.get_parameter(name).grad.double().square() / ROWS
        x_TI = torch.cat(read).flatten(0, 1).double().numpy()
        np.testing.assert_allclose(held.gram(name), x_TI.T @ x_TI / len(x_TI), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(held.fisher(name) * held.record.fisher, squares.numpy(), rtol=1e-3, atol=1e-9)
        assert np.array_equal(held.gram(name.replace("down", "up")), held.gram(name.replace("down", "gate")))
        assert held.gram("model.norm.weight") is None


def test_wide_layers_leave_a_sketch_with_the_exact_diagonal(grown, monkeypatch):
    store, _, _, (expert, _) = grown
    exact = opened(expert.digest, store).gram(name := "model.layers.0.mlp.down_proj.weight")
    monkeypatch.setattr("elmwood.train.moments.WIDE", 40)
    monkeypatch.setattr("elmwood.train.moments.DIRECTIONS", 20)
    record = statistics(expert, store, rows=ROWS + 1, device="cpu")  # another number of rows is another record
    assert isinstance(record, Statistics)
    again = opened(expert.digest, store)
    assert again.record.rows == ROWS + 1
    sketch = again.gram(name)
    assert np.linalg.eigvalsh(sketch).min() > -1e-6
    assert np.linalg.norm(sketch - exact) < 0.3 * np.linalg.norm(exact)


def test_an_expert_without_text_or_statistics_says_so(grown):
    store, seed, _, _ = grown
    stranger = full_expert(seed, store, 9)
    with pytest.raises(BadInput, match="names no text"):
        statistics(stranger, store)
    with pytest.raises(BadInput, match="elmwood statistics"):
        opened(stranger.digest, store)
