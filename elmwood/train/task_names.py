"""The names of this room's tasks, by their inputs; free of torch, since whoever hands tasks out runs none."""

from collections.abc import Sequence

from elmwood.records import Corpus, Digest, Recipe, Seed, Shape, Shard, fingerprint


def seed_key(corpus: Corpus, shape: Shape, recipe: Recipe, name: str = "seed") -> str:
    """The name of the task that makes a seed from nothing but text."""
    return fingerprint("train-seed", corpus.digest, shape, recipe, name)


def train_key(seed: Seed, data: Sequence[Shard], recipe: Recipe, partition: Digest | None = None, domain: int | None = None) -> str:
    """The name of the task that makes this expert: where the store logs what it took."""
    return fingerprint("train", seed.digest, [shard.blob for shard in data], recipe, partition, domain)


def together_keys(
    seed: Seed, data: Sequence[Sequence[Shard]], recipe: Recipe, partition: Digest | None, domains: Sequence[int | None]
) -> list[str]:
    """The names of the tasks that make these experts: each depends on the whole group, since the order of float sums does."""
    recipe = recipe.model_copy(update={"together": len(data)})
    group = [train_key(seed, shards, recipe, partition, domain) for shards, domain in zip(data, domains, strict=True)]
    return [fingerprint("together", group, place) for place in range(len(group))]
