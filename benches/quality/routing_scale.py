"""Routing as the number of domains grows: what it costs, and rules that search less often or run fewer experts.

    python -m benches.quality.routing_scale cost                   CPU time of a prompt of 2,000 characters, and of a token
    python -m benches.quality.routing_scale grow STORE --corpus FOLDER [--domains 16] [--tokens 700k] [--seed-tokens 0]
    python -m benches.quality.routing_scale study STORE [--documents 120]       every rule on the columns that `grow` made

`grow` trains a seed (--seed-tokens 0: the demo's packaged one), experts of domains and of random parts, and dense controls of the same
batch and with k times that, at as many tokens and at twice as many. It names them scale/… and scores them. `study` runs no model.
Settings come from the tune half, figures are bits per byte on the test half, and gains are over the stronger dense control at equal
tokens, paired, with errors over documents. Accuracy to 10,000 domains: `python -m benches.quality.domains routing`.

N scored tokens, E experts by digest, C = E + 1 candidates (the seed last)
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from benches.common import Lines, open_forest, parser, say
from benches.domains import median_seconds
from benches.quality.routers import FADING, Bench, measure
from elmwood.corpus.build import build
from elmwood.corpus.read import read
from elmwood.domains import embed
from elmwood.domains.distances import Sparse
from elmwood.domains.partition import partition as divide
from elmwood.domains.route import Routing, candidates, places, searches, weights
from elmwood.ensemble.text_router import TextRouter, weigh
from elmwood.evaluate.comparison import ExpertColumns, Side
from elmwood.evaluate.holdout import HoldoutSpec
from elmwood.evaluate.losses import bits_per_byte, difference, mix, nats
from elmwood.records import Forest
from elmwood.store import Store
from elmwood.study.demo import DENSE, LARGE, Study, plan, scratch, train_and_score
from elmwood.study.demo_seed import install_seed
from elmwood.units import parse_count

PIECE = 4  # characters of a token


# ---- what routing costs ---------------------------------------------------------------------------------------------

cpu_seconds = partial(median_seconds, clock=process_time)


def cost(characters: int = 2000, rounds: int = 31) -> None:
    """CPU milliseconds, medians. Centroids are of random passages of the sample, so that they are as full as those of small domains."""
    with_text = [one.text for one in _sample()]
    fitted, whole, rng = embed.fit("tfidf", with_text), "\n".join(with_text), random.Random(0)
    text = max(with_text, key=len)[:characters]
    spelled = [*(text[at : at + PIECE].encode() for at in range(0, len(text), PIECE)), b" word"]
    prompt = range(len(spelled) - 1)
    for domains in (10, 100, 1000, 10000):
        passages = [whole[at : at + 3000] for at in (rng.randrange(len(whole) - 3000) for _ in range(domains))]
        memory_C, served = np.zeros(domains + 1), [(place,) for place in range(domains)]
        for kind, centroids in (("dense", fitted.embed(passages)), ("sparse", Sparse.of(fitted.tfidf(passages)))):
            for rule in ({}, {"every": 64}, {"every": 64, "shortlist": 32}, {"every": 64, "margin": 0.05}):
                router = TextRouter(Routing("live", 4, 0.8, 1.0, **rule), fitted, centroids, served, spelled)
                walk = _read(router, router.start(), prompt, memory_C)
                say(
                    "routing_scale", measured="cost", domains=domains, centroids=kind, **rule,
                    prompt_ms=1000
                    * cpu_seconds(lambda router=router, memory_C=memory_C: _read(router, router.start(), prompt, memory_C), rounds),
                    token_ms=1000 * cpu_seconds(partial(_read, router, walk, prompt[-1:], memory_C), 8 * rounds),
                )  # fmt: skip


def _read(router: TextRouter, walk: Any, tokens: Any, memory_C: np.ndarray) -> Any:
    weigh(router.follow(walk, tokens), memory_C, router.routing)
    return walk


def _sample() -> list[Any]:
    return list(read("sample", Counter()))


# ---- a forest to study ----------------------------------------------------------------------------------------------


def grow(store: Store, corpus_at: str, study: Study) -> None:
    """A seed, experts of domains and of random parts, a dense control at their tokens and one at twice as many; all scored."""
    progress = Lines()
    corpus = build([corpus_at], store, progress=progress)
    packaged = not study.seed_tokens
    seed = install_seed(build(["sample"], store, progress=progress), store) if packaged else scratch(study, corpus, store, progress)
    store.name("scale/seed", seed.digest)
    divisions = {
        name: divide(corpus, store, domains=study.domains, method=method, rng_seed=study.rng_seed, progress=progress)
        for name, method in (("expert", "balanced"), ("random", "random"))
    }
    sides = plan(study, seed, corpus, divisions, store)
    dense = {"batch": sides[DENSE][0], "large": sides[LARGE][0]}
    sides = {"expert": sides["expert"], "random": sides["random"]} | {f"dense/{name}": [job] for name, job in dense.items()}
    for name, job in dense.items():
        longer = job.recipe.model_copy(update={"steps": 2 * job.recipe.steps})
        sides[f"twice/{name}"] = [job.model_copy(update={"recipe": longer, "label": f"{job.label}, twice the tokens"})]
    spec = HoldoutSpec(partition=divisions["expert"].digest, seed=seed.digest, length=study.length, documents=study.documents)
    trained = train_and_score(seed, sides, spec, store, workers=1, progress=progress)
    for name, side in trained.items():
        for place, digest in enumerate(side):
            store.name(f"scale/{name}" + (f"/{place}" if len(side) > 1 else ""), digest)
    forest = Forest(seed=seed.digest, partition=divisions["expert"].digest, experts=tuple(trained["expert"]))
    store.add(forest)
    store.name("scale/forest", forest.digest)
    say("routing_scale", measured="grow", domains=study.domains, tokens_per_side=study.tokens, holdout=spec.model_dump())


# ---- the study ------------------------------------------------------------------------------------------------------


def study_rules(store: Store, documents: int, longest: int = 256) -> None:
    """The routers, the rules upon `live`, and the controls."""
    bench, names = Bench(open_forest(store, "scale/forest"), documents, longest), store.names()
    found = {name: bench.column(names[f"scale/{name}"]) for name in ("dense/batch", "dense/large", "twice/batch", "twice/large")}
    dense_N, twice_N = (
        min((one for name, one in found.items() if name.startswith(kind)), key=lambda one: nats(one, bench.held)[bench.test_D].sum())
        for kind in ("dense", "twice")
    )
    for of, column_N in {"seed": bench.seed_N, **found}.items():
        loss, gain = bits_per_byte(column_N, bench.held, bench.test_D), difference(dense_N, column_N, bench.held, bench.test_D)
        say("routing_scale", of=of, bits_per_byte=loss.value, gain=gain.value, gain_error=gain.standard_error)
    own = bench.side([digest for name, digest in names.items() if name.startswith("scale/expert/")])
    random_side = bench.side([digest for name, digest in names.items() if name.startswith("scale/random/")])
    for router in ("centroid", "sparse", "live", "live-sparse"):
        for top_k in (1, 2, 4):
            measure(bench, "experts + seed", own, dense_N, (router, top_k, FADING))
    for top_k in (2, own.loglik_NK.shape[1] + 1):
        measure(bench, "experts + seed", own, dense_N, ("posterior", top_k, FADING))
    for of, side in (("random clusters + seed", random_side), ("dense + seed", bench.alone(dense_N))):
        for top_k in dict.fromkeys((min(2, side.loglik_NK.shape[1]), side.loglik_NK.shape[1])):
            measure(bench, of, side, dense_N, ("live", top_k, FADING))
    _with_pooled(bench, own, dense_N, twice_N)
    for router, top_k in (("live", 2), ("live", 4), ("centroid", 4)):
        _rules(bench, own, dense_N, router, top_k)


def _rules(bench: Bench, side: Side, against_N: np.ndarray, router: str, top_k: int) -> None:
    """Every rule at the settings that suit the router without one."""
    columns = ExpertColumns.of(bench.held, bench.seed_N, side)
    (fit,) = columns.calibrate(router, [top_k])
    plain_N = columns.column(fit.routing)
    for rule in _grid(top_k):
        routing = replace(fit.routing, **rule)
        column_N = columns.column(routing)
        run_NC = running(columns, routing)
        loss = bits_per_byte(column_N, bench.held, bench.test_D)
        gain, change = (difference(one_N, column_N, bench.held, bench.test_D) for one_N in (against_N, plain_N))
        tune = -float(column_N[bench.held.tune_N].mean())
        say(
            "routing_scale", measured="rule", router=router, top_k=top_k, rule=rule, bits_per_byte=loss.value, gain=gain.value,
            gain_error=gain.standard_error, over_plain=change.value, over_plain_error=change.standard_error, tune_nats=tune,
            **work(run_NC, places(bench.held.document_N)),
        )  # fmt: skip
    for every in (1, 64) if router != "centroid" else ():
        for base in ("seed", "mean"):
            _late_memory(bench, columns, replace(fit.routing, every=every), plain_N, base)


def _grid(top_k: int) -> Iterator[dict[str, Any]]:
    yield {}
    yield from ({"every": every} for every in (64, 256))
    yield from ({"every": 64, "shortlist": size} for size in (4, 8) if size > top_k)
    yield from ({"every": every, "margin": margin} for every in (1, 64) for margin in (0.02, 0.05, 0.1))
    yield {"every": 64, "shortlist": 8, "margin": 0.02}
    yield from ({"every": every, "sure": sure} for every in (16, 64) for sure in (0.6, 0.7, 0.8, 0.9, 0.95))
    yield from ({"far": far} for far in (0.7, 0.9, 1.1))
    yield {"every": 64, "margin": 0.02, "sure": 0.8, "far": 1.1}


def running(columns: ExpertColumns, routing: Routing) -> np.ndarray:
    """Which candidates a live text runs for each token [N, C]: fewer than `candidates` where one is alone."""
    signals = columns.signals(routing)
    run_NC = candidates(signals, routing)
    if routing.sure is not None and run_NC.any():
        weight_NC = weights(signals, routing)
        alone_N = (weight_NC.max(1) == 1) & ~searches(places(columns.holdout.document_N), routing.every)
        run_NC = np.where(alone_N[:, None], weight_NC > 0, run_NC)
    return run_NC


def work(run_NC: np.ndarray, place_N: np.ndarray) -> dict[str, float]:
    """Candidates run per token; how often one joins, and how many tokens it then reads that it missed."""
    joins = missed = 0
    begin_N = np.arange(len(place_N)) - (place_N - 1)  # the first token of the document
    for run_N in run_NC.T:
        at_N = np.flatnonzero(run_N)
        before_N = np.maximum(np.concatenate([[-1], at_N[:-1]]), begin_N[at_N] - 1)
        gap_N = at_N - before_N - 1
        joins += int((gap_N > 0).sum())
        missed += int(gap_N.sum())
    size = len(place_N)
    return {"run_per_token": float(run_NC.sum() / size), "joins_per_1000": 1000 * joins / size, "missed_per_token": missed / size}


def _late_memory(bench: Bench, columns: ExpertColumns, routing: Routing, plain_N: np.ndarray, base: str) -> None:
    """The memory of an expert starts where it becomes live, at that of the seed or at the mean of who is live: against one that has read
    all of the text. The weight of the memory is chosen again."""
    signals = columns.signals(routing)
    run_NC, place_N = candidates(signals, routing), places(bench.held.document_N)
    late = signals._replace(memory_NC=_from_entry(signals.memory_NC, run_NC, place_N, routing.fading, base))
    tried = {
        share: mix(columns.loglik_NC, weights(late, replace(routing, memory=share * routing.memory))) for share in (0.25, 0.5, 1.0, 2.0)
    }
    share = max(tried, key=lambda one: float(tried[one][bench.held.tune_N].mean()))
    loss, change = (
        bits_per_byte(tried[share], bench.held, bench.test_D),
        difference(columns.column(routing), tried[share], bench.held, bench.test_D),
    )
    say(
        "routing_scale", measured="memory from entry", router=routing.router, top_k=routing.top_k, every=routing.every, starts_at=base,
        memory_times=share, bits_per_byte=loss.value, over_read=change.value, over_read_error=change.standard_error,
    )  # fmt: skip


def _from_entry(memory_NC: Any, run_NC: np.ndarray, place_N: np.ndarray, fading: float, base: str) -> np.ndarray:
    """Memories that start where a candidate begins to run."""
    made_NC, row_N = np.array(memory_NC), np.arange(len(place_N))
    for c in range(run_NC.shape[1] - 1):
        run_N = run_NC[:, c]
        enters_N = run_N & (np.concatenate([[True], ~run_N[:-1]]) | (place_N == 1))
        entry_N = np.maximum.accumulate(np.where(enters_N, row_N, 0))
        others_NC = run_NC.copy()
        others_NC[:, c] = False
        mean_N = np.where(others_NC, memory_NC, 0).sum(1) / np.maximum(others_NC.sum(1), 1)
        base_N = memory_NC[:, -1] if base == "seed" else mean_N
        made_NC[:, c] -= np.where(run_N, fading ** (row_N - entry_N) * (memory_NC[entry_N, c] - base_N[entry_N]), 0)
    return made_NC


def _with_pooled(bench: Bench, side: Side, dense_N: np.ndarray, twice_N: np.ndarray) -> None:
    """A pooled expert, trained on all domains with as many tokens as the experts together: in the seed's place, and as one more candidate.
    Its tokens are counted: the control has twice as many."""
    pooled = ExpertColumns.of(bench.held, dense_N, side)
    (fit,) = pooled.calibrate("live", [2])
    _say_pooled(bench, "experts + pooled, no seed", pooled.column(fit.routing), dense_N, twice_N, fit.routing)
    columns = ExpertColumns.of(bench.held, bench.seed_N, side)
    (fit,) = columns.calibrate("live", [2])
    found = {}
    for at in np.linspace(-0.4, 0.4, 9):
        own = replace(fit.routing, seed_distance=(fit.routing.seed_distance or 1.0) + float(at))
        weight_NC, pooled_NC = (weights(one.signals(routing), routing) for one, routing in ((columns, fit.routing), (pooled, own)))
        found[float(at)] = mix(np.column_stack([columns.loglik_NC, dense_N]), _join(weight_NC, pooled_NC))
    at = max(found, key=lambda one: float(found[one][bench.held.tune_N].mean()))
    _say_pooled(bench, "experts + pooled + seed", found[at], dense_N, twice_N, fit.routing, pooled_further=at)


def _join(with_seed_NC: np.ndarray, with_pooled_NC: np.ndarray) -> np.ndarray:
    """One softmax over the experts, the seed and the pooled expert [N, C + 1], from two over the same experts and one of both each."""
    odds_N = [one_NC[:, -1] / np.maximum(1 - one_NC[:, -1], 1e-12) for one_NC in (with_seed_NC, with_pooled_NC)]
    share_NC = with_seed_NC[:, :-1] / np.maximum(1 - with_seed_NC[:, -1:], 1e-12)
    joined_NC = np.column_stack([share_NC, *odds_N])
    joined_NC /= joined_NC.sum(1, keepdims=True)
    return joined_NC


def _say_pooled(
    bench: Bench, of: str, column_N: np.ndarray, dense_N: np.ndarray, twice_N: np.ndarray, routing: Routing, **more: Any
) -> None:
    loss = bits_per_byte(column_N, bench.held, bench.test_D)
    gain, over_twice = (difference(one_N, column_N, bench.held, bench.test_D) for one_N in (dense_N, twice_N))
    say(
        "routing_scale", of=of, bits_per_byte=loss.value, gain=gain.value, gain_error=gain.standard_error, over_twice=over_twice.value,
        over_twice_error=over_twice.standard_error, **asdict(routing), **more,
    )  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=("cost", "grow", "study"))
    options.add_argument("store", type=Path, nargs="?")
    options.add_argument("--corpus", default="sample")
    options.add_argument("--domains", type=int, default=16)
    options.add_argument("--tokens", default="700k")
    options.add_argument("--seed-tokens", default="0")
    options.add_argument("--documents", type=int, default=120)
    asked = options.parse_args()
    if asked.what == "cost":
        return cost()
    if asked.what == "study":
        return study_rules(Store(asked.store), asked.documents)
    sizes = {"tokens": parse_count(asked.tokens), "seed_tokens": int(asked.seed_tokens != "0") and parse_count(asked.seed_tokens)}
    grow(Store(asked.store), asked.corpus, Study(domains=asked.domains, documents=asked.documents, **sizes))


if __name__ == "__main__":
    main()
