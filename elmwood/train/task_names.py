"""The names of this room's tasks, from their inputs. Free of torch, since the process that hands out tasks runs none."""

from collections.abc import Sequence

from elmwood.records import Corpus, Digest, Recipe, Seed, Shape, Shard, fingerprint


def seed_key(corpus: Corpus, shape: Shape, recipe: Recipe, name: str = "seed") -> str:
    """The name of the task that trains a seed from scratch."""
    return fingerprint("train-seed", corpus.digest, shape, recipe, name)


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
