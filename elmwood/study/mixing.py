"""Mixtures of experts: a forest becomes one model whose gates choose among its experts, and is tuned."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import Progress, placed, silent
from elmwood.errors import BadInput
from elmwood.merge.checkpoint import Answer
from elmwood.merge.moe.build import KEPT, Mixing, gate_rows
from elmwood.merge.moe.build import mix as build
from elmwood.merge.moe.gates import GATES
from elmwood.merge.moe.remove import remove
from elmwood.merge.rules.table import open_rules
from elmwood.ranges import Count, Documents, RngSeed, checked
from elmwood.records import Corpus, Expert, Forest, Gates, Mixture, Partition, Seed, Shard
from elmwood.registry import lookup
from elmwood.report.notebook import grid, show_ranking
from elmwood.store import AnyStore, Named, Store
from elmwood.study.merging import Values, answers_of
from elmwood.study.quality.selection import Tuned
from elmwood.study.quality.selection import tune as score
from elmwood.study.text import keep_name, open_store
from elmwood.study.training import default_length, make_recipe, shards
from elmwood.study.trial import check_use

DEAD = 0.1  # of an even share: an expert with less in a layer counts as dead there
# what `mix` does where nothing else is asked
DEFAULTS = {"gates": "hidden", "top_k": 2, "scale": [1.0], "method": "average", "settings": {}, "low_rank": False, "seed_expert": True,
            "seed_bias": 0.0, "documents": None, "rng_seed": 0}  # fmt: skip


class MixResult(NamedTuple):
    """What `mix` made: the mixture; and, of several scales of the gates, how each predicts the tune half of held-out text."""

    record: Mixture
    tuned: Tuned | None = None

    def _repr_html_(self) -> str | None:
        if self.tuned:
            return show_ranking("Gates on the tune half of held-out text", self.tuned.losses, self.tuned.behind)
        return self.record._repr_html_()


@placed
@checked
def mix(
    forest: Named, store: AnyStore = None, *, gates: str = "hidden", top_k: Count = 2, scale: Values = 1.0, method: str = "average",
    settings: Mapping[str, Values] | None = None, low_rank: bool = False, seed_expert: bool = True, seed_bias: float = 0.0,
    without: Named | Sequence[Named] = (), documents: Documents = None, rng_seed: RngSeed = 0, name: str | None = None,
    device: str | None = None, progress: Progress = silent,
) -> MixResult:  # fmt: skip
    """Combine the experts of a forest into one mixture-of-experts model; or take experts out of a mixture.

    gates: how experts are chosen before any tuning: hidden, arrow, random, or 'module:function' (see `elmwood.merge.moe.gates`).
    scale: of the gates; of several, the best on held-out text. method: the merge rule of what all experts share, 'module:function' of
    one of your own, or 'seed'.
    For the other options see `elmwood mix --help`. Raises BadInput, BadSeed, ForeignExpert, UnknownName.
    """
    home = open_store(store, name)
    gone, scales = [home.resolve(one) for one in home.expand(without)], _scales(scale)
    source = home.load(forest)
    if isinstance(source, Mixture):
        given = {"gates": gates, "top_k": top_k, "scale": scales, "method": method, "settings": dict(settings or {}), "low_rank": low_rank,
                 "seed_expert": seed_expert, "seed_bias": seed_bias, "documents": documents, "rng_seed": rng_seed}  # fmt: skip
        return MixResult(keep_name(_without(source, gone, given, home, progress), name, home))
    rest = _rest(home.load(forest, Forest), gone, home)
    check_use(home.load(rest.seed, Seed), "merge")
    wanted = Gates(kind=gates, top_k=top_k, seed_bias=seed_bias if seed_expert else None, rng_seed=rng_seed)
    rules = open_rules([method])
    answers = answers_of([method], settings or {}, rules) if method != KEPT or settings else [Answer(KEPT, {})]
    if len(answers) > 1:
        raise BadInput("what all share is merged by one rule with one value of each setting: make the other mixtures one by one")
    made = {}
    for each, rows in zip(scales, gate_rows(rest, wanted, scales, home, lookup(GATES, gates, "gates")), strict=True):
        mixing = Mixing(
            gates=wanted.model_copy(update={"scale": each}), layout="low-rank" if low_rank else "checkpoint", method=method,
            settings=dict(answers[0].settings),
        )  # fmt: skip
        made[f"scale {each:g}"] = build(rest, rows, mixing, home, progress, rules)
    if len(made) == 1:
        return MixResult(keep_name(next(iter(made.values())), name, home))
    tuned = score(made, home.load(rest.seed, Seed), rest.partition, documents, home, progress)
    return MixResult(keep_name(made[min(made, key=lambda one: tuned.losses[one].value)], name, home), tuned)


def _without(mixture: Mixture, gone: Sequence[str], given: Mapping[str, object], store: Store, progress: Progress) -> Mixture:
    """The mixture without some experts. Raises BadInput."""
    others = sorted(option for option, value in given.items() if value not in (DEFAULTS[option], getattr(mixture, option, None)))
    if others or not gone:
        what = f"--{others[0].replace('_', '-')} is of mixtures that are made of a forest" if others else "a mixture is mixed already"
        raise BadInput(f"{what}: of a mixture say which experts go, --without NAME, or name its forest")
    for digest in gone:
        mixture = remove(mixture, digest, store, progress, open_rules([str(given["method"])]))
    return mixture


def _rest(forest: Forest, gone: Sequence[str], store: Store) -> Forest:
    """The forest without some experts. Raises BadInput."""
    if unknown := set(gone) - set(forest.experts):
        raise BadInput(f"expert {sorted(unknown)[0][:8]} is not in this forest; `elmwood show {forest.digest[:8]}` lists what is")
    rest = forest.model_copy(update={"experts": tuple(digest for digest in forest.experts if digest not in gone)})
    store.add(rest)
    return rest


def _scales(scale: Values) -> list[float]:
    found = [float(one) for one in scale] if isinstance(scale, Sequence) else [float(scale)]
    if not found or not min(found) >= 0:
        raise BadInput(f"--scale {min(found, default=None)}: gates of negative scale would choose the wrong experts; take 0 or more")
    return found


# ---- tuning ---------------------------------------------------------------------------------------------------------


class TunedMixture(NamedTuple):
    """What `tune` made: the mixture, and the share of the weight that its experts had last [L, E], by layer; none where nobody looked."""

    record: Mixture
    share_LE: NDArray[np.floating] | None

    def _repr_html_(self) -> str | None:
        return self.record._repr_html_()

    def summary(self) -> str:
        """The load of the experts in words."""
        return "" if self.share_LE is None else summary(self.share_LE)


@placed
@checked
def tune(
    mixture: Named, store: AnyStore = None, *, tokens: int | str = "1M", batch: int = 8, length: int | None = None,
    learning_rate: float | None = None, schedule: str = "cosine", tuned: str = "routers", balance: float = 0.01,
    accumulate: int = 1, checkpointing: bool = False, optimiser: str = "adamw", patience: int | None = None, rng_seed: RngSeed = 0,
    threads: Count = 1, name: str | None = None, device: str | None = None, progress: Progress = silent,
) -> TunedMixture:  # fmt: skip
    """Train the routers of a mixture, or more of it (`tuned`), on a mixed sample of its domains' text. An interrupted run resumes.

    For the options see `elmwood train --help`. Raises BadInput, DoesNotFit.
    """
    from elmwood.train import router  # torch

    home = open_store(store, name)
    start = home.load(mixture, Mixture)
    recipe = make_recipe(
        method="router", tokens=tokens, batch=batch,
        length=default_length(home.load(start.seed, Seed).context) if length is None else length,
        learning_rate=3e-3 if learning_rate is None else learning_rate, schedule=schedule, tuned=tuned, balance=balance,
        accumulate=accumulate, checkpointing=checkpointing, optimiser=optimiser, patience=patience, rng_seed=rng_seed, threads=threads,
        weight_decay=0.0,
    )  # fmt: skip
    data = mixed_text(home.load(home.load(start.forest, Forest).partition, Partition), home)
    made = router.tune(start, data, recipe, home, progress=progress)
    loads = [json.loads(line["load"]) for line in home.logged(router.tune_key(start, data, recipe)) if line.get("event") == "load"]
    last = next((load for load in reversed(loads) if load), None)
    return TunedMixture(keep_name(made, name, home), np.array(list(last.values())) if last else None)


def mixed_text(division: Partition, store: Store) -> tuple[Shard, ...]:
    """The training text of all domains; as the corpus has it, where that is the same, since a seed trained on it has packed it."""
    whole = store.load(division.corpus, Corpus).train
    alike = sum(one.documents for one in whole) == sum(domain.documents for domain in division.domains)
    return whole if alike else shards(division, None)


# ---- loads ----------------------------------------------------------------------------------------------------------


class Loads(NamedTuple):
    """Shares of the weight of each expert by layer and domain."""

    mixture: str  # digest
    layers: list[str]
    domains: list[str]
    experts: list[str]
    share_LDE: NDArray[np.floating]

    def summary(self) -> str:
        """The load of the experts in words."""
        return summary(self.share_LDE.mean(1))

    def _repr_html_(self) -> str:
        rows = [
            (f"layer {layer}", *(f"{share:.1%}" for share in share_DE.mean(0)))
            for layer, share_DE in zip(self.layers, self.share_LDE, strict=True)
        ]
        return grid(("share of the weight", *self.experts), rows, self.summary())


@placed
@checked
def loads(
    mixture: Named, store: AnyStore = None, *, documents: Count = 32, device: str | None = None, progress: Progress = silent
) -> Loads:
    """The load of each expert of a mixture, by layer and domain of held-out text. Raises BadInput."""
    from elmwood.train import router  # torch

    home = Store(store)
    given = home.load(mixture, Mixture)
    division = home.load(home.load(given.forest, Forest).partition, Partition)
    held = [(place, domain) for place, domain in enumerate(division.domains) if domain.holdout]
    if not held:
        raise BadInput("this partition holds no text out, and loads are looked at on text nobody trained on: cluster with --holdout")
    found = router.measure_loads(given, [domain.holdout for _, domain in held], home, documents, progress=progress)
    domains = [f"{place} {domain.name}"[:28] for place, domain in held]
    return Loads(given.digest, [layer.rpartition(".")[2] for layer in found], domains, expert_names(given, home),
                 np.array(list(found.values())))  # fmt: skip


def expert_names(mixture: Mixture, store: Store) -> list[str]:
    """What the experts are called: by their domains, where they have some."""
    found = [None if digest == mixture.seed else store.load(digest, Expert).domain for digest in mixture.experts]
    return [
        "seed" if digest == mixture.seed else digest[:6] if domain is None else str(domain)
        for digest, domain in zip(mixture.experts, found, strict=True)
    ]  # fmt: skip


def summary(share_LE: NDArray[np.floating]) -> str:
    """The load of the experts in words."""
    even = 1 / share_LE.shape[1]
    dead = int((share_LE < DEAD * even).sum())
    return (
        f"load of an expert in a layer: {share_LE.min() / even:.2f} to {share_LE.max() / even:.2f} of an even share; "
        f"{dead} of {share_LE.size} dead (below {DEAD:g})"
    )
