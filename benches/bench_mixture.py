"""Mixtures of a forest's experts, untuned and tuned, beside dense training at equal total tokens, the ensemble and the merges.

    python benches/bench_mixture.py STORE FOREST --ensemble NAME --dense NAME [--tokens 200k] [--documents 120] [--low-rank] [--quick]

FOREST, its ensemble and its dense control stand in STORE (benches/forest.py makes them). The tokens of tuning come on top of the
experts', so `--dense` is trained anew for as many more steps, and gains are over that: paired, on the test half. Scales and rates are
chosen on the tune half. One JSON line per row: bits per byte, gain, parameters in all and at work on a token, tokens scored per second,
seconds of tuning. `--low-rank` adds the mixture of adapters over one shared feed-forward; `--quick` leaves out the ablations.
"""

import argparse
import json
from time import perf_counter
from typing import Any

import numpy as np
from safetensors import safe_open

from elmwood import evaluate
from elmwood.cli.jobs import open_holdout
from elmwood.cli.mix import rows_of
from elmwood.cli.screen import count
from elmwood.ensemble.mixture import open_model
from elmwood.evaluate.fit import weights
from elmwood.merge.make import Answer, merge
from elmwood.merge.mixture_build import Mixing, mix
from elmwood.merge.values import everywhere
from elmwood.records import Corpus, Ensemble, Expert, Forest, Gates, Mixture, Partition, Recipe, Record, Seed
from elmwood.store import Store
from elmwood.train import train, tune
from elmwood.train.router import tune_key

SCALES = (0.05, 0.1, 0.2)  # of task arithmetic: the sum of eight deltas is added to the seed
RATES = {"routers": (3e-3, 1e-2), "norms": (3e-3,), "shared": (1e-3,), "everything": (5e-4, 2e-3)}


