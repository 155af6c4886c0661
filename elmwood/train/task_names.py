"""The names of this room's tasks, from their inputs. Free of torch, since the process that hands out tasks runs none."""

from collections.abc import Mapping, Sequence
from typing import Any

from elmwood.records import Corpus, Digest, Recipe, Seed, Shape, Shard, fingerprint


def seed_key(
    corpora: Corpus | Sequence[tuple[Corpus, float]], shape: Shape | Mapping[str, Any], recipe: Recipe, name: str = "seed",
    keep_every: int | None = None,
) -> str:  # fmt: skip
    """The name of the task that trains a seed from scratch on a corpus, or on several with their weights."""
    parts = [(corpora, 1.0)] if isinstance(corpora, Corpus) else corpora
    if isinstance(shape, Shape) and keep_every is None and len(parts) == len(parts[0][0].train) == 1:  # as before there was more
        return fingerprint("train-seed", parts[0][0].digest, shape, recipe, name)
    return fingerprint("train-seed-2", _shares(parts), shape if isinstance(shape, Shape) else dict(shape), recipe, name, keep_every)


def start_key(corpora: Sequence[tuple[Corpus, float]], shape: Shape | Mapping[str, Any], rng_seed: int, name: str) -> str:
    """The name of the task that makes a seed before its first step."""
    return fingerprint("start-seed", _shares(corpora), shape if isinstance(shape, Shape) else dict(shape), rng_seed, name)


def tokenizer_key(corpora: Sequence[tuple[Corpus, float]], vocabulary: int) -> str:
    """The name of what trains the tokenizer of seeds from scratch."""
    return fingerprint("train-tokenizer", _shares(corpora), vocabulary)


def _shares(parts: Sequence[tuple[Corpus, float]]) -> list[tuple[Digest, float]]:
    whole = sum(weight for _, weight in parts)
    return [(corpus.digest, weight / whole) for corpus, weight in parts]


def train_key(seed: Seed, data: Sequence[Shard], recipe: Recipe, partition: Digest | None = None, domain: int | None = None) -> str:
    """The name of the task that trains this expert; the store keeps its log under this name."""
    return fingerprint("train", seed.digest, [shard.blob for shard in data], recipe, partition, domain)


def together_keys(
    seed: Seed, data: Sequence[Sequence[Shard]], recipe: Recipe, partition: Digest | None, domains: Sequence[int | None]
) -> list[str]:
    """The names of the tasks that train these experts. Each depends on the whole group, because the order of float sums does."""
    recipe = recipe.model_copy(update={"together": len(data)})
    group = [train_key(seed, shards, recipe, partition, domain) for shards, domain in zip(data, domains, strict=True)]
    return [fingerprint("together", group, place) for place in range(len(group))]
