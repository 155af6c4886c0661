"""What the score table costs, and what it saves.

    python -m benches.speed.table [--tokens 1000000] [--experts 64] [--candidates 10000]   synthetic columns; a minute on two quiet cores
    python -m benches.speed.table real STORE FOREST [--documents N]                        columns of a forest's models, run if missing

One JSON line per measurement. "ranked": candidates are static mixtures (Dirichlet weights over subsets of 2 to 16 experts). All are scored
on 1/32 of the blocks, the best 1,000 on 1/8, the best 100 on all. A peer scores --exhaustive of them on all tokens; the line has the rank
correlation of the orders. "weights": sequential quadratic programming, and expectation-maximisation as its peer. "storage": bytes per
token and expert, and the error of ensembles in bits per byte, of plain half precision and of what is stored, against single precision.
"saving": seconds to score one candidate from the table, over seconds to run its experts.

N tokens, E experts, C candidates
"""

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benches.common import open_forest, parser, say, timed
from elmwood.engine import cores
from elmwood.evaluate.columns import round_to_half, run
from elmwood.evaluate.holdout import open_holdout
from elmwood.evaluate.losses import bits_per_byte, block_nats, mix
from elmwood.evaluate.subsets import optimum, probabilities, rank
from elmwood.store import Store

Floats = NDArray[np.floating]
TOKENS_PER_BLOCK = 500  # about 2 KiB of text


