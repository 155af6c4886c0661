"""A small run: a seed, a partition of three topics with secret held-out text, and what volunteers make of it, honest or not."""

import json
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from elmwood.hub.client.gate import CONFIG, WEIGHTS, adapter_config, expected_tensors
from elmwood.records import Expert, Partition, Recipe, Seed
from elmwood.store import Store
from elmwood.train.tasks import train

LETTERS = ("abcdef", "ghijkl", "mnopqr")
RECIPE = Recipe(method="lora", steps=25, batch=4, length=48, learning_rate=2e-2, rank=4)


class Run(NamedTuple):
    store: Store
    seed: Seed
    partition: Partition
    experts: list[Expert]
    base: str  # the ensemble of the first two


def honest(store, seed, partition, domain, rng_seed=0, **changed):
    """An expert as the hub makes it of what a volunteer trained."""
    recipe = RECIPE.model_copy(update={"rng_seed": rng_seed, **changed})
    made = train(seed, partition.domains[domain].train, recipe, store, partition=partition.digest, domain=domain)
    expected = expected_tensors(seed, recipe, store)
    files = {WEIGHTS: made.files[WEIGHTS], CONFIG: store.put(adapter_config(recipe, seed, expected))}
    expert = made.model_copy(update={"files": files, "curve": ()})
    store.add(expert)
    return expert


def tensors_of(expert, store):
    return safetensors.numpy.load_file(store.get(expert.files[WEIGHTS]))


def changed(like, store, change):
    """An expert with other factors of the same rank: `change` maps the name, A [R, I] and B [O, R] of each layer."""
    held, made = tensors_of(like, store), {}
    for name in held:
        if "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            made[name], made[other] = (np.ascontiguousarray(part, np.float32) for part in change(name, held[name], held[other]))
    return with_weights(like, store, made)


def with_weights(like, store, made):
    expert = like.model_copy(update={"files": {**like.files, WEIGHTS: store.put(safetensors.numpy.save(made, {"format": "pt"}))}})
    store.add(expert)
    return expert


def settings_of(expert, store):
    return json.loads(store.get(expert.files[CONFIG]).read_text())
