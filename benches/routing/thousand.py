"""A forest of a thousand trained experts: what each command takes, and what routers gain.

    python -m benches.routing.thousand make STORE --corpus FOLDER --seed NAME [--domains 1000] [--parts 1000] [--tokens 2048] [--rank 4]
        [--batch 1] [--rate 6e-3] [--dense-rate 1e-3] [--together 50] [--steps expert,part,full,lora]
    python -m benches.routing.thousand study STORE --seed NAME [--documents 80] [--windows 2] [--near 8] [--posterior 20]
        [--posterior-windows 1]
    python -m benches.routing.thousand serve STORE [--requests 40]

`make` runs elmwood's commands, each in a process: domains and random parts of the corpus, experts of both, a dense control in full and one
adapter on all text at as many tokens, and a forest. One line per command: seconds, CPU seconds, peak memory. What is done is found again.
`study` scores the first windows of held-out documents: each expert where it is among the `near` nearest by dense or sparse centroids, and
all of them in the first windows of `posterior` documents. What was not scored counts as the seed. Settings of routers come from the tune
half, figures are bits per byte on the test half, gains are over dense training in full, paired, with errors over documents. One rng seed.
`serve` serves the ensemble, and asks for continuations of held-out text: time until it listens, seconds of an answer, memory.

N scored tokens, D documents, W windows, E experts by digest
"""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import numpy as np

from benches.common import Opened, cpu_seconds, figures, own_memory, parser, say, words
from elmwood.corpus.tokens import token_bytes
from elmwood.domains.distances import nearest_place
from elmwood.domains.partition import serving
from elmwood.domains.route import best_of, weights
from elmwood.evaluate.comparison import ExpertColumns, Side
from elmwood.evaluate.holdout import Holdout
from elmwood.evaluate.losses import bits_per_byte, difference
from elmwood.records import Ensemble, Expert, Forest, Partition, Seed
from elmwood.store import Store
from elmwood.study.quality.evaluation import measure_distances
from elmwood.study.quality.scoring import Columns, ensure
from elmwood.units import parse_count

ELMWOOD = (sys.executable, "-m", "elmwood")
# names of experts: their partition, and what it is made with
SIDES = {"expert": ("domains", ()), "part": ("parts", ("--method", "random"))}


# ---- making it ------------------------------------------------------------------------------------------------------


