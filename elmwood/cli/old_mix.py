"""What `train --method router` does: the gates of a mixture are tuned."""

import json

import numpy as np

from elmwood.cli.old_training import checked, shards
from elmwood.cli.screen import bars, count, keep, talk
from elmwood.errors import BadInput
from elmwood.records import Corpus, Forest, Mixture, Partition, Seed, Shard
from elmwood.store import Store
from elmwood.study.mixing import summary

# options of `train` that say how experts branch from a seed, and nothing about a mixture
EXPERTS = {"seed", "domains", "rank", "alpha", "targets", "late", "together", "report_to", "statistics", "workers", "engine", "commands"}


def tune_verb(
    *, given, mixture, tokens, batch, length, learning_rate, schedule, tuned, balance, rng_seed, threads, name, store, as_json, **how
) -> None:  # fmt: skip
    from elmwood.train.router import tune, tune_key  # torch

    if wrong := given & EXPERTS:
        option = min(wrong).replace("_", "-")
        raise BadInput(f"--{option} is of experts that branch from a seed, and means nothing to a mixture (--method router): leave it out")
    home = Store(store)
    start = home.load(mixture, Mixture)
    seed = home.load(start.seed, Seed)
    length = length or min(seed.context, 1024)
    recipe = checked(
        method="router", steps=max(1, count(tokens) // (batch * length)), batch=batch, length=length, learning_rate=learning_rate or 3e-3,
        schedule=schedule, tuned=tuned, balance=balance, rng_seed=rng_seed, threads=threads, weight_decay=0.0, **how,
    )  # fmt: skip
    data = mixed_text(home.load(home.load(start.forest, Forest).partition, Partition), home)
    with bars() as progress:
        made = tune(start, data, recipe, home, progress=progress)
    loads = [json.loads(line["load"]) for line in home.logged(tune_key(start, data, recipe)) if line.get("event") == "load"]
    if found := next((load for load in reversed(loads) if load), None):
        talk.print(summary(np.array(list(found.values()))), soft_wrap=True)
    keep(home, made, name, as_json)


def mixed_text(division: Partition, store: Store) -> tuple[Shard, ...]:
    """The training text of all domains; as the corpus has it, where that is the same, since a seed trained on it has packed it."""
    whole = store.load(division.corpus, Corpus).train
    alike = sum(one.documents for one in whole) == sum(domain.documents for domain in division.domains)
    return whole if alike else shards(division, None)
