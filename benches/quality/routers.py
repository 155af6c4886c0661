"""Every router over the columns of one forest: what it gains over the strongest dense control, and what it runs for each token.

    python -m benches.quality.routers STORE [FOREST] [--random random/] [--dense dense/batch,dense/large] [--documents N] [--length N]
        [--decode 6]

Names are those of the demo (FOREST is demo/forest, the others stand in the same folder of names). Settings come from the tune half,
figures are bits per byte on the test half. Nothing is run where the columns are known, as they are after a demo. One JSON line per row:
the forest's own experts under each router and top-k, with the memory fading or whole; then the controls under the same routers.

`--decode`: instead, so many windows are read token by token by the running ensembles, as in generation. CPU time per token, and how often
a candidate joins late and reads what it missed.

N scored tokens, E experts by digest
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import Opened, open_forest, parser, say, words
from elmwood.domains.distances import nearest_place
from elmwood.domains.partition import serving
from elmwood.domains.route import router_of, weights
from elmwood.engine import silent
from elmwood.ensemble.mixture import EnsembleLM
from elmwood.evaluate import calibration
from elmwood.evaluate.comparison import ExpertColumns, Side
from elmwood.evaluate.holdout import distances
from elmwood.evaluate.losses import bits_per_byte, difference, nats
from elmwood.lm.cache import KeyValueCache
from elmwood.records import Digest, Ensemble, Expert, Partition
from elmwood.store import Store
from elmwood.study.quality.scoring import Columns, ensure

FADING = calibration.DECAYS
PLAIN = ("router", "top_k", "temperature", "seed_distance")


class Bench:
    """The holdout of a forest, and the columns of models on it."""

    def __init__(self, opened: Opened, documents: int | None, longest: int):
        self.store = opened.store
        self.table = Columns(opened.holdout(documents, longest), self.store)
        self.held = self.table.held
        self.test_D = ~self.held.tune_D
        self.seed_N = self.column(opened.seed.digest)

    def column(self, digest: Digest) -> np.ndarray:
        return ensure([("", digest)], self.table, progress=silent).columns[digest]

    def side(self, digests: Sequence[Digest]) -> Side:
        """Experts by digest, with both kinds of distances."""
        experts = [self.store.load(digest, Expert) for digest in sorted(digests)]
        division = self.store.load(experts[0].partition or "", Partition)
        served = serving(division, [(expert.partition, expert.domain) for expert in experts], self.store)
        dense2_NE, sparse2_NE = (
            nearest_place(distances(self.held, division, self.store, signal=signal), served) for signal in ("dense", "sparse")
        )
        return Side(np.column_stack([self.column(expert.digest) for expert in experts]), dense2_NE, sparse2_NK=sparse2_NE)

    def alone(self, column_N: np.ndarray) -> Side:
        """One model without a domain: all text is equally near to it."""
        near_N1 = np.zeros((len(column_N), 1), np.float32)
        return Side(np.asarray(column_N)[:, None], near_N1, sparse2_NK=near_N1)


def rows(experts: int) -> Iterator[tuple[str, int, tuple[float, ...]]]:
    """Router, top-k, and the decays that may be chosen."""
    for top_k in sorted({1, 2, min(4, experts), experts + 1}):
        yield "centroid", top_k, FADING
        yield "sparse", top_k, FADING
    for top_k in sorted({min(k, experts) for k in (1, 2, 3, 4, experts)}):
        yield "live", top_k, FADING
    yield "live", min(2, experts), (1.0,)
    yield "posterior", min(2, experts), FADING
    yield "posterior", experts + 1, FADING


def measure(bench: Bench, of: str, side: Side, against_N: np.ndarray, row: tuple[str, int, tuple[float, ...]]) -> None:
    """Calibrate one router on one side, and print what it reaches."""
    router, top_k, calibration.DECAYS = row
    started = time.process_time()
    columns = ExpertColumns.of(bench.held, bench.seed_N, side)
    (fit,) = columns.calibrate(router, [top_k])
    seconds = time.process_time() - started
    column_N, weight_NC = columns.column(fit.routing), weights(columns.signals(fit.routing), fit.routing)
    run = (weight_NC > 0).sum(1).mean() if router_of(fit.routing).distances else weight_NC.shape[1]
    loss = bits_per_byte(column_N, bench.held, bench.test_D)
    gain = difference(against_N, column_N, bench.held, bench.test_D)
    settings = asdict(fit.routing) if router == "live" else {name: getattr(fit.routing, name) for name in PLAIN}
    say(
        "routers", of=of, bits_per_byte=loss.value, standard_error=loss.standard_error, gain=gain.value, gain_error=gain.standard_error,
        run_per_token=float(run), decays=row[2] if router == "live" else None, **settings, tune_nats=fit.nats, cpu_seconds=seconds,
        tokens=len(column_N),
    )  # fmt: skip


def decode(opened: Opened, bench: Bench, count: int) -> None:
    """Read whole windows token by token under several routers at their best settings."""
    cut = bench.held.windows
    whole = np.flatnonzero((cut.length_W == cut.rows_WL.shape[1]) & (cut.score_from_W == 1))
    rows = cut.rows_WL[whole[:: max(1, len(whole) // count)][:count]].tolist()
    columns = ExpertColumns.of(bench.held, bench.seed_N, bench.side(opened.forest.experts))
    for router, top_k in (("centroid", 2), ("live", 1), ("live", 2), ("posterior", 2)):
        (fit,) = columns.calibrate(router, [top_k])
        lm = EnsembleLM(Ensemble(forest=opened.forest.digest, **asdict(fit.routing)), bench.store)
        late = watch(lm)
        lm.extend(rows[0][:8], lm.start())  # opens the models
        late.clear()
        started, tokens = time.process_time(), 0
        for row in rows:
            text = lm.start()
            for token in row:
                lm.extend([token], text)
            tokens += len(row)
        seconds = time.process_time() - started
        say("routers", measured="decode", router=router, top_k=top_k, tokens=tokens, cpu_ms_per_token=1000 * seconds / tokens,
            joins_per_1000_tokens=1000 * len(late) / tokens, missed_tokens_per_token=sum(late) / tokens)  # fmt: skip


def watch(lm: EnsembleLM) -> list[int]:
    """A list that grows by the tokens that a candidate missed, each time one joins late."""
    late: list[int] = []
    read = lm.experts._read

    def watched(body: Any, states: KeyValueCache, numbers: list[int], tokens: Sequence[int], *more: Any, **named: Any) -> Any:
        had = dict(zip(states.owner, states.length, strict=True))
        late.extend(missed for number in numbers if (missed := len(tokens) - had.get(number, 0) - 1) > 0)
        return read(body, states, numbers, tokens, *more, **named)

    lm.experts._read = watched  # type: ignore[method-assign]
    return late


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("store", type=Path)
    arguments.add_argument("forest", nargs="?", default="demo/forest")
    arguments.add_argument("--random", default="random/")
    arguments.add_argument("--dense", default="dense/batch,dense/large")
    arguments.add_argument("--documents", type=int)
    arguments.add_argument("--length", type=int, default=1024)
    arguments.add_argument("--decode", type=int)
    asked = arguments.parse_args()
    store, folder = Store(asked.store), asked.forest.rpartition("/")[0]
    opened, names = open_forest(store, asked.forest), store.names()
    bench = Bench(opened, asked.documents, asked.length)
    if asked.decode:
        decode(opened, bench, asked.decode)
        return
    dense = [bench.column(names[f"{folder}/{name}"]) for name in words(asked.dense)]
    strongest_N = min(dense or [bench.seed_N], key=lambda one_N: nats(one_N, bench.held)[bench.test_D].sum())
    for of, column_N in (("seed", bench.seed_N), ("dense", strongest_N)):
        say("routers", of=of, bits_per_byte=bits_per_byte(column_N, bench.held, bench.test_D).value)
    own = bench.side(opened.forest.experts)
    for row in rows(own.loglik_NK.shape[1]):
        measure(bench, "experts + seed", own, strongest_N, row)
    random = [digest for name, digest in names.items() if name.startswith(f"{folder}/{asked.random}")]
    controls = [("dense + seed", bench.alone(strongest_N))] + ([("random clusters + seed", bench.side(random))] if random else [])
    for of, side in controls:
        count = side.loglik_NK.shape[1]
        for router, top_k in dict.fromkeys((("centroid", count + 1), ("live", min(2, count)), ("live", count), ("posterior", count + 1))):
            measure(bench, of, side, strongest_N, (router, top_k, FADING))


if __name__ == "__main__":
    main()
