"""Mixtures of a forest's experts, untuned and tuned, beside dense training at equal total tokens, the ensemble and the merges.

    python -m benches.quality.mixture STORE FOREST --dense NAME|BATCH:RATE [--dense …] [--ensemble NAME] [--random FOREST]
        [--tokens 500k] [--batch 8] [--rates 5e-4,1e-3] [--rng-seed 0] [--documents 100] [--rows PATTERN]

benches/forest.py makes STORE. Tuning takes tokens on top of the experts', so every --dense is trained for both together. Gains are over
the best of them, paired, on the test half. --random: experts of random clusters in the same mixture. Rates, scales and the best dense
model are chosen on the tune half, never on the half that is reported. --rows: only rows whose name matches this expression. Finished
steps in STORE are found again, so an interrupted run resumes, and rows can be run one by one.

One JSON line per row: bits per byte; gain over dense, over the same mixture untuned and over the best merge, each with its standard error;
parameters in all and active per token, CPU seconds of tuning, loads.
"""

import json
import re
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from benches.common import numbers, open_forest, parser, say
from elmwood.domains.route import Routing, Signals, remember, router_of, weights
from elmwood.ensemble.mixture import open_model
from elmwood.evaluate.holdout import HoldoutSpec, distances, open_holdout
from elmwood.evaluate.losses import bits_per_byte, difference, row
from elmwood.evaluate.losses import mix as mix_columns
from elmwood.evaluate.partial import Partial
from elmwood.merge.checkpoint import Answer, merge
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.moe.build import Mixing, gate_rows, mix
from elmwood.records import Corpus, Ensemble, Expert, Forest, Gates, Mixture, Recipe, Record
from elmwood.store import Store
from elmwood.train.router import tune, tune_key
from elmwood.train.tasks import train
from elmwood.units import parse_count

DENSE = "dense, equal total tokens"
MERGED = (0.05, 0.1, 0.2)  # scales of task arithmetic: the sum of the deltas is added to the seed
SCALES = (0.5, 1.0, 2.0, 4.0)  # of gates
NARROW = (3e-3, 1e-2)  # rates of gates alone


class Plan(NamedTuple):
    """One row."""

    name: str
    gates: str = "hidden"
    top_k: int | None = 2  # None: all, soft routing
    seed_bias: float | None = 0.0
    scales: tuple[float, ...] = (1.0,)  # of the gates; the best on the tune half
    layout: str = "checkpoint"
    method: str = "seed"  # of what all share
    settings: tuple[tuple[str, float], ...] = ()
    tuned: str | None = None
    rates: tuple[float, ...] = ()  # none: those asked for
    balance: float = 0.01
    random: bool = False  # of the forest of random clusters


EVERYTHING = "everything tuned"
PLANS = (
    Plan("untuned"),
    Plan("untuned, soft", top_k=None),
    Plan("untuned, shared averaged", method="average"),
    Plan("untuned, shared averaged at 0.1", method="task_arithmetic", settings=(("scale", 0.1),)),
    Plan("untuned, scale chosen", scales=SCALES),
    Plan("untuned, Arrow's gates", gates="arrow", scales=SCALES),
    Plan("untuned, random gates", gates="random"),
    Plan(EVERYTHING, tuned="everything"),
    Plan("routers tuned", tuned="routers", rates=NARROW),
    Plan("experts frozen", tuned="shared"),
    Plan(f"{EVERYTHING}, soft", top_k=None, tuned="everything"),
    Plan(f"{EVERYTHING}, top-1", top_k=1, tuned="everything"),
    Plan(f"{EVERYTHING}, no load balancing", tuned="everything", balance=0.0),
    Plan(f"{EVERYTHING}, without the seed's expert", seed_bias=None, tuned="everything"),
    Plan(f"{EVERYTHING}, shared averaged", method="average", tuned="everything"),
    Plan(f"{EVERYTHING}, shared averaged at 0.1", method="task_arithmetic", settings=(("scale", 0.1),), tuned="everything"),
    Plan(f"{EVERYTHING}, random gates", gates="random", tuned="everything"),
    Plan(f"{EVERYTHING}, random clusters", gates="random", tuned="everything", random=True),
    Plan("low-rank, untuned", layout="low-rank"),
    Plan("low-rank, routers tuned", layout="low-rank", tuned="routers", rates=NARROW),
)


