"""Experts trained together: each is what it would be alone, killed or not, and clips by itself."""

import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import GPT2, LLAMA, MODELS, OPT, packed_of, tiny

from elmwood.corpus.tokens import Packed
from elmwood.errors import BadInput, Damaged
from elmwood.lm import probe
from elmwood.records import Corpus, Recipe, Shard
from elmwood.train import loop
from elmwood.train import together as room
from elmwood.train.adapter import add_adapter
from elmwood.train.loss import find_abilities, loss
from elmwood.train.tasks import train
from elmwood.train.together import Stack, expert_losses, together_keys, train_together

LORA = Recipe(method="lora", rank=4, steps=8, batch=2, length=32, learning_rate=1e-2)


def halves(corpus: Corpus) -> list[tuple[Shard, ...]]:
    """Two texts: all there is, and the documents nobody trains on."""
    return [corpus.train, corpus.holdout]


def texts(count: int) -> list[Packed]:
    """Packed documents of several lengths; the tokens of text n begin with n."""
    found = []
    for number in range(count):
        packed = packed_of(*[7 + number] * (9 + number))
        found.append(packed._replace(tokens=(packed.tokens * (number + 2)) % 64))
    return found


def weights(model) -> list[torch.Tensor]:
    return [weight for weight in model.parameters() if weight.requires_grad]


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("change", [{}, {"accumulate": 2, "batch": 3, "checkpointing": True}])
def test_each_is_what_it_would_be_alone(kind, change, tmp_path):
    recipe = LORA.model_copy(update={"steps": 4, "length": 20, **change})
    group = add_adapter(tiny(kind, **MODELS[kind]), recipe, "base")
    stack, trained = room.run(group, texts(3), recipe, tmp_path, lambda *_, **__: None)
    for number, packed in enumerate(texts(3)):
        one = add_adapter(tiny(kind, **MODELS[kind]), recipe, "base")
        (tmp_path / str(number)).mkdir()
        alone = loop.run(one, packed, recipe, tmp_path / str(number), lambda **_: None)
        stack.put(number)
        assert [point.loss for point in trained[number].curve] == pytest.approx([point.loss for point in alone.curve], rel=1e-5)
        for mine, its in zip(weights(group), weights(one), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "sizes"), [("llama", LLAMA), ("gpt2", GPT2), ("opt", OPT)])
def test_gradients_of_each_are_those_of_its_own_rows(kind, sizes):
    group, one = (add_adapter(tiny(kind, **sizes), LORA, "base") for _ in range(2))
    stack, able = Stack(group, 3), find_abilities(one)
    torch.manual_seed(0)
    with torch.no_grad():
        stack.flat_EP += torch.randn_like(stack.flat_EP) * 0.1
    tokens, targets = torch.randint(0, 64, (6, 16)), torch.randint(0, 64, (6, 16))
    expert_losses(group, able, tokens, targets, None, 3).sum().backward()
    for number in range(3):
        stack.put(number)
        with torch.no_grad():
            for mine, its in zip(stack.weights, weights(one), strict=True):
                its.copy_(mine)
        one.zero_grad()
        rows = slice(2 * number, 2 * number + 2)
        loss(one, able, tokens[rows], targets[rows], None).backward()
        mine_P = stack.flat_EP.grad[number]
        its_P = torch.cat([weight.grad.flatten() for weight in weights(one)])
        torch.testing.assert_close(mine_P, its_P, rtol=1e-4, atol=1e-6)


# ---- the task ---------------------------------------------------------------------------------------------------


def test_a_group_is_trained_once_and_each_is_an_expert_of_its_own(case):
    store, corpus, seed = case
    found = train_together(seed, halves(corpus), LORA, store, domains=[3, 5])
    assert [expert.domain for expert in found] == [3, 5]
    assert {expert.recipe.together for expert in found} == {2}
    assert train_together(seed, halves(corpus), LORA, store, domains=[3, 5], progress=None) == found  # type: ignore[arg-type]  # not called
    assert {path.name for path in (store.root / "work").glob("*/*")} <= {"tokenizer.json"}
    for shards, expert in zip(halves(corpus), found, strict=True):
        alone = train(seed, shards, LORA, store, domain=expert.domain)
        assert sorted(alone.files) == sorted(expert.files)
        assert expert.probe == pytest.approx(alone.probe, abs=0.03)
        probe.check(expert, store)
        mine, its = (load_file(store.get(one.files["adapter_model.safetensors"])) for one in (expert, alone))
        assert mine.keys() == its.keys()
        for name, weight in mine.items():
            torch.testing.assert_close(weight, its[name], rtol=1e-3, atol=1e-4)


def test_the_group_is_part_of_the_name(case):
    _, corpus, seed = case
    pair = together_keys(seed, halves(corpus), LORA, None, [0, 1])
    assert len({*pair, *together_keys(seed, halves(corpus)[:1], LORA, None, [0])}) == 3


@pytest.mark.parametrize("change", [{"method": "dora"}, {"method": "full"}, {"patience": 2}, {"optimiser": "adamw8bit"}, {"length": 65}])
def test_what_cannot_be_together_is_refused(case, change):
    store, corpus, seed = case
    with pytest.raises(BadInput):
        train_together(seed, halves(corpus), LORA.model_copy(update=change), store)


SCRIPT = """
import os, signal, sys
from elmwood.records import Corpus, Recipe, Seed
from elmwood.store import Store
from elmwood.train import loop
from elmwood.train.together import train_together
loop.EVERY, loop.SHARE = 0.0, 1e9  # save after every step
store, recipe = Store(sys.argv[1]), Recipe.model_validate_json(sys.argv[2])
def progress(what, done, total, unit):
    if what.startswith("train on ") and done >= total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
corpus = store.load("corpus", Corpus)
train_together(store.load("seed", Seed), [corpus.train, corpus.holdout], recipe, store, progress=progress)
"""


def test_killed_and_resumed_gives_the_same_bytes(case, fresh, forked, tmp_path):
    store, corpus, seed = case
    whole = train_together(seed, halves(corpus), LORA, store)
    other, *_ = fresh
    for blob in (shard.blob for shard in corpus.holdout):
        other.put(store.get(blob))
    assert forked(SCRIPT, str(other.root), LORA.model_dump_json(), cwd=tmp_path).returncode == -signal.SIGKILL
    assert len(list(other.root.glob("work/*/together.safetensors"))) == 1
    steps: list[float] = []
    told = lambda what, done, *_: steps.append(done) if what.startswith("train on ") else None  # noqa: E731
    assert train_together(seed, halves(corpus), LORA, other, progress=told) == whole
    assert 0 < len(steps) < LORA.steps
    assert all(other.get(blob).read_bytes() == store.get(blob).read_bytes() for one in whole for blob in one.files.values())


def test_a_damaged_state_says_what_to_delete(tmp_path):
    (tmp_path / room.FILE).write_bytes(b"\x10" * 100)
    with pytest.raises(Damaged, match="delete it"):
        room.run(add_adapter(tiny("llama", **LLAMA), LORA, "base"), texts(2), LORA, tmp_path, lambda *_, **__: None)
