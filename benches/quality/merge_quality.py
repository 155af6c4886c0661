"""Every merge rule on the experts of a forest: bits per byte beside the output ensemble, the seed and every control.

    python -m benches.quality.merge_quality STORE FOREST [--dense NAME …] [--random NAME/] [--rules a,b] [--scales 0.2,0.5,1]
        [--ranks 16] [--temperatures 0.1] [--documents 300] [--tune 40] [--statistics 32]

Make STORE and its forests with benches/forest.py (lab/forest, lab/lora-forest; --dense lab/dense/large --random lab/random/), or with
`elmwood demo` (demo/forest --dense demo/dense/large --random demo/random/; `elmwood show` lists the names).
All scales of a rule come from one reading of the experts. A scale of 1 is an average: for a rule that sums, the scale is divided by the
number of experts. The best candidate has the least loss on `tune` documents of the tune half; lines report the other half. LoRA experts
are also merged to one LoRA, and mixed for each prompt. Experts without statistics compute them first, from so many rows (0: rules that
need them are refused). One JSON line for each row: `gain` is over the strongest dense control (the seed, if there is none), paired, with
its standard error; `over_seed` and `over_ensemble` are over those.
"""

import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from benches.common import Lines, names_below, numbers, open_forest, parser, say, words
from benches.models import leave_statistics
from elmwood.engine import Progress
from elmwood.errors import ElmwoodError
from elmwood.evaluate.comparison import Control, Side, compare
from elmwood.evaluate.holdout import distances as document_distances
from elmwood.evaluate.losses import bits_per_byte, difference
from elmwood.merge.adapters import LOW_RULES
from elmwood.merge.answers import make, title
from elmwood.merge.checkpoint import Answer
from elmwood.merge.layer_weights import everywhere
from elmwood.merge.rules.table import RULES
from elmwood.records import Ensemble, Expert, Partition, Record
from elmwood.store import Store
from elmwood.study.quality.scoring import Columns, ensure


def answers_of(rule: str, scales: Sequence[float], ranks: Sequence[float], experts: int) -> list[Answer]:
    """A rule at every scale, and of adapters at every rank, that it knows. An average is one already: it is not scaled."""
    known = LOW_RULES[rule].settings if rule in LOW_RULES else {**RULES[rule].begins, **RULES[rule].ends}
    grid: dict[str, Sequence[float]] = {}
    if "scale" in known and rule != "average":
        sums = known.get("normalise") == 0 or rule == "iso_c"
        grid["scale"] = [scale / experts for scale in scales] if sums else scales
    if "rank" in known and rule in LOW_RULES:
        grid["rank"] = ranks
    return [Answer(rule, dict(zip(grid, values, strict=True))) for values in product(*grid.values())]