class Bench:
    """The columns of all rows, on one holdout."""

    def __init__(self, asked: Namespace):
        self.asked, self.store = asked, Store(asked.store)
        opened = open_forest(self.store, asked.forest)
        self.forest, self.seed, self.division = opened.forest, opened.seed, opened.division
        self.length, self.tokens = min(self.seed.context, 256), parse_count(asked.tokens)
        spec = HoldoutSpec(
            partition=self.division.digest, seed=self.seed.digest, length=self.length, documents=asked.documents
        )  # fmt: skip
        self.held = open_holdout(spec, self.store)
        self.columns: dict[str, np.ndarray] = {}
        self.data = self.store.load(self.division.corpus, Corpus).train  # as the dense control's, so packed before

    def partial(self, record: Record) -> Partial:
        return Partial(record, lambda: open_model(record, self.store), self.held, self.store)

    def column(self, record: Record) -> np.ndarray:
        one = self.partial(record)
        one.fill(np.arange(len(one.known_W)))
        one.seal()
        return one.loglik_N

    def best(self, made: Sequence[tuple[Any, Record]]) -> tuple[Any, Record]:
        """That with the least loss on the tune half; no more is scored of the others."""
        losses = []
        for _, record in made if len(made) > 1 else ():
            one = self.partial(record)
            one.fill(np.unique(self.held.window_N[self.held.tune_N]))
            one.seal()
            losses.append(bits_per_byte(one.loglik_N, self.held, self.held.tune_D).value)
        return made[int(np.argmin(losses))] if losses else made[0]

    def wanted(self, name: str) -> bool:
        return re.search(self.asked.rows, name) is not None

    def say_row(self, name: str, record: Record | None = None, **facts: object) -> None:
        if record is not None:
            self.columns[name] = self.column(record)
        found = row(name, self.columns[name], self.held, domains=len(self.division.domains))
        line: dict[str, object] = {"forest": self.asked.forest, "row": name}
        line |= {"bits_per_byte": found.bits_per_byte, "error": found.standard_error}
        merges = [other for other in self.columns if other.startswith("merge")]
        best = min(merges, default="", key=lambda other: bits_per_byte(self.columns[other], self.held, self.held.tune_D).value)
        for other, label in ((DENSE, "gain"), ("seed", "over_seed"), (best, "over_merge"), ("mixture: untuned", "over_untuned")):
            if other in self.columns and other != name:
                gain = difference(self.columns[other], self.columns[name], self.held, ~self.held.tune_D)
                line |= {label: gain.value, f"{label}_error": gain.standard_error}
        line["tune_half"] = round(bits_per_byte(self.columns[name], self.held, self.held.tune_D).value, 4)
        say("mixture", **line | facts)

    # ---- rows

    def controls(self) -> None:
        made: list[tuple[str, Expert]] = []
        for spelled in self.asked.dense:
            made.append((spelled, train(self.seed, self.data, self.dense(spelled), self.store)))
        name, longer = self.best(made)
        self.say_row(DENSE, longer, which=name, among=[name for name, _ in made], tokens=longer.recipe.tokens)  # type: ignore[attr-defined]
        self.say_row("seed", self.seed)
        if self.asked.ensemble and self.wanted("ensemble"):
            self.ensemble()
        if self.wanted("merge"):
            members = {digest: everywhere(1.0) for digest in self.forest.experts}
            answers = [Answer("average", {}), *(Answer("task_arithmetic", {"scale": scale}) for scale in MERGED)]
            for answer, one in zip(answers, merge(self.seed, members, answers, self.store), strict=True):
                self.say_row(f"merge: {answer.method} {answer.settings.get('scale', '')}".strip(), one)

    def dense(self, spelled: str) -> Recipe:
        """A trained control's recipe, or BATCH:RATE, for as many tokens as the experts' and the tuning's."""
        batch, colon, rate = spelled.partition(":")
        total = self.tokens + sum(self.store.load(digest, Expert).recipe.tokens for digest in self.forest.experts)
        if colon:
            return Recipe(
                steps=total // (int(batch) * self.length), batch=int(batch), length=self.length, learning_rate=float(rate), rng_seed=1
            )
        recipe = self.store.load(spelled, Expert).recipe
        steps = recipe.steps + round(self.tokens / (recipe.batch * recipe.length))
        return recipe.model_copy(update={"steps": steps, "threads": 1})

    def ensemble(self) -> None:
        """From the columns of its experts, as the table has it."""
        record = self.store.load(self.asked.ensemble, Ensemble)
        experts = [self.store.load(digest, Expert) for digest in self.store.load(record.forest, Forest).experts]
        loglik_NE = np.column_stack([*(self.column(expert) for expert in experts), self.columns["seed"]])
        routing = Routing.of(record)
        kind = router_of(routing).distances or "dense"
        dist2_NK = distances(self.held, self.division, self.store, signal=kind)
        memory_NE = remember(loglik_NE, routing.fading, self.held.document_N)
        weight_NE = weights(Signals(dist2_NK[:, [expert.domain or 0 for expert in experts]], memory_NE), routing)
        name = f"c-BTM ensemble, top-{record.top_k}"
        self.columns[name] = mix_columns(loglik_NE, weight_NE)
        self.say_row(name)

    def untuned(self, plan: Plan) -> tuple[float, Mixture]:
        """With the scale of its gates."""
        forest = self.store.load(self.asked.random, Forest) if plan.random else self.forest
        top_k = plan.top_k or len(forest.experts) + (plan.seed_bias is not None)
        gates = Gates(kind=plan.gates, top_k=top_k, seed_bias=plan.seed_bias)
        made = []
        for scale, rows in zip(plan.scales, gate_rows(forest, gates, plan.scales, self.store), strict=True):
            mixing = Mixing(
                gates=gates.model_copy(update={"scale": scale}), layout=plan.layout, method=plan.method, settings=dict(plan.settings)
            )  # fmt: skip
            made.append((scale, mix(forest, rows, mixing, self.store)))
        return self.best(made)  # type: ignore[return-value]

    def mixture(self, plan: Plan) -> None:
        scale, start = self.untuned(plan)
        if plan.tuned is None:
            self.say_row(f"mixture: {plan.name}", start, scale=scale, shared=start.method, **self.sizes(start))
            return
        made = []
        rates = plan.rates or tuple(numbers(self.asked.rates))
        for rate in rates:
            recipe = Recipe(
                method="router", steps=self.tokens // (self.asked.batch * self.length), batch=self.asked.batch, length=self.length,
                learning_rate=rate, balance=plan.balance, tuned=plan.tuned, weight_decay=0.0,
                rng_seed=self.asked.rng_seed,
            )  # fmt: skip
            began = time.process_time()
            made.append(((rate, recipe), tune(start, self.data, recipe, self.store)))
            self.store.log(tune_key(start, self.data, recipe), event="bench", cpu=round(time.process_time() - began, 1))
        (rate, recipe), best = self.best(made)
        logged = self.store.logged(tune_key(start, self.data, recipe))
        cpu = next(line["cpu"] for line in logged if line.get("event") == "bench")
        load = next(found for line in reversed(logged) if line.get("event") == "load" and (found := json.loads(line["load"])))
        share_LE = np.array(list(load.values()))
        even = 1 / share_LE.shape[1]
        self.say_row(
            f"mixture: {plan.name}", best, rate=rate, rates=rates, scale=scale, shared=start.method, tuning_tokens=recipe.tokens,
            tuning_cpu=cpu, load=[round(float(share_LE.min() / even), 2), round(float(share_LE.max() / even), 2)],
            dead=int((share_LE < 0.1 * even).sum()), **self.sizes(best),  # type: ignore[arg-type]
        )  # fmt: skip

    def sizes(self, mixture: Mixture) -> dict[str, int]:
        """Numbers in all, and those at work on one token."""
        total = expert = 0
        for name, blob in mixture.files.items():
            if name.endswith(".safetensors"):
                with safe_open(self.store.get(blob), "np") as file:
                    for key in file.keys():  # noqa: SIM118  # not a dict
                        numbers = int(np.prod(file.get_slice(key).get_shape()))
                        total += numbers
                        expert += numbers if ".experts." in key else 0
        share = mixture.gates.top_k / len(mixture.experts)
        return {"parameters": total, "active": round(total - expert * (1 - share))}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store")
    options.add_argument("forest")
    options.add_argument("--ensemble")
    options.add_argument("--dense", action="append", required=True)
    options.add_argument("--random")
    options.add_argument("--tokens", default="500k")
    options.add_argument("--batch", type=int, default=8, help="of tuning")
    options.add_argument("--rates", default="5e-4,1e-3", help="of tuning more than gates")
    options.add_argument("--rng-seed", type=int, default=0, help="of tuning: 1, and it reads other text than the seed did first")
    options.add_argument("--documents", type=int, default=100)
    options.add_argument("--rows", default="")
    asked = options.parse_args()
    torch.set_num_threads(1)
    bench = Bench(asked)
    bench.controls()
    full = any(bench.store.load(digest, Expert).recipe.method == "full" for digest in bench.forest.experts)
    for plan in PLANS:
        if bench.wanted(f"mixture: {plan.name}") and not (full and plan.layout == "low-rank") and (asked.random or not plan.random):
            bench.mixture(plan)


if __name__ == "__main__":
    main()
