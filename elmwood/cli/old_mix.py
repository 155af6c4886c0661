"""What `mix` does, and `train --method router`: a forest becomes one mixture of experts, whose gates are tuned."""

import json
from collections.abc import Mapping, Sequence, Set

import numpy as np

from elmwood.cli.old_choose import tuned
from elmwood.cli.old_merge import answers_of
from elmwood.cli.old_training import checked, shards
from elmwood.cli.screen import bars, count, emit, keep, out, table, talk
from elmwood.engine import Progress
from elmwood.errors import BadInput
from elmwood.merge.checkpoint import Answer
from elmwood.merge.moe.build import KEPT, Mixing, Rows, directions, mix, order_of
from elmwood.merge.moe.gates import arrow_rows, hidden_rows, random_rows
from elmwood.merge.moe.remove import remove
from elmwood.merge.states import seed_places
from elmwood.records import Corpus, Expert, Forest, Gates, Mixture, Partition, Seed, Shard
from elmwood.report.loads import loads_plot
from elmwood.store import Store

KINDS = ("hidden", "arrow", "random")
DEAD = 0.1  # of an even share: an expert with less in a layer counts as dead there


def mix_verb(
    *, given, forest, gates, top_k, scale, method, settings, low_rank, seed_expert, seed_bias, without, documents, rng_seed, name, store,
    as_json,
) -> None:  # fmt: skip
    home = Store(store)
    if isinstance(source := home.load(forest), Mixture):
        return remove_verb(source, without, given - {"forest", "without", "name", "store", "as_json"}, name, home, as_json)
    whole = home.load(forest, Forest)
    gone = {home.resolve(one) for one in without}
    if unknown := gone - set(whole.experts):
        raise BadInput(f"expert {sorted(unknown)[0][:8]} is not in this forest; `elmwood show {forest}` lists what is")
    rest = whole.model_copy(update={"experts": tuple(digest for digest in whole.experts if digest not in gone)})
    home.add(rest)
    wanted = Gates(kind=gates, top_k=top_k, seed_bias=seed_bias if seed_expert else None, rng_seed=rng_seed)
    answers = answers_of(method, settings) if method != KEPT or settings else [Answer(KEPT, {})]
    if len(answers) > 1:
        raise BadInput("what all share is merged by one rule with one value of each setting: make the other mixtures one by one")
    scales = scales_of(scale)
    with bars() as progress:
        made = {}
        for each, rows in zip(scales, rows_of(rest, wanted, scales, home), strict=True):
            mixing = Mixing(
                gates=wanted.model_copy(update={"scale": each}), layout="low-rank" if low_rank else "checkpoint", method=method,
                settings=dict(answers[0].settings),
            )  # fmt: skip
            made[f"scale {each:g}"] = mix(rest, rows, mixing, home, progress)
        best = chosen(made, rest, documents, home, progress)
    keep(home, made[best], name, as_json)


def remove_verb(mixture: Mixture, without: Sequence[str], others: Set[str], name: str | None, store: Store, as_json: bool) -> None:
    """Experts taken out of a mixture that is there. Raises BadInput."""
    if others or not without:
        what = f"--{min(others).replace('_', '-')} is of mixtures that are made of a forest" if others else "a mixture is mixed already"
        raise BadInput(f"{what}: of a mixture say which experts go, --without NAME, or name its forest")
    with bars() as progress:
        for one in without:
            mixture = remove(mixture, store.resolve(one), store, progress)
    keep(store, mixture, name, as_json)


def scales_of(text: str) -> list[float]:
    """'0.5,1,2' -> those numbers. Raises BadInput."""
    try:
        found = [float(one) for one in text.split(",")]
    except ValueError as error:
        raise BadInput(f"--scale {text!r}: write a number, or several by comma to choose between") from error
    if min(found) < 0:
        raise BadInput(f"--scale {text}: a gate that is turned round would choose the wrong experts; take numbers of 0 and more")
    return found


def chosen(made: Mapping[str, Mixture], forest: Forest, documents: int | None, store: Store, progress: Progress) -> str:
    """The one with the least loss on the tune half of held-out text; a single one is not run."""
    if len(made) == 1:
        return next(iter(made))
    found = tuned(made, store.load(forest.seed, Seed), forest.partition, documents, store, progress)
    best = min(found.losses, key=lambda one: found.losses[one].value)
    rows = [
        (one, f"{loss.value:.4f}", "best" if one == best else f"+{found.behind[one].value:.4f} ± {found.behind[one].standard_error:.4f}")
        for one, loss in found.losses.items()
    ]  # fmt: skip
    table("gates on the tune half of held-out text", ("", "bits per byte", "behind"), rows, to=talk)
    return best


