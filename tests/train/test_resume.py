"""Interrupted runs resume to the same bytes."""

import signal
from pathlib import Path

import pytest
import torch
from tiny_training import FULL, GPT2, LORA, SEED_RECIPE, SHAPE, packed_of, tiny

from elmwood.errors import Damaged, DoesNotFit
from elmwood.lm.load import new_model
from elmwood.records import Recipe
from elmwood.train import checkpoint, loop
from elmwood.train.tasks import train, train_seed

SCRIPT = """
import os, signal, sys
from elmwood.records import Corpus, Recipe, Seed
from elmwood.store import Store
from elmwood.train import loop, checkpoint
from elmwood.train.tasks import train
loop.EVERY, loop.SHARE = 0.0, 1e9  # save after every step
store, recipe, how = Store(sys.argv[1]), Recipe.model_validate_json(sys.argv[2]), sys.argv[3]
def die(): os.kill(os.getpid(), signal.SIGKILL)
def progress(what, done, total, unit):
    if how == "between" and what.startswith("train on ") and done >= total / 2:
        die()
if how == "saving":
    whole, calls = checkpoint.save_file, []
    def torn(tensors, path, metadata):
        calls.append(whole(tensors, path, metadata))
        if len(calls) == 7:
            os.truncate(path, 1000)
            die()
    checkpoint.save_file = torn
train(store.load("seed", Seed), store.load("corpus", Corpus).train, recipe, store, progress=progress)
"""

STOPPED = Recipe(method="lora", rank=64, steps=12, batch=4, length=32, learning_rate=0.05, patience=4, optimiser="adamw8bit", accumulate=2)

OTHERS = [(LORA.model_copy(update={"method": method}), "between") for method in ("qlora", "dora")]


@pytest.mark.parametrize(("recipe", "how"), [(FULL, "between"), (LORA, "saving"), (STOPPED, "between"), *OTHERS])
def test_killed_and_resumed_gives_the_same_bytes(case, fresh, forked, tmp_path, recipe, how):
    if recipe.optimiser == "adamw8bit" or recipe.method == "qlora":
        pytest.importorskip("bitsandbytes")
    store, corpus, seed = case
    whole = train(seed, corpus.train, recipe, store)
    other, *_ = fresh
    assert forked(SCRIPT, str(other.root), recipe.model_dump_json(), how, cwd=tmp_path).returncode == -signal.SIGKILL
    assert [path.name for path in other.root.glob("work/*/state.safetensors")] == ["state.safetensors"]
    steps: list[float] = []
    resumed = train(
        seed,
        corpus.train,
        recipe,
        other,
        progress=lambda what, done, *_: steps.append(done) if what.startswith("train on ") else None,
    )
    assert 0 < len(steps) < recipe.steps
    assert resumed == whole
    assert all(other.get(blob).read_bytes() == store.get(blob).read_bytes() for blob in whole.files.values())


def test_a_seed_stopped_by_the_keyboard_goes_on(case, fresh, monkeypatch):
    *_, seed = case
    other, corpus, _ = fresh
    monkeypatch.setattr(loop, "EVERY", 0.0)

    def stop(what, done, total, unit):
        if what.startswith("train on ") and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_seed(corpus, SHAPE, SEED_RECIPE, other, progress=stop)
    assert train_seed(corpus, SHAPE, SEED_RECIPE, other) == seed


def test_dropout_is_a_function_of_the_step(tmp_path):
    packed = packed_of(*[9] * 20)
    packed = packed._replace(tokens=packed.tokens % 64)
    model = tiny("gpt2", **GPT2 | {"resid_pdrop": 0.5})
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    ends = []
    for name in "ab":
        model.load_state_dict(start)
        loop.run(model, packed, Recipe(steps=3, batch=2, length=16), _made(tmp_path / name), lambda **_: None)
        ends.append([weight.clone() for weight in model.parameters()])
        torch.rand(7)
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))
    assert not model.training


def test_training_leaves_the_callers_randomness_alone(tmp_path):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    loop.run(new_model(SHAPE), packed_of(40, 40), Recipe(steps=1, batch=2, length=16), _made(tmp_path / "w"), lambda **_: None)
    assert torch.equal(torch.rand(3), wanted)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_damaged_state_says_what_to_delete(tmp_path):
    model = new_model(SHAPE)
    weights = dict(model.named_parameters())
    (tmp_path / checkpoint.FILE).write_bytes(b"\x10" * 100)
    with pytest.raises(Damaged, match="delete it"):
        checkpoint.load(tmp_path, weights, loop.adamw(weights, FULL))


def test_no_room_for_the_state_is_said_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(DoesNotFit, match="free some"):
        checkpoint.save(tmp_path, checkpoint.Position(), {}, loop.adamw(dict(new_model(SHAPE).named_parameters()), FULL))
    assert not list(tmp_path.iterdir())