class Bench:
    """The columns of all rows, on one holdout."""

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.store = asked, Store(asked.store)
        self.forest = self.store.load(asked.forest, Forest)
        self.seed, self.division = self.store.load(self.forest.seed, Seed), self.store.load(self.forest.partition, Partition)
        self.length, self.tokens = min(self.seed.context, 256), count(asked.tokens)
        spec = evaluate.HoldoutSpec(
            partition=self.division.digest, seed=self.seed.digest, length=self.length, documents=asked.documents
        )  # fmt: skip
        self.held = open_holdout(spec, self.store)
        self.columns: dict[str, np.ndarray] = {}
        self.data = self.store.load(self.division.corpus, Corpus).train  # as the dense control's, so packed before

    def column(self, record: Record) -> tuple[np.ndarray, float | None]:
        """And the tokens per second, where the model was run now."""
        started, ran = perf_counter(), []

        def load() -> Any:
            ran.append(perf_counter())
            return open_model(record, self.store)

        score = evaluate.score(record, load, self.held, self.store)
        found = evaluate.column(score, self.held, self.store)
        return found, round(len(found) / (perf_counter() - started)) if ran else None

    def tuned_loss(self, name: str) -> float:
        return evaluate.bits_per_byte(self.columns[name], self.held, self.held.tune_D).value

    def tell(self, name: str, record: Record | None = None, **facts: object) -> None:
        if record is not None:
            self.columns[name], facts["tokens_per_second"] = self.column(record)
        found = evaluate.row(name, self.columns[name], self.held, domains=len(self.division.domains))
        line = {"bench": "mixture", "row": name, "bits_per_byte": round(found.bits_per_byte, 4), "error": round(found.standard_error, 4)}
        if "dense, equal total tokens" in self.columns:
            gain = evaluate.difference(
                self.columns["dense, equal total tokens"], self.columns[name], self.held, ~self.held.tune_D
            )  # fmt: skip
            line |= {"gain": round(gain.value, 4), "gain_error": round(gain.standard_error, 4)}
        print(json.dumps(line | {"tune_half": round(self.tuned_loss(name), 4)} | facts), flush=True)

    # ---- rows

    def controls(self) -> None:
        dense = self.store.load(self.asked.dense, Expert)
        steps = dense.recipe.steps + round(self.tokens / (dense.recipe.batch * dense.recipe.length))
        longer = train(self.seed, self.data, dense.recipe.model_copy(update={"steps": steps, "threads": 1}), self.store)
        self.columns["dense, equal total tokens"], _ = self.column(longer)
        self.tell("dense, equal total tokens", tokens=longer.recipe.tokens)
        self.tell("dense, the experts' tokens", dense, tokens=dense.recipe.tokens)
        self.tell("seed", self.seed)
        self.ensemble()
        members = {digest: everywhere(1.0) for digest in self.forest.experts}
        answers = [Answer("average", {}), *(Answer("task_arithmetic", {"scale": scale}) for scale in SCALES)]
        for answer, made in zip(answers, merge(self.seed, members, answers, self.store), strict=True):
            self.tell(f"merge: {answer.method} {answer.settings.get('scale', '')}".strip(), made)

    def ensemble(self) -> None:
        """From the columns of its experts, as the table has it."""
        record = self.store.load(self.asked.ensemble, Ensemble)
        experts = [self.store.load(digest, Expert) for digest in self.forest.experts]
        loglik_NE = np.column_stack([self.column(expert)[0] for expert in experts] + [self.columns["seed"]])
        dist2_NK = evaluate.distances(self.held, self.division, self.store)
        weight_NE = weights(
            dist2_NK[:, [expert.domain or 0 for expert in experts]], record.router, record.top_k, record.temperature, record.seed_distance
        )  # fmt: skip
        name = f"c-BTM ensemble, top-{record.top_k}"
        self.columns[name] = evaluate.mix(loglik_NE[:, : weight_NE.shape[1]], weight_NE)
        self.tell(name)

    def mixture(
        self, kind: str, top_k: int = 2, seed_bias: float | None = 0.0, layout: str = "checkpoint", method: str = "average"
    ) -> Mixture:
        gates = Gates(kind=kind, top_k=top_k, seed_bias=seed_bias)
        return mix(self.forest, rows_of(self.forest, gates, self.store), Mixing(gates=gates, layout=layout, method=method), self.store)

    def tune(self, name: str, untuned: Mixture, tuned: str, rates: tuple[float, ...], balance: float = 0.01) -> tuple[Mixture, float]:
        """At each rate; the best on the tune half is the row."""
        found = []
        for rate in rates:
            recipe = Recipe(
                method="router", steps=self.tokens // (8 * self.length), batch=8, length=self.length, learning_rate=rate, balance=balance,
                tuned=tuned, weight_decay=0.0,
            )  # fmt: skip
            made = tune(untuned, self.data, recipe, self.store)
            logged = self.store.logged(tune_key(untuned, self.data, recipe))
            seconds = next(line["seconds"] for line in reversed(logged) if line.get("event") == "done")
            loads = [json.loads(line["load"]) for line in logged if line.get("event") == "load"]
            share = np.array(list(next(load for load in reversed(loads) if load).values()))
            column, speed = self.column(made)
            loss = evaluate.bits_per_byte(column, self.held, self.held.tune_D).value
            found.append((loss, rate, made, column, speed, seconds, share))
        _, rate, made, self.columns[name], speed, seconds, share = min(found, key=lambda one: one[0])
        even = 1 / share.shape[1]
        self.tell(
            name, rate=rate, rates=len(rates), tuning_tokens=self.tokens, tuning_seconds=seconds, tokens_per_second=speed,
            load=[round(float(share.min() / even), 2), round(float(share.max() / even), 2)], dead=int((share < 0.1 * even).sum()),
            **self.sizes(made),
        )  # fmt: skip
        return made, rate

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

    def mixtures(self) -> None:
        hidden = self.mixture("hidden")
        self.tell("mixture: hidden gates, untuned", hidden, **self.sizes(hidden))
        random = self.mixture("random")
        self.tell("mixture: random gates, untuned", random)
        _, rate = self.tune("mixture: routers tuned", hidden, "routers", RATES["routers"])
        self.tune("mixture: random gates, routers tuned", random, "routers", (rate,))
        self.tune("mixture: routers and norms tuned", hidden, "norms", RATES["norms"])
        self.tune("mixture: all but experts tuned", hidden, "shared", RATES["shared"])
        _, whole = self.tune("mixture: everything tuned", hidden, "everything", RATES["everything"])
        if self.asked.low_rank:
            low = self.mixture("hidden", layout="low-rank")
            self.tell("low-rank mixture: hidden gates, untuned", low, **self.sizes(low))
            self.tune("low-rank mixture: routers tuned", low, "routers", (rate,))
        if self.asked.quick:
            return
        soft = len(self.forest.experts) + 1
        self.tune("mixture: everything tuned, top-1", self.mixture("hidden", top_k=1), "everything", (whole,))
        self.tune("mixture: everything tuned, soft", self.mixture("hidden", top_k=soft), "everything", (whole,))
        self.tune("mixture: everything tuned, no load balancing", hidden, "everything", (whole,), balance=0.0)
        self.tune("mixture: everything tuned, without the seed's expert", self.mixture("hidden", seed_bias=None), "everything", (whole,))
        self.tune("mixture: everything tuned, shared parts the seed's", self.mixture("hidden", method="seed"), "everything", (whole,))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("forest")
    parser.add_argument("--ensemble", required=True)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--tokens", default="200k")
    parser.add_argument("--documents", type=int, default=120)
    parser.add_argument("--low-rank", action="store_true")
    parser.add_argument("--quick", action="store_true")
    bench = Bench(parser.parse_args())
    bench.controls()
    bench.mixtures()


if __name__ == "__main__":
    main()