def columns(tokens: int, experts: int) -> Floats:
    """Synthetic columns: a loss that tokens share, what blocks of a domain gain from its experts, and noise of each [N, E] float16."""
    rng = np.random.default_rng(0)
    domain_N = rng.integers(8, size=-(-tokens // TOKENS_PER_BLOCK)).repeat(TOKENS_PER_BLOCK)[:tokens]
    gain_KE = rng.normal(0, 0.3, (8, experts)).astype(np.float32)
    loglik_NE = np.empty((tokens, experts), np.float16)
    shared_N = rng.gamma(1.0, 2.0, tokens).astype(np.float32)
    for e in range(experts):
        loglik_NE[:, e] = np.minimum(0, -shared_N + gain_KE[domain_N, e] + 0.4 * rng.standard_normal(tokens, dtype=np.float32))
    return loglik_NE


def draw_candidates(candidates: int, experts: int) -> Floats:
    """Weights of candidates [C, E]."""
    rng = np.random.default_rng(1)
    weight_CE = np.zeros((candidates, experts))
    for weight_E in weight_CE:
        members = rng.choice(experts, min(experts, int(rng.integers(2, 17))), replace=False)
        weight_E[members] = rng.dirichlet(np.ones(len(members)))
    return weight_CE


def rank_synthetic(tokens: int, experts: int, candidates: int, exhaustive: int) -> None:
    loglik_NE, weight_CE = columns(tokens, experts), draw_candidates(candidates, experts)
    block_N = np.arange(tokens) // TOKENS_PER_BLOCK
    (p_NE, peak_N), opening = timed(lambda: probabilities(loglik_NE))
    found, seconds = timed(lambda: rank(p_NE, peak_N, weight_CE, block_N))
    some_C = np.sort(np.random.default_rng(2).permutation(candidates)[:exhaustive])
    some_C = np.union1d(some_C, found.order_C[:10])
    exact, peer = timed(lambda: rank(p_NE, peak_N, weight_CE[some_C], block_N, keep=()))
    place_C = np.empty(candidates, np.int64)
    place_C[found.order_C] = np.arange(candidates)
    say("table", measured="ranked", tokens=tokens, experts=experts, candidates=candidates, cores=cores(), opening_seconds=round(opening, 2),
        seconds=round(seconds, 2), under_a_minute=seconds + opening < 60, exact=found.exact,
        exhaustive_seconds_all=round(peer * candidates / len(some_C), 1), exhaustive_of=len(some_C),
        rank_correlation=round(float(spearmanr(place_C[some_C], exact.nats_C).statistic), 4),
        best_agrees=bool(found.order_C[0] == some_C[exact.order_C[0]]))  # fmt: skip
    optima(loglik_NE[:, : min(experts, 16)].astype(np.float32))


def optima(loglik_NE: Floats) -> None:
    best, seconds = timed(lambda: optimum(loglik_NE))
    p_NE, _ = probabilities(loglik_NE)
    weight_E, passes, started = np.full(p_NE.shape[1], 1 / p_NE.shape[1], np.float32), 0, time.perf_counter()
    gap = np.inf
    while gap > max(best.gap, 1e-5) and passes < 300:
        ratio_E = (p_NE / (p_NE @ weight_E)[:, None]).mean(0)
        gap, weight_E, passes = float(ratio_E.max()) - 1, weight_E * ratio_E, passes + 1
    peer = time.perf_counter() - started
    say("table", measured="weights", tokens=len(p_NE), experts=p_NE.shape[1], gap=best.gap, passes=best.passes, seconds=round(seconds, 2),
        em_gap=gap, em_passes=passes, em_seconds=round(peer, 2))  # fmt: skip


def measure_real(store: Store, name: str, documents: int | None) -> None:
    from elmwood.ensemble.mixture import open_model

    opened = open_forest(store, name)
    forest, seed = opened.forest, opened.seed
    held = open_holdout(opened.holdout(documents), store)
    models = [store.load(digest) for digest in (*forest.experts, seed.digest)]
    exact, forward = [], 0.0
    for one in models:
        lm = open_model(one, store)
        loglik_N, seconds = timed(lambda lm=lm: run(lm, held))
        exact.append(loglik_N)
        forward += seconds
    exact_NM = np.column_stack(exact)
    tokens, count = exact_NM.shape
    weight_CM = draw_candidates(200, count)
    kinds = {"kept": np.column_stack([round_to_half(one) for one in exact]), "plain half": exact_NM.astype(np.float16)}
    every_D = np.ones(len(held.bytes_D), bool)

    def losses(loglik_NM: Floats) -> tuple[Floats, Floats]:
        mixed = [mix(loglik_NM, np.broadcast_to(one, loglik_NM.shape)) for one in weight_CM[:50]]
        scale_B = np.log(2) * held.block_bytes_B
        return (np.array([bits_per_byte(one, held, every_D).value for one in mixed]),
                np.array([block_nats(one, held) / scale_B for one in mixed]))  # fmt: skip

    true_C, true_CB = losses(exact_NM)
    for kind, loglik_NM in kinds.items():
        value_C, value_CB = losses(loglik_NM.astype(np.float32))
        say("table", measured="storage", kind=kind, tokens=tokens, models=count, bytes_per_token_and_expert=loglik_NM.dtype.itemsize, 
            ensembles=50,
            worst_error=float(np.abs(value_C - true_C).max()), mean_error=float(np.abs(value_C - true_C).mean()),
            block_error=float(np.sqrt(np.square(value_CB - true_CB).mean())))  # fmt: skip
    p_NM, peak_N = probabilities(kinds["kept"])
    _, seconds = timed(lambda: rank(p_NM, peak_N, weight_CM, held.block_N, keep=()))
    running = forward / count * (weight_CM > 0).sum(1).mean()
    say("table", measured="saving", tokens=tokens, experts_of_a_candidate=round(float((weight_CM > 0).sum(1).mean()), 1), 
        parameters=seed.parameters,
        table_seconds=seconds / len(weight_CM), running_seconds=running, ratio=round(running / (seconds / len(weight_CM))))  # fmt: skip
    optima(kinds["kept"].astype(np.float32))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", nargs="?", choices=["synthetic", "real"], default="synthetic")
    options.add_argument("store", nargs="?", type=Path)
    options.add_argument("forest", nargs="?")
    options.add_argument("--tokens", type=int, default=1_000_000)
    options.add_argument("--experts", type=int, default=64)
    options.add_argument("--candidates", type=int, default=10_000)
    options.add_argument("--exhaustive", type=int, default=500)
    options.add_argument("--documents", type=int)
    asked = options.parse_args()
    if asked.what == "real":
        return measure_real(Store(asked.store), asked.forest, asked.documents)
    rank_synthetic(asked.tokens, asked.experts, asked.candidates, asked.exhaustive)


if __name__ == "__main__":
    main()
