"""How many blocks it takes to decide what a change of a real forest is worth.

    python -m benches.quality.compare STORE FOREST [--documents N] [--every 4] [--replaced PREFIX ...] [--merges NAME ...] [--unrouted]

Typical changes: an expert is added, or replaced by PREFIX/domain; the temperature rises by half; a second expert is used; a merge
replaces the seed. Missing columns are run first, only where a model has weight. All differences on the gate split are then known, and
each is decided in many random orders: drawing uniformly from all blocks; uniformly from those that the change can touch; from these by
the weight that moves, as `elmwood compare` does; and the same with control variates. Blocks are repeated until a full evaluation has
10,000: mean, spread and the touched share stay the same. One JSON line for each change, with r (standard deviation over mean), and one
for all changes of a kind.

G blocks of the gate split, B of them that may be drawn, N scored tokens in them, M models, K domains
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benches.common import names_below, open_forest, parser, say
from elmwood.engine import silent
from elmwood.evaluate.holdout import GATE, Holdout
from elmwood.evaluate.sequential.decision import Population, StoppingRule, decide, per_byte, worst
from elmwood.evaluate.sequential.error_budget import random_order
from elmwood.records import Ensemble, Expert, Forest, Partition, Record
from elmwood.store import Store
from elmwood.study.quality.contest import Nearness, Pair, bound_blocks, pair_models
from elmwood.study.quality.scoring import Columns, ensure

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

LEAST = 0.002  # bits per byte
CLIP = 0.5
WHOLE = 10_000  # blocks of a full evaluation


class Real(NamedTuple):
    """A forest's gate split, its routing known."""

    columns: Columns
    base: Ensemble
    forest: Forest
    division: Partition
    near: Nearness

    def ensemble(self, members: Sequence[str], **settings: object) -> Ensemble:
        chosen = self.forest.model_copy(update={"experts": tuple(sorted(members))})
        self.columns.store.add(chosen)
        return self.base.model_copy(update={"forest": chosen.digest} | settings)

    def pair(self, a: Record, b: Record) -> Pair:
        return pair_models(a, b, self.columns, silent, near=self.near)


class Change(NamedTuple):
    way: str  # how experts are routed
    what: str
    label: str
    a: Record
    b: Record
    new: str | None  # the model whose column is not known beforehand; None: all are taken as unknown


def open_gate_split(store: Store, name: str, documents: int | None) -> Real:
    opened = open_forest(store, name)
    forest, division = opened.forest, opened.division
    base = opened.ensemble or Ensemble(forest=forest.digest, temperature=0.08, seed_distance=0.992)
    columns = Columns(opened.holdout(documents, 256), store)
    return Real(columns, base, forest, division, Nearness(columns.held, GATE, store, silent))


def changes(real: Real, every: int, replaced: Sequence[str], merges: Sequence[str], unrouted: bool) -> Iterator[Change]:
    """What people change: every n-th expert is added to the others; experts are replaced by those named PREFIX/domain; the
    temperature rises by half; a second expert is used; a merge replaces the seed."""
    store, division = real.columns.store, real.division
    experts = {store.load(digest, Expert).domain or 0: digest for digest in real.forest.experts}
    ways: dict[str, dict[str, Any]] = {f"top-{k}": {"top_k": k} for k in (1, 2)}
    if unrouted:
        ways |= {"unrouted": {"router": "uniform", "top_k": 10**6, "seed_distance": None}}
    for way, settings in ways.items():
        everyone = real.ensemble(real.forest.experts, **settings)
        for domain in sorted(experts)[::every]:
            others = [digest for digest in real.forest.experts if digest != experts[domain]]
            label = division.domains[domain].name
            yield Change(way, "expert added", label, real.ensemble(others, **settings), everyone, experts[domain])
        for prefix in replaced:
            for name in names_below(store, [f"{prefix}/"]):
                new = store.load(name, Expert)
                others = [digest for digest in real.forest.experts if digest != experts[new.domain or 0]]
                yield Change(way, f"replaced: {prefix}", name, everyone, real.ensemble([*others, new.digest], **settings), new.digest)
        if way == "top-2":
            yield Change(
                way, "temperature", "1.5 times", everyone, everyone.model_copy(update={"temperature": 1.5 * everyone.temperature}), None
            )
            yield Change(way, "top-1 to top-2", "", real.ensemble(real.forest.experts, top_k=1), everyone, None)
    for name in names_below(store, merges):
        yield Change("one model", "merge for seed", name, store.load(real.forest.seed), store.load(name), store.resolve(name))


