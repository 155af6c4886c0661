"""Where things are computed."""

from functools import partial

import pytest
import torch
from tiny_training import SEED_RECIPE, SHAPE

from elmwood.engine import gpus, placed
from elmwood.errors import BadInput
from elmwood.lm.devices import KINDS, best_device, kind_of
from elmwood.train import tasks


@pytest.fixture
def cards(monkeypatch):
    """A machine with one CUDA device and one of the others, as far as torch says."""
    for kind in KINDS:
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda kind=kind: kind != "xpu")
        monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: 1)
    monkeypatch.delenv("ELMWOOD_DEVICE", raising=False)


def test_the_best_device_is_a_gpu_where_there_is_one(cards, monkeypatch):
    assert best_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_device() == torch.device("mps")
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    assert best_device() == torch.device("cpu")
    assert [kind_of(torch.device(kind)) for kind in ("cpu", "cuda", "mps")] == ["cpu", "gpu", "gpu"]


def test_the_user_decides(cards, monkeypatch):
    for named in ("cpu", "cuda:0", "mps"):
        monkeypatch.setenv("ELMWOOD_DEVICE", named)
        assert best_device() == torch.device(named)
    assert placed(lambda device: best_device())(device="cpu") == torch.device("cpu")
    for absent in ("xpu", "cuda:1", "gpu", "cuda:-3"):
        monkeypatch.setenv("ELMWOOD_DEVICE", absent)
        with pytest.raises(BadInput, match="no such device here; choose among cuda, mps, cpu"):
            best_device()


def test_workers_get_cards_only_where_cuda_is_wanted(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("ELMWOOD_DEVICE", raising=False)
    assert gpus() == ["0", "1"]
    for named in ("cpu", "cuda:1"):  # the one that was named, by all workers
        monkeypatch.setenv("ELMWOOD_DEVICE", named)
        assert gpus() == []


@pytest.mark.parametrize("verb", ["seed", "lora", "full"])
def test_training_runs_where_it_is_told(case, verb, monkeypatch):
    """The meta device stands for any that is not the CPU."""
    store, corpus, seed = case
    seen = []

    def run(model, *_, **__):
        seen.append(({weight.device.type for weight in model.parameters()}, {weight.dtype for weight in model.parameters()}))
        raise InterruptedError

    monkeypatch.setattr(tasks, "run", run)
    recipe = SEED_RECIPE.model_copy(update={"method": "lora" if verb == "lora" else "full", "rng_seed": 99})
    start = partial(tasks.train_seed, corpus, SHAPE) if verb == "seed" else partial(tasks.train, seed, corpus.train)
    with pytest.raises(InterruptedError):
        start(recipe, store, device="meta")
    assert seen[0][0] == {"meta"}
    assert torch.float32 in seen[0][1]
    assert (torch.bfloat16 in seen[0][1]) == (verb == "lora")  # frozen weights on a GPU
