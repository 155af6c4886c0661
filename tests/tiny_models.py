"""Real models small enough for a test: a seed, and experts of it."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from elmwood.corpus.tokens import train_tokenizer
from elmwood.lm.load import load_model, new_model, save_seed
from elmwood.records import Expert, Recipe, Seed, Shape, Statistics
from elmwood.store import Store

torch.set_num_threads(1)  # such small products only wait for one another

SHAPE = Shape(layers=2, width=32, heads=4, feed_forward=48, vocabulary=320, context=64)
WORDS = "the cat sat on the mat and sailed over the sea — naïve café, déjà vu, 海 and 猫 "


def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer([WORDS] * 3, SHAPE.vocabulary)


def tiny_seed(store: Store, rng_seed: int = 0) -> Seed:
    return save_seed(louder(new_model(SHAPE, rng_seed)), tiny_tokenizer(), store, name="tiny", separator=0)


def louder(model: PreTrainedModel, times: float = 6.0) -> PreTrainedModel:
    """Fresh weights say nearly the same everywhere; larger ones give opinions that a wrong cache would change."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(times)
    return model


def lora_expert(seed: Seed, store: Store, rng_seed: int, **fields) -> Expert:
    """An adapter as PEFT saves it, with random numbers in it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields.pop("settings", {})}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(load_model(seed, store, device="cpu"), folder, rng_seed, **settings)
        files = store.put_folder(Path(folder))
    return _record(seed, store, Recipe(method="lora", steps=1, rank=settings["r"]), files, **fields)


def save_adapter(model: PreTrainedModel, folder: str, rng_seed: int, **settings) -> None:
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(rng_seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    model.save_pretrained(folder)


def full_expert(seed: Seed, store: Store, rng_seed: int, **fields) -> Expert:
    model = load_model(seed, store, device="cpu")
    generator = torch.Generator().manual_seed(rng_seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = store.put_folder(Path(folder))
    return _record(seed, store, Recipe(method="full", steps=1), files, **fields)


def leave_statistics(expert: Expert, seed: Seed, store: Store, rng_seed: int, rows: int = 2) -> Statistics:
    """Random Gram matrices and squared gradients, as training leaves them."""
    rng = np.random.default_rng(rng_seed)
    tensors = {}
    for name, weight in load_file(store.get(seed.files["model.safetensors"])).items():
        tensors[f"fisher|{name}"] = torch.from_numpy(rng.exponential(1e-4, weight.shape).astype(np.float32))
        if weight.dim() == 2 and "embed" not in name:
            x_TI = rng.standard_normal((200, weight.shape[1])) * rng.exponential(1.0, weight.shape[1])
            tensors[f"gram|{name}"] = torch.from_numpy((x_TI.T @ x_TI / 200).astype(np.float32))
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, path := Path(folder) / "statistics.safetensors")
        record = Statistics(expert=expert.digest, rows=rows, tokens=100 * rows, fisher=1e-4, files={path.name: store.put(path)})
    store.add(record)
    return record


def _record(seed: Seed, store: Store, recipe: Recipe, files: dict[str, str], **fields) -> Expert:
    expert = Expert(seed=seed.digest, data=(), recipe=recipe, files=files, **fields)
    store.add(expert)
    return expert


def config_seed(config, store: Store, **fields) -> Seed:
    """A seed of any architecture, with random weights."""
    torch.manual_seed(1)
    model = louder(AutoModelForCausalLM.from_config(config).eval(), 4.0)
    return save_seed(model, tiny_tokenizer(), store, name="any", separator=0, **fields)