class Bench:
    """A forest, its held-out text, and what has been scored."""

    def __init__(self, asked: Namespace, progress: Progress):
        self.asked, self.progress, self.store = asked, progress, Store(asked.store)
        opened = open_forest(self.store, asked.forest)
        self.forest, self.seed, self.partition = opened.forest, opened.seed, opened.division
        self.experts = [self.store.load(digest, Expert) for digest in self.forest.experts]
        self.columns = Columns(opened.holdout(asked.documents), self.store)
        self.held = self.columns.held
        self.test_D, self.tune_D = ~self.held.tune_D, self.held.tune_D.copy()
        self.tune_D[np.flatnonzero(self.tune_D)[asked.tune :]] = False  # documents are in order of id, which is chance
        self.adapters = all(one.recipe.method == "lora" for one in self.experts)
        self.seed_N = self.column(self.seed)

    def column(self, model: Record, document_D: np.ndarray | None = None) -> np.ndarray:
        """Tokens of these documents (all) under a model; what was scored before is found."""
        digest = self.store.add(model)
        windows = {} if document_D is None else {digest: np.unique(self.held.window_N[document_D[self.held.document_N]])}
        return ensure([("score", digest)], self.columns, windows=windows, progress=self.progress).columns[digest]

    def side(self, names: Sequence[Record], partition: Partition) -> Side:
        experts = sorted(names, key=lambda one: getattr(one, "domain", 0) or 0)
        distances = document_distances(self.held, partition, self.store, self.progress)
        return Side(np.column_stack([self.column(one) for one in experts]), distances)

    def controls(self) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        """The rows of the honest table, and the best single expert; sets what gains are over."""
        side = self.side(self.experts, self.partition)
        dense = {name: self.column(self.store.load(name)) for name in self.asked.dense}
        random = None
        if self.asked.random:
            others = [self.store.load(name, Expert) for name in names_below(self.store, [self.asked.random])]
            random = self.side(others, self.store.load(others[0].partition or "", Partition))
        table = compare(self.held, self.seed_N, side, [Control(name, one) for name, one in dense.items()], random)
        self.against = min([*dense.values()] or [self.seed_N], key=lambda one: bits_per_byte(one, self.held, self.test_D).value)
        self.ensemble_N = table.column_N
        for row in table.rows:
            say_row(self.asked, row.name, row.bits_per_byte, row.standard_error, row.gain, row.gain_error, role=row.role)
        tune_E = [bits_per_byte(column, self.held, self.held.tune_D).value for column in side.loglik_NK.T]
        alone = int(np.argmin(tune_E))
        yield "best single expert", side.loglik_NK[:, alone], {"role": "control"}

    def chosen(self, name: str, made: Mapping[str, Record], **about: Any) -> tuple[str, np.ndarray, dict[str, Any]]:
        """Of several models the best on the tune half."""
        started = time.process_time()
        columns = {one: self.column(model, self.tune_D) for one, model in made.items()}
        losses = {one: bits_per_byte(column, self.held, self.tune_D).value for one, column in columns.items()}
        best = min(losses, key=lambda one: losses[one])
        column = self.column(made[best], self.test_D)
        about |= {"answer": best, "answers": len(made), "tune": round(losses[best], 5)}
        return name, column, {"role": "result", **about, "search_cpu": round(time.process_time() - started, 1)}

    def merges(self) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        """Every rule at its best scale."""
        rules = words(self.asked.rules) or [*RULES, *(LOW_RULES if self.adapters else ())]
        members = {one.digest: everywhere(1.0) for one in self.experts}
        for rule in rules:
            answers = answers_of(rule, numbers(self.asked.scales), numbers(self.asked.ranks), len(members))
            started = time.process_time()
            try:
                made = make(self.seed, members, answers, self.store, False, self.progress)
            except ElmwoodError as error:
                say("merge_quality", forest=self.asked.forest, model=rule, refused=str(error))
                continue
            spent = round(time.process_time() - started, 1)
            errors = [one.error for one in made if one.error is not None]
            about = {"merge_cpu": spent} | ({"error_least": min(errors), "error_most": max(errors)} if errors else {})
            yield self.chosen(rule, dict(zip(map(title, answers), made, strict=True)), **about)

    def mixed(self) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        """Adapters summed for each prompt, at every top-k and temperature."""
        plain = Ensemble(forest=self.forest.digest, mixing="weights")
        made = {
            f"top-{top_k} temperature={t:g}": plain.model_copy(update={"top_k": top_k, "temperature": t})
            for top_k in (2, len(self.experts))
            for t in numbers(self.asked.temperatures)
        }
        yield self.chosen("weights mixed for each prompt", made)


def say_row(asked: Namespace, model: str, loss: float, error: float, gain: float | None, gain_error: float | None, **about: Any) -> None:
    say("merge_quality", forest=asked.forest, model=model, bits_per_byte=loss, error=error, gain=gain, gain_error=gain_error, **about)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store")
    options.add_argument("forest")
    options.add_argument("--dense", nargs="*", default=[])
    options.add_argument("--random")
    options.add_argument("--rules", default="", help="default: all")
    options.add_argument("--scales", default="0.2,0.5,1")
    options.add_argument("--ranks", default="16")
    options.add_argument("--temperatures", default="0.1", help="of the weights mixed for each prompt")
    options.add_argument("--documents", type=int, default=300)
    options.add_argument("--tune", type=int, default=40)
    options.add_argument("--statistics", type=int, default=32)
    asked = options.parse_args()
    progress = Lines()
    bench = Bench(asked, progress)
    if asked.statistics:
        leave_statistics(bench.experts, store=bench.store, rows=asked.statistics, progress=progress)
    for rows in (bench.controls(), bench.merges(), bench.mixed() if bench.adapters else []):
        for name, column, about in rows:
            loss = bits_per_byte(column, bench.held, bench.test_D)
            worse = difference(column, bench.against, bench.held, bench.test_D)
            for key, other in (("over_seed", bench.seed_N), ("over_ensemble", bench.ensemble_N)):
                value, error = difference(column, other, bench.held, bench.test_D)
                about |= {key: round(-value, 5), f"{key}_error": round(error, 5)}
            say_row(asked, name, *loss, -worse.value, worse.standard_error, **about)


if __name__ == "__main__":
    main()