def decide_all(real: Real, asked: Iterable[Change], orders: int) -> None:
    """One line for each change, one for all of a kind."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for change in asked:
        pair = real.pair(change.a, change.b)
        held = real.columns.held
        spoken_NM = (pair.weight_a_NM > 0) | (pair.weight_b_NM > 0)
        window_N = held.window_N[pair.token_N]
        windows = {digest: np.unique(window_N[spoken_NM[:, m]]) for m, digest in enumerate(pair.models)}
        found = ensure([(digest[:8], digest) for digest in pair.models], real.columns, windows=windows, progress=silent)
        loglik_NM = np.column_stack([found.columns[digest][pair.token_N] for digest in pair.models])
        row = measure(change, pair, held, loglik_NM, orders)
        say("compare", measured="change", way=change.way, change=change.what, label=change.label, **row)
        rows.setdefault((change.way, change.what), []).append(row)
    for (way, what), mine in rows.items():
        say(
            "compare",
            measured="together",
            way=way,
            change=what,
            count=len(mine),
            **together([row for row in mine if row["may_differ"] > 0]),
        )


def measure(change: Change, pair: Pair, held: Holdout, loglik_NM: Floats, orders: int) -> dict[str, Any]:
    """What the differences look like, and how many blocks it takes to know, in four ways."""
    touched_G, blocks = pair.touched_G, len(pair.block_G)
    here_N = touched_G[pair.block_N]
    pair, loglik_NM = pair.within(touched_G), loglik_NM[here_N]
    gain_N = worst(loglik_NM, pair.weight_b_NM) - worst(loglik_NM, pair.weight_a_NM)
    value_G = per_byte(np.bincount(pair.block_N, gain_N, blocks).astype(float), held.block_bytes_B[pair.block_G])
    known_NM = np.where(np.array([change.new in (None, digest) for digest in pair.models]), np.nan, loglik_NM)
    bounds = bound_blocks(pair, known_NM, held, np.flatnonzero(touched_G), CLIP)
    copies = -(-WHOLE // blocks)  # every block so many times: N blocks at least, the same mean and spread
    value_B, all_B = np.tile(value_G[touched_G], copies), np.tile(value_G, copies)
    by_weight = copied(bounds, copies)
    wide_B = np.full(len(value_B), CLIP)
    everywhere = np.full(len(all_B), CLIP)
    share = len(value_B) / len(all_B)
    assert bounds.feature_BF is not None
    row = {
        "blocks": blocks, "copies": copies, "N": len(all_B), "may_differ": round(share, 4),
        "moved": round(float(bounds.feature_BF[:, 0].mean()), 3), "effect": round(float(value_B.mean()), 5), "r": spread(value_B),
        "r_all": spread(all_B), "deviation_over_least": round(float(value_B.std()) / LEAST, 1), "proven": bounds.proven_low,
    }  # fmt: skip
    ways = {
        "all uniformly": (all_B, Population(-everywhere, everywhere, len(all_B)), LEAST * share),
        "touched uniformly": (value_B, Population(-wide_B, wide_B, len(all_B)), LEAST),
        "by weight": (value_B, by_weight._replace(feature_BF=None), LEAST),
        "by weight, predicted": (value_B, by_weight, LEAST),
    }
    return row | {
        way: runs(some_B, population, StoppingRule(worthless=least, cap=len(some_B)), orders)
        for way, (some_B, population, least) in ways.items()
    }


def copied(bounds: Population, copies: int) -> Population:
    assert bounds.scale_B is not None
    assert bounds.feature_BF is not None
    return bounds._replace(
        low_B=np.tile(bounds.low_B, copies), high_B=np.tile(bounds.high_B, copies), scale_B=np.tile(bounds.scale_B, copies),
        feature_BF=np.tile(bounds.feature_BF, (copies, 1)),
    )  # fmt: skip


def spread(value_B: Floats) -> float | None:
    """r: the standard deviation over the mean."""
    return round(float(value_B.std() / abs(value_B.mean())), 2) if value_B.mean() else None


def runs(value_B: Floats, bounds: Population, rule: StoppingRule, orders: int) -> dict[str, Any]:
    """Mean of the blocks drawn over random orders, and the answers."""
    found = [
        decide(lambda places: value_B[places], random_order(f"{n}".encode(), len(value_B), bounds.scale_B), bounds, rule)
        for n in range(orders)
    ]
    wrong = {"better": value_B.mean() <= 0, "not better": value_B.mean() >= rule.worthless}
    return {
        "drawn": round(float(np.mean([one.drawn for one in found])), 1), "clipped": sum(one.clipped for one in found),
        "wrong": sum(bool(wrong.get(one.outcome)) for one in found),
        **{outcome: sum(one.outcome == outcome for one in found) for outcome in ("better", "not better", "undecided")},
    }  # fmt: skip


def together(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over changes of one kind; N over the blocks drawn, the worst and the median."""
    made: dict[str, Any] = {name: round(float(np.median([row[name] for row in rows])), 3)
                            for name in ("may_differ", "moved", "r", "r_all", "deviation_over_least")}  # fmt: skip
    whole = rows[0]["N"]
    for way in ("all uniformly", "touched uniformly", "by weight", "by weight, predicted"):
        drawn = np.array([row[way]["drawn"] for row in rows])
        made[way] = {"drawn": round(float(np.median(drawn)), 1), "N_over_drawn": [round(float(whole / drawn.max()), 1),
                     round(float(np.median(whole / drawn)), 1)], **{outcome: sum(row[way][outcome] for row in rows)
                     for outcome in ("better", "not better", "undecided", "wrong", "clipped")}}  # fmt: skip
    return {"N": whole, **made}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("store", type=Path)
    options.add_argument("forest", help="or an ensemble, whose temperature is taken; of a forest it is 0.08, with the seed at 0.992")
    options.add_argument("--documents", type=int, help="at most so many held-out documents")
    options.add_argument("--every", type=int, default=1, help="add every n-th expert")
    options.add_argument("--replaced", nargs="*", default=[], help="names of experts, up to the number of their domain")
    options.add_argument("--merges", nargs="*", default=[], help="names of merges")
    options.add_argument("--unrouted", action="store_true", help="as well: needs all columns on all blocks")
    options.add_argument("--orders", type=int, default=20, help="random orders of each change")
    asked = options.parse_args()
    real = open_gate_split(Store(asked.store), asked.forest, asked.documents)
    decide_all(real, changes(real, asked.every, asked.replaced, asked.merges, asked.unrouted), asked.orders)


if __name__ == "__main__":
    main()
