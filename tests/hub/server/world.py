"""A small run with real files and no model: a hub's database, its keys and adapters of two tensors."""

import json

import numpy as np
import safetensors.numpy

from elmwood.hub import signing
from elmwood.hub.home import Home, Hub
from elmwood.hub.manifest import publish
from elmwood.hub.messages import Licences, RunDomain, RunManifest, Tier
from elmwood.records import Domain, Embedder, Ensemble, Forest, Partition, Recipe, Seed, Shard
from elmwood.store import Store

TENSORS = {"a": (4, 8), "b": (8, 4)}
TEXTS = {"data": b"Data: CC0.", "contribution": b"Adapters: Apache-2.0.", "disk": b"The store stays on your disk."}


def make_run(store: Store, domains: int = 3, **settings) -> RunManifest:
    """A run of some domains, each with one shard; domain 0 has held-out text."""
    blob = {name: store.put(name.encode()) for name in ("tokenizer", "weights", "vocabulary")}
    seed = Seed(
        name="tiny", architecture="LlamaForCausalLM", parameters=64, vocabulary=16, context=32, separator=0,
        files={"tokenizer.json": blob["tokenizer"], "model.safetensors": blob["weights"]},
    )  # fmt: skip
    centroids = store.root / "centroids.safetensors"
    store.root.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({"centroids": np.eye(min(domains, 8), dtype=np.float32)}, centroids)
    files = [store.put(f"shard {n}".encode()) for n in range(min(domains, 8))]  # many domains share them
    shards = [Shard(blob=files[n % 8], documents=1, bytes=7) for n in range(domains)]
    held = Shard(blob=store.put(b"held out"), documents=1, bytes=8)
    partition = Partition(
        corpus="0" * 64, embedder=Embedder(name="tfidf", dimension=domains, files={"vocabulary.json": blob["vocabulary"]}),
        centroids=store.put(centroids),
        domains=tuple(Domain(name=f"domain {n}", train=(shard,), holdout=(held,) if n == 0 else ()) for n, shard in enumerate(shards)),
    )  # fmt: skip
    for made in (seed, partition):
        store.add(made)
    forest = Forest(seed=seed.digest, partition=partition.digest, experts=())
    store.add(forest)
    ensemble = Ensemble(forest=forest.digest, router="live", temperature=0.5, seed_distance=1.1)
    return RunManifest(
        run="test", version=1, issued=0, expires_s=30 * 86400.0, seed=seed.digest, partition=partition.digest, ensemble=ensemble,
        domains=tuple(RunDomain(number=n, name=f"domain {n}", shards=(shard,), tokens=4) for n, shard in enumerate(shards)),
        tiers={"cpu": Tier(recipe=Recipe(method="lora", steps=10, rank=4), tensors=TENSORS, config=store.put(b"{}"), bytes=4096)},
        licences=Licences(**{name: store.put(text) for name, text in TEXTS.items()}), hub_key="0" * 64, root_key="0" * 64, **settings,
    )  # fmt: skip


def open_run(folder, domains: int = 3, database: str | None = None, blobs: str | None = None, **settings) -> Hub:
    """A published run, opened."""
    home = Home("test", Store(folder))
    home.make_keys()
    hub = Hub(home, database, blobs)
    try:
        publish(make_run(home.store, domains, **settings), hub)
    except BaseException:
        hub.close()  # else its connections are found unclosed in a later test
        raise
    return hub


def adapter(seed: int, **changes) -> bytes:
    """A file that the gate lets in."""
    chance = np.random.default_rng(seed)
    tensors = {name: chance.normal(size=shape).astype(np.float32) for name, shape in TENSORS.items()} | changes
    return safetensors.numpy.save(tensors)


def keys(hub: Hub) -> dict:
    """Private keys of the maintainer's roles."""
    return {name: signing.load_key(hub.home.key_path(name)) for name in ("admin", "verifier", "root", "hub")}


def plain(value) -> dict:
    return json.loads(value.model_dump_json())
