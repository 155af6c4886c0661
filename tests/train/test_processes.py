"""Two processes train as one does, divided or not, and resume after one was killed. They meet in a file, so no port is needed."""

import json
from pathlib import Path

import pytest

from elmwood.lm.load import load_model
from elmwood.records import Expert, Recipe, Seed
from elmwood.store import Store
from elmwood.train import tasks
from elmwood.train.card import precision
from elmwood.train.seeds.shapes import SHAPES

SCRIPT = """
import json, os, signal, sys
rank = 0 if os.fork() else 1
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
import torch, torch.distributed as dist
from elmwood.records import Corpus, Recipe
from elmwood.store import Store
from elmwood.train import loop, tasks
from elmwood.train.card import precision
from elmwood.train.card.processes import join
precision.uses_bf16 = lambda device: False
loop.EVERY, loop.SHARE, loop.CHECK = 0.0, 1e9, 1
root, shape, recipe, sharded, dies, meet = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
store, recipe, steps = Store(root), Recipe.model_validate_json(recipe), []
if rank and dies == "yes":
    whole = loop.update_weights
    def update(optimizer, recipe, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(optimizer, recipe, step)
    loop.update_weights = update
try:
    group = join(sharded == "yes")
    seed = tasks.train_seed(store.load("corpus", Corpus), json.loads(shape), recipe, store, keep_every=4, group=group,
                            progress=lambda what, done, *_: steps.append(done) if what.startswith("train on ") else None)
    short = recipe.model_copy(update={"steps": 2})
    expert = None if group.sharded else tasks.train(seed, store.load("corpus", Corpus).train, short, store)
    if rank == 0:
        print(json.dumps({"seed": seed.digest, "steps": len(steps), "expert": expert and expert.digest}))
except RuntimeError:  # gloo: the other one is gone
    sys.exit(3)
finally:
    if rank == 1:
        os._exit(0)
"""
RECIPE = Recipe(steps=6, batch=4, length=32, learning_rate=3e-3, schedule="wsd")
LIKE = SHAPES["SmolLM2-135M"] | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                                 "num_key_value_heads": 2, "vocab_size": 300}  # fmt: skip


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """What one process makes of the same task: the seed, and the one kept at step 4."""
    store = other_store(place, tmp_path_factory.mktemp("alone"))
    kept: list[Seed] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "uses_bf16", lambda device: False)
        seed = tasks.train_seed(store.load("corpus"), LIKE, RECIPE, store, keep_every=4, kept=kept.append)
    return store, seed, kept


def other_store(place: Path, folder: Path) -> Store:
    store, found = Store(folder / "store"), Store(place)
    corpus = found.load("corpus")
    for shard in corpus.train:
        store.put(found.get(shard.blob))
    store.name("corpus", store.add(corpus))
    return store


def two(forked, store: Store, folder: Path, sharded: bool, dies: bool = False):
    words = ["yes" if one else "no" for one in (sharded, dies)]
    meet = folder / f"meet-{len(list(folder.iterdir()))}"
    return forked(SCRIPT, str(store.root), json.dumps(LIKE), RECIPE.model_dump_json(), *words, str(meet), cwd=folder)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_resume(alone, place, forked, tmp_path, monkeypatch, sharded):
    single, seed, _ = alone
    store, torn = other_store(place, tmp_path), other_store(place, tmp_path / "torn")
    done = two(forked, store, tmp_path, sharded)
    assert done.returncode == 0, done.stderr
    made = store.load(json.loads(done.stdout)["seed"], Seed)
    same = {"files": {}, "curve": ()}
    assert made.model_copy(update=same) == seed.model_copy(update=same)  # the record names the inputs, not the machine
    one, other = (dict(load_model(which, where, device="cpu").named_parameters()) for which, where in ((seed, single), (made, store)))
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4
    assert [point.loss for point in made.curve] == pytest.approx([point.loss for point in seed.curve], abs=1e-5)
    if not sharded:
        expert = store.load(json.loads(done.stdout)["expert"], Expert)
        for blob in made.files.values():
            single.put(store.get(blob))
        monkeypatch.setattr(precision, "uses_bf16", lambda device: False)
        same_one = tasks.train(store.load(expert.seed, Seed), single.load("corpus").train, expert.recipe, single)
        assert [point.loss for point in expert.curve] == pytest.approx([point.loss for point in same_one.curve], abs=1e-5)
    assert two(forked, torn, tmp_path, sharded, dies=True).returncode == 3
    again = json.loads(two(forked, torn, tmp_path, sharded).stdout)
    assert (again["seed"], again["steps"]) == (made.digest, 3)  # steps 4 to 6, to the same bytes


def test_kept_checkpoints_are_seeds_that_name_their_run(alone):
    store, seed, (kept,) = alone
    assert (kept.step, seed.step, kept.run) == (4, None, seed.run)
    assert kept.recipe == seed.recipe
    assert kept.step <= kept.recipe.stable
    assert store.load(kept.digest, Seed) == kept
    assert kept.curve == seed.curve[:4]
    assert kept.files["model.safetensors"] != seed.files["model.safetensors"]