def rows_of(forest: Forest, gates: Gates, scales: Sequence[float], store: Store) -> list[Rows]:
    """The gates of a mixture before any tuning, at each scale. Raises BadInput."""
    seed, order = store.load(forest.seed, Seed), order_of(forest, gates.seed_bias is not None, store)
    if gates.kind not in KINDS:
        raise BadInput(f"no gates {gates.kind!r}; have {', '.join(KINDS)}")
    if gates.kind == "random":
        return [random_rows(seed_places(seed, store), order, gates.rng_seed, scale) for scale in scales]
    from elmwood.lm.layer_inputs import hidden  # torch

    domains = [None if digest == seed.digest else _domain(store.load(digest, Expert)) for digest in order]
    arrows = {} if gates.kind == "hidden" else directions(forest, order, store)
    seen = hidden(seed, [domain.train for domain in store.load(forest.partition, Partition).domains], store)
    bias = gates.seed_bias or 0.0
    if gates.kind == "hidden":
        return [{layer: hidden_rows(one.mean_DH, one.within_HH, domains, scale, bias) for layer, one in seen.items()} for scale in scales]
    return [
        {layer: arrow_rows(arrows[layer], one.mean_DH, one.within_HH, domains, scale, bias) for layer, one in seen.items()}
        for scale in scales
    ]  # fmt: skip


def _domain(expert: Expert) -> int:
    if expert.domain is None:
        raise BadInput(f"expert {expert.digest[:8]} is of no domain: gates cannot know its text; take random ones and tune them")
    return expert.domain


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
        talk.print(said(found), soft_wrap=True)
    keep(home, made, name, as_json)


def mixed_text(division: Partition, store: Store) -> tuple[Shard, ...]:
    """The training text of all domains; as the corpus has it, where that is the same, since a seed trained on it has packed it."""
    whole = store.load(division.corpus, Corpus).train
    alike = sum(one.documents for one in whole) == sum(domain.documents for domain in division.domains)
    return whole if alike else shards(division, None)


def loads_verb(*, mixture, documents, plot, store, as_json) -> None:
    from elmwood.train.router import loads  # torch

    home = Store(store)
    given = home.load(mixture, Mixture)
    division = home.load(home.load(given.forest, Forest).partition, Partition)
    held = [(place, domain) for place, domain in enumerate(division.domains) if domain.holdout]
    if not held:
        raise BadInput("this partition holds no text out, and loads are looked at on text nobody trained on: cluster with --holdout")
    with bars() as progress:
        found = loads(given, [domain.holdout for _, domain in held], home, documents, progress=progress)
    names, experts = [f"{place} {domain.name}"[:28] for place, domain in held], numbered(given, home)
    share_LDE, layers = np.array(list(found.values())), [layer.rpartition(".")[2] for layer in found]
    if plot:
        plot.write_text(loads_plot(share_LDE, layers, names, experts, DEAD))
    if as_json:
        emit({"mixture": given.digest, "layers": layers, "domains": names, "experts": experts, "share": share_LDE.round(5).tolist()})
        return
    rows = [(f"layer {layer}", *(f"{share:.1%}" for share in share_DE.mean(0))) for layer, share_DE in zip(layers, share_LDE, strict=True)]
    table(f"share of the weight, {documents} held-out documents of each domain", ("", *experts), rows)
    out.print(said({layer: share_DE.mean(0).tolist() for layer, share_DE in zip(layers, share_LDE, strict=True)}), soft_wrap=True)
    if plot:
        talk.print(f"loads by layer and domain: {plot}")


def numbered(mixture: Mixture, store: Store) -> list[str]:
    """What the experts are called: by their domains, where they have some."""
    found = [None if digest == mixture.seed else store.load(digest, Expert).domain for digest in mixture.experts]
    return [
        "seed" if digest == mixture.seed else digest[:6] if domain is None else str(domain)
        for digest, domain in zip(mixture.experts, found, strict=True)
    ]  # fmt: skip


def said(load: Mapping[str, list[float]]) -> str:
    """The load of the experts in words."""
    share_LE = np.array(list(load.values()))
    even = 1 / share_LE.shape[1]
    dead = int((share_LE < DEAD * even).sum())
    return (
        f"load of an expert in a layer: {share_LE.min() / even:.2f} to {share_LE.max() / even:.2f} of an even share; "
        f"{dead} of {share_LE.size} dead (below {DEAD:g})"
    )
