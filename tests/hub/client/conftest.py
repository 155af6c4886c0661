"""A small run: a seed, a partition of three topics with secret held-out text, and an honest expert of each domain."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from tiny_models import tiny_seed
from topics import SENTENCES, build_corpus, some_sentences

from elmwood.domains.partition import partition as divide
from elmwood.evaluate import holdout
from elmwood.hub.client.gate import CONFIG, WEIGHTS, adapter_config, expected_tensors
from elmwood.records import Ensemble, Expert, Forest, Partition, Recipe, Seed
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


@pytest.fixture(scope="session", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdout, "BLOCK", 128)
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    store = Store(folder / "store")
    corpus = build_corpus(folder / "text", store, some_sentences(SENTENCES, 20, 16, LETTERS), holdout=0.7)
    partition = divide(corpus, store, domains=3)
    seed = tiny_seed(store)
    experts = [honest(store, seed, partition, domain, rng_seed=domain) for domain in range(3)]
    forest = store.add(Forest(seed=seed.digest, partition=partition.digest, experts=tuple(one.digest for one in experts[:2])))
    base = store.add(Ensemble(forest=forest, top_k=1, temperature=0.1, seed_distance=0.99))
    return Run(store, seed, partition, experts, base)


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
