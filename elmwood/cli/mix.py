"""What `mix` does, and `train --method router`: a forest becomes one mixture of experts, whose gates are tuned."""

import json
from collections.abc import Mapping

import numpy as np

from elmwood.cli.screen import bars, count, keep, talk
from elmwood.cli.training import checked, shards
from elmwood.errors import BadInput
from elmwood.merge.mixture_build import Mixing, Rows, mix, order_of
from elmwood.merge.mixture_gates import hidden_rows, random_rows
from elmwood.merge.states import seed_places
from elmwood.records import Expert, Forest, Gates, Mixture, Partition, Seed
from elmwood.store import Store

DEAD = 0.1  # of an even share: an expert with less in a layer counts as dead there


def mix_verb(
    *, forest, gates, top_k, scale, method, low_rank, seed_expert, seed_bias, without, rng_seed, name, store, as_json
) -> None:  # fmt: skip
    home = Store(store)
    given = home.load(forest, Forest)
    gone = {home.resolve(one) for one in without}
    if unknown := gone - set(given.experts):
        raise BadInput(f"expert {sorted(unknown)[0][:8]} is not in this forest; `elmwood show {forest}` lists what is")
    given = given.model_copy(update={"experts": tuple(digest for digest in given.experts if digest not in gone)})
    home.add(given)
    settings = Gates(kind=gates, top_k=top_k, scale=scale, seed_bias=seed_bias if seed_expert else None, rng_seed=rng_seed)
    mixing = Mixing(gates=settings, layout="low-rank" if low_rank else "checkpoint", method=method)
    with bars() as progress:
        made = mix(given, rows_of(given, settings, home), mixing, home, progress)
    keep(home, made, name, as_json)


def rows_of(forest: Forest, gates: Gates, store: Store) -> Rows:
    """The gates of a mixture before any tuning. Raises BadInput."""
    seed, order = store.load(forest.seed, Seed), order_of(forest, gates.seed_bias is not None, store)
    if gates.kind == "random":
        return random_rows(seed_places(seed, store), order, gates.rng_seed, gates.scale)
    if gates.kind != "hidden":
        raise BadInput(f"no gates {gates.kind!r}; have hidden, random")
    from elmwood.lm.hidden import hidden  # torch

    partition = store.load(forest.partition, Partition)
    seen = hidden(seed, [domain.train for domain in partition.domains], store)
    places = [None if digest == seed.digest else _domain(store.load(digest, Expert)) for digest in order]
    bias = gates.seed_bias or 0.0
    return {layer: hidden_rows(one.mean_DH, one.within_HH, places, gates.scale, bias) for layer, one in seen.items()}


def _domain(expert: Expert) -> int:
    if expert.domain is None:
        raise BadInput(f"expert {expert.digest[:8]} is of no domain: gates cannot know its text; take random ones and tune them")
    return expert.domain


def tune_verb(
    *, mixture, tokens, batch, length, learning_rate, schedule, tuned, balance, rng_seed, threads, name, store, as_json
) -> None:  # fmt: skip
    from elmwood.train.router import tune, tune_key  # torch

    home = Store(store)
    given = home.load(mixture, Mixture)
    seed = home.load(given.seed, Seed)
    length = length or min(seed.context, 1024)
    recipe = checked(
        method="router", steps=max(1, count(tokens) // (batch * length)), batch=batch, length=length, learning_rate=learning_rate or 3e-3,
        schedule=schedule, tuned=tuned, balance=balance, rng_seed=rng_seed, threads=threads, weight_decay=0.0,
    )  # fmt: skip
    data = shards(home.load(home.load(given.forest, Forest).partition, Partition), None)
    with bars() as progress:
        made = tune(given, data, recipe, home, progress=progress)
    loads = [json.loads(line["load"]) for line in home.logged(tune_key(given, data, recipe)) if line.get("event") == "load"]
    if found := next((load for load in reversed(loads) if load), None):
        talk.print(said(found))
    keep(home, made, name, as_json)


def said(load: Mapping[str, list[float]]) -> str:
    """The load of the experts in words."""
    share_LE = np.array(list(load.values()))
    even = 1 / share_LE.shape[1]
    dead = int((share_LE < DEAD * even).sum())
    return (
        f"load of an expert in a layer: {share_LE.min() / even:.2f} to {share_LE.max() / even:.2f} of an even share; "
        f"{dead} of {share_LE.size} dead (below {DEAD:g})"
    )