def run(what: str, *asked: object) -> None:
    """Run a command of elmwood, and say what it took."""
    started = perf_counter()
    process = subprocess.Popen([*ELMWOOD, *map(str, asked)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    say(
        "thousand", step=what, seconds=perf_counter() - started, cpu_seconds=used.ru_utime + used.ru_stime, peak_mb=used.ru_maxrss / 1e3,
        failed=process.returncode or None,
    )  # fmt: skip
    if process.returncode:
        raise SystemExit(f"elmwood {' '.join(map(str, asked))} ended with {process.returncode}")


def make(asked: Namespace) -> None:
    store, steps = ("--store", asked.store), words(asked.steps)
    rows = ("--seed", asked.seed, "--length", asked.length, "--workers", 1, *store)
    adapter = ("--method", "lora", "--rank", asked.rank)
    for name, (partition, more) in SIDES.items():
        if name in steps:
            run(f"cluster {partition}", "cluster", asked.corpus, "--domains", asked.domains, *more, "--name", partition, *store)
            count = asked.parts if name == "part" else asked.domains
            run(
                f"train {partition}", "train", partition, *rows, *adapter, "--learning-rate", asked.rate, "--batch", asked.batch,
                "--tokens", parse_count(asked.tokens), "--together", asked.together, "--domains", f"0-{count - 1}", "--name", name,
            )  # fmt: skip
            run(f"forest {partition}", "forest", partition, f"{name}/", "--name", f"forest/{partition}", *store)
    pooled = ("train", "domains", *rows, "--domains", "pooled", "--tokens", asked.domains * parse_count(asked.tokens))
    batch = ("--batch", asked.dense_batch)
    if "full" in steps:
        run("dense in full", *pooled, "--method", "full", *batch, "--learning-rate", asked.dense_rate, "--name", "full")
    if "lora" in steps:
        run("dense adapter", *pooled, *adapter, *batch, "--learning-rate", asked.rate / 2, "--name", "lora")


# ---- quality --------------------------------------------------------------------------------------------------------


class Sample:
    """The first windows of held-out documents, and the columns of models on them."""

    def __init__(self, opened: Opened, documents: int, windows: int, length: int):
        self.opened, self.store = opened, opened.store
        self.columns = Columns(opened.holdout(documents, length), opened.store)
        whole = self.columns.held
        self.window_W = first_windows(whole, range(documents), windows)
        self.kept_N = np.isin(whole.window_N, self.window_W)
        self.held = cut(whole, self.kept_N)

    def score(self, digests: Sequence[str], windows: dict[str, np.ndarray]) -> np.ndarray:
        """Columns [N, models], NaN where a model was not asked."""
        found = ensure([("", digest) for digest in digests], self.columns, windows=windows)
        say("thousand", step="score", models=len(digests), run=found.run, tokens=found.tokens, seconds=found.seconds)
        return np.column_stack([found.columns[digest][self.kept_N] for digest in digests])

    def column(self, digest: str) -> np.ndarray:
        return self.score([digest], {digest: self.window_W})[:, 0]

    def distances(self, name: str, experts: Sequence[Expert]) -> tuple[np.ndarray, np.ndarray]:
        """Dense and sparse [N, E]."""
        division = self.store.load(name, Partition)
        served = serving(division, [(one.partition, one.domain) for one in experts], self.store)
        dense, rare = measure_distances(self.columns.held, division, self.store)
        assert rare is not None
        return nearest_place(dense[self.kept_N], served), nearest_place(rare[self.kept_N], served)


def first_windows(held: Holdout, documents: Sequence[int], count: int) -> np.ndarray:
    """The first windows of some documents."""
    document_W = held.windows.document_W
    begin_W = np.searchsorted(document_W, document_W)
    return np.flatnonzero(np.isin(document_W, documents) & (np.arange(len(document_W)) - begin_W < count))


def cut(held: Holdout, kept_N: np.ndarray) -> Holdout:
    """Documents as far as some tokens go. Only what calibration and losses look at."""
    length_V = np.array([len(one) for one in token_bytes(held.tokenizer)])
    token_N = held.windows.rows_WL[held.scored_WL]
    document_n = held.document_N[kept_N]
    met = np.unique(document_n)
    bytes_D = np.bincount(document_n, length_V[token_N[kept_N]], len(held.bytes_D))[met].astype(np.int64)
    return held._replace(document_N=np.searchsorted(met, document_n), bytes_D=bytes_D, tune_D=held.tune_D[met])


def rows(sample: Sample, sides: dict[str, Side], seed_N: np.ndarray, dense_N: np.ndarray) -> Iterator[tuple[str, float, np.ndarray, dict]]:
    """Name, candidates run per token, column and settings of each routed row."""
    alone = np.zeros((len(seed_N), 1), np.float32)
    sides = {**sides, "dense and the seed": Side(dense_N[:, None], alone, sparse2_NK=alone)}
    asked = [
        *(("expert", router, (1, 2, 4)) for router in ("centroid", "sparse")),
        *(("expert", router, (1, 2, 4)) for router in ("live", "live-sparse")),
        ("part", "live", (1, 2)),
        ("dense and the seed", "live", (1,)),
    ]
    for name, router, top_ks in [one for one in asked if one[0] in sides]:
        columns = ExpertColumns.of(sample.held, seed_N, sides[name])
        for top_k in top_ks:
            (fit,) = columns.calibrate(router, [top_k])
            weight_NC = weights(columns.signals(fit.routing), fit.routing)
            yield f"{name}, {router}, {top_k}", float((weight_NC > 0).sum(1).mean()), columns.column(fit.routing), asdict(fit.routing)


def study(asked: Namespace) -> None:
    store = Store(asked.store)
    seed, division = store.load(asked.seed, Seed), store.load("domains", Partition)
    forest = store.load("forest/domains", Forest)
    sample = Sample(Opened(store, forest, seed, division, None), asked.documents, asked.windows, asked.length)
    plain = {"seed": asked.seed, "dense in full": "full/pooled", "dense adapter": "lora/pooled"}
    plain_N = {what: sample.column(store.resolve(name)) for what, name in plain.items() if name in store.names()}
    seed_N, dense_N = plain_N["seed"], plain_N["dense in full"]
    chosen = range(0, asked.documents, max(1, asked.documents // asked.posterior))
    few_W = first_windows(sample.columns.held, chosen, asked.posterior_windows)
    sides = {}
    for name, (partition, _) in SIDES.items():
        if f"forest/{partition}" in store.names():
            members = [store.load(one, Expert) for one in store.load(f"forest/{partition}", Forest).experts]
            dist2_NE, rare2_NE = sample.distances(partition, members)
            both = [dist2_NE, rare2_NE] if name == "expert" else [dist2_NE]  # of parts, `live` alone is asked, for two
            windows = wanted(sample, members, both, asked.near if name == "expert" else 2)
            if name == "expert":
                windows = {digest: np.union1d(window_W, few_W) for digest, window_W in windows.items()}
            loglik_NE = sample.score([one.digest for one in members], windows)
            sides[name] = Side(np.where(np.isnan(loglik_NE), seed_N[:, None], loglik_NE), dist2_NE, sparse2_NK=rare2_NE)
    held, test_D = sample.held, ~sample.held.tune_D

    def tell(name: str, run: float, column_N: np.ndarray, **more: object) -> None:
        over = difference(seed_N, column_N, held, test_D)
        say(
            "thousand", row=name, run_per_token=run, **figures(column_N, dense_N, held, test_D), over_seed=over.value,
            over_seed_error=over.standard_error, tokens=len(column_N), **more,
        )  # fmt: skip

    for name, column_N in plain_N.items():
        tell(name, 1, column_N)
    for name, per_token, column_N, routing in rows(sample, sides, seed_N, dense_N):
        tell(name, per_token, column_N, **routing)
    posterior(sample, few_W, [store.load(one, Expert) for one in forest.experts], sides["expert"], seed_N, dense_N)


def wanted(sample: Sample, members: Sequence[Expert], dist2: Sequence[np.ndarray], near: int) -> dict[str, np.ndarray]:
    """The windows where each expert is among the nearest."""
    window_N = sample.columns.held.window_N[sample.kept_N]
    near_NE = np.any([best_of(-one, near) & np.isfinite(one) for one in dist2], axis=0)
    return {one.digest: np.unique(window_N[near_N]) for one, near_N in zip(members, near_NE.T, strict=True)}


def posterior(
    sample: Sample, windows_W: np.ndarray, members: Sequence[Expert], side: Side, seed_N: np.ndarray, dense_N: np.ndarray
) -> None:  # fmt: skip
    """A few windows in which every expert is known: the posterior over all, beside the other routers on the same tokens."""
    whole = sample.columns.held
    kept_N = np.isin(whole.window_N, windows_W)
    held, mine_N = cut(whole, kept_N), kept_N[sample.kept_N]
    loglik_NE = np.column_stack([sample.columns[one.digest].loglik_N[kept_N] for one in members])
    rare2_NE = side.sparse2_NK
    assert rare2_NE is not None
    few = ExpertColumns.of(held, seed_N[mine_N], Side(loglik_NE, side.dist2_NK[mine_N], sparse2_NK=rare2_NE[mine_N]))
    test_D = ~held.tune_D
    for name, column_N in (("seed", seed_N[mine_N]), ("dense in full", dense_N[mine_N])):
        say("thousand", few=name, **figures(column_N, dense_N[mine_N], held, test_D), tokens=len(column_N))
    for router, top_k in (("centroid", 2), ("sparse", 2), ("live", 2), ("live-sparse", 2), ("posterior", 2), ("posterior", 16),
                          ("posterior", len(members) + 1)):  # fmt: skip
        (fit,) = few.calibrate(router, [top_k])
        found = figures(few.column(fit.routing), dense_N[mine_N], held, test_D)
        say("thousand", few=f"{router}, {top_k}", **found, **asdict(fit.routing))
    own, count = held.document_N, len(held.bytes_D)
    sum_DE = np.stack([np.bincount(own, loglik_N, count) for loglik_N in loglik_NE.T], 1)
    best_D, last_D = sum_DE.argmax(1), np.searchsorted(own, np.arange(count), "right") - 1
    loss = bits_per_byte(loglik_NE[np.arange(len(own)), best_D[own]], held, test_D)
    say("thousand", few="the best expert of each document", bits_per_byte=loss.value)
    for kind, dist2_NE in (("dense", side.dist2_NK), ("sparse", rare2_NE)):
        near_DE = dist2_NE[mine_N][last_D]
        rank_D = (near_DE < near_DE[np.arange(count), best_D, None]).sum(1)
        say(
            "thousand",
            few=f"nearer experts than the best of each document, {kind}",
            median=float(np.median(rank_D)),
            most=int(rank_D.max()),
        )


# ---- serving --------------------------------------------------------------------------------------------------------


def serve(asked: Namespace) -> None:
    """Time until it listens, answers, memory."""
    store = Store(asked.store)
    forest = store.load("forest/domains", Forest)
    ensemble = Ensemble(
        forest=forest.digest, router="live-sparse", top_k=2, temperature=2.0, seed_distance=1.2, memory=0.3, decay=0.92
    )  # near what the study chooses
    store.add(ensemble)
    domain = {digest: store.load(digest, Expert).domain for digest in forest.experts}
    started = perf_counter()
    process = subprocess.Popen(
        [*ELMWOOD, "serve", ensemble.digest, "--port", "0", "--json", "--store", str(asked.store), "--log", "none"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    try:
        url = json.loads(process.stdout.readline())["url"]
        seconds, cpu = perf_counter() - started, cpu_seconds(process.pid)
        say("thousand", step="serve: listens", seconds=seconds, cpu_seconds=cpu, memory_mb=own_memory(process.pid))
        texts = held_texts(store, asked.requests)
        for turn in ("first time", "again"):
            took, spoke, own = [], set(), 0
            for place, text in texts:
                asking = perf_counter()
                answer = ask(url, text)
                took.append(perf_counter() - asking)
                found = {one["id"] for one in answer["choices"][0]["elmwood"]["experts"]} & domain.keys()
                own += place in {domain[digest] for digest in found}
                spoke |= found
            say(
                "thousand", step=f"serve: {turn}", requests=len(texts), median_s=float(np.median(took)), most_s=max(took),
                cpu_seconds=cpu_seconds(process.pid) - cpu, memory_mb=own_memory(process.pid), experts_that_spoke=len(spoke), own_spoke=own,
            )  # fmt: skip
            cpu = cpu_seconds(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def held_texts(store: Store, count: int) -> list[tuple[int, str]]:
    """The beginnings of held-out documents, of as many domains: (domain, text)."""
    from elmwood.corpus.build import documents

    division = store.load("domains", Partition)
    found = []
    for place in range(0, len(division.domains), max(1, len(division.domains) // count)):
        found += [(place, one.text[:150]) for one in documents(division.domains[place].holdout, store)][:1]
    return found[:count]


def ask(url: str, text: str) -> dict:
    body = {"model": "auto", "prompt": text, "max_tokens": 16, "temperature": 0, "elmwood": {"provenance": True}}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=("make", "study", "serve"))
    options.add_argument("store", type=Path)
    options.add_argument("--corpus", default="sample")
    options.add_argument("--seed", default="seed")
    options.add_argument("--domains", type=int, default=1000)
    options.add_argument("--tokens", default="2048", help="of each expert")
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--rank", type=int, default=4)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--dense-batch", type=int, default=4)
    options.add_argument("--rate", type=float, default=6e-3)
    options.add_argument("--dense-rate", type=float, default=1e-3)
    options.add_argument("--together", type=int, default=50)
    options.add_argument("--parts", type=int, default=1000, help="experts of random parts that are trained")
    options.add_argument("--steps", default="expert,part,full,lora")
    options.add_argument("--documents", type=int, default=80)
    options.add_argument("--windows", type=int, default=2)
    options.add_argument("--near", type=int, default=8)
    options.add_argument("--posterior", type=int, default=20)
    options.add_argument("--posterior-windows", type=int, default=1)
    options.add_argument("--requests", type=int, default=40)
    asked = options.parse_args()
    {"make": make, "study": study, "serve": serve}[asked.what](asked)


if __name__ == "__main__":
    main()
