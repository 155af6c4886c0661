"""What `elmwood compare` does: two models of one seed on held-out blocks, drawn until it is known which is better.

G blocks of the gate split, N scored tokens in them, M models (experts by digest, the seed last)
"""

import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood import evaluate
from elmwood.cli.screen import bars, emit, out, short, talk
from elmwood.domains import route
from elmwood.domains.partition import serving
from elmwood.domains.route import Routing, Signals, nearest_place, router_of
from elmwood.engine import Progress
from elmwood.evaluate.holdout import GATE
from elmwood.evaluate.sequential.decision import (
    Finding,
    Population,
    StoppingRule,
    best,
    decide,
    find_touched,
    look,
    per_byte,
    population,
    worst,
)
from elmwood.evaluate.sequential.error_budget import random_order
from elmwood.records import Contest, Digest, Ensemble, Expert, Forest, Partition, Record, Seed, fingerprint
from elmwood.report.contest import headline, lines
from elmwood.report.wealth import wealth_plot
from elmwood.store import Store
from elmwood.study.ancestry import as_model, common_seed, partition_of
from elmwood.study.scoring import Columns, ensure
from elmwood.study.tasks import opener

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]


PRECISION = "as each model is stored"
LOOKS = 200  # of a wealth that are kept
LEAST_WEALTH = 99.0  # powers of ten


class Sides(NamedTuple):
    """Two models as mixtures of the same M, on the tokens of one split."""

    models: tuple[str, ...]  # digests
    weight_a_NM: Floats
    weight_b_NM: Floats
    token_N: Ints  # their places in the whole column
    block_N: Ints  # place of each token's block among those of the split
    block_G: Ints  # places of these in the holdout

    @property
    def touched_G(self) -> Bools:
        """Blocks in which the two can differ."""
        return find_touched(self.weight_a_NM, self.weight_b_NM, self.block_N, len(self.block_G))

    def moved_B(self, place_T: Ints) -> Floats:
        """The share of the weight that differs in some blocks."""
        moved_N = np.abs(self.weight_b_NM - self.weight_a_NM).sum(1) / 2
        tokens_G, moved_G = (np.bincount(self.block_N, some_N, len(self.block_G)) for some_N in (None, moved_N))
        return moved_G[place_T] / tokens_G[place_T]

    def within(self, among_G: Bools) -> "Sides":
        """The same on the tokens of some blocks."""
        here_N = among_G[self.block_N]
        return self._replace(**{name: getattr(self, name)[here_N] for name in ("weight_a_NM", "weight_b_NM", "token_N", "block_N")})


def compare(*, a, b, partition, length, documents, min_effect, alpha, beta, cap, clip, plot, store, as_json) -> None:
    home = Store(store)
    one, other = (as_model(home.load(name), home) for name in (a, b))
    seed = common_seed([one, other], home)
    division = partition_of([other, one], partition, home)
    spec = evaluate.HoldoutSpec(partition=division.digest, seed=seed.digest, length=length or min(seed.context, 1024), documents=documents)
    rule = StoppingRule(alpha=alpha, beta=beta, worthless=min_effect, cap=cap)
    with bars() as progress:
        columns = Columns(spec, home, stay=True)
        held = columns.held
        sides = mix_up(one, other, seed, held, home, progress)
        key = fingerprint("compare", one.digest, other.digest, held.name)
        found, cost = judge(sides, columns, rule, clip, key.encode(), progress)
    made = contest(found, rule, a=one.digest, b=other.digest, names=(a, b), holdout=held.name, protocol=held.protocol, clip=clip, order=key)
    home.add(made)
    if plot:
        Path(plot).write_text(wealth_plot(found.for_T, found.against_T, alpha=alpha, beta=beta, names=("better", "not better")))
    if as_json:
        cost |= {"machine": platform.machine(), "precision": PRECISION, "plot": plot and str(plot)}
        emit(made.model_dump(mode="json") | {"digest": made.digest, "overall": found.effect * found.share} | cost)
        return
    out.print(headline(made), style="bold", soft_wrap=True)
    said = lines(made)
    tokens = f"{short(cost['tokens_forwarded'])} forwarded; running what is missing on all blocks: {short(cost['full_tokens'])}"
    run = f"{cost['models_known']} models were known, {cost['models_run']} were run, on {platform.machine()}, {PRECISION}"
    for word, text in (*said[:2], ("tokens", tokens), *said[2:-1], ("models", run), said[-1]):
        out.print(f"{word:<9} {text}", soft_wrap=True, markup=False)
    if plot:
        talk.print(f"wealth over blocks: {plot}")


def contest(found: Finding, rule: StoppingRule, **fields: Any) -> Contest:
    """The record of a finding."""
    count = len(found.for_T)
    looks = np.unique(np.linspace(0, count - 1, min(count, LOOKS)).astype(int))
    path_T2 = np.clip(np.stack([found.for_T, found.against_T], 1) / np.log(10), -LEAST_WEALTH, LEAST_WEALTH).round(4)
    return Contest(
        outcome=found.outcome, estimand=found.estimand, effect=found.effect, low=found.low, high=found.high, drawn=found.drawn,
        touched=found.size, blocks=found.total, moved=found.moved, alpha=rule.alpha, beta=rule.beta, min_effect=rule.worthless,
        cap=rule.cap, clipped=found.clipped, clip_effect=found.clip_effect,
        wealth=tuple((int(t) + 1, *path_T2[t].tolist()) for t in looks), **fields,
    )  # fmt: skip


# ---- two models as mixtures -----------------------------------------------------------------------------------------


def mix_up(a: Record, b: Record, seed: Seed, held: evaluate.Holdout, store: Store, progress: Progress, split: int = GATE) -> Sides:
    """Weights of both models' parts for every token of a split."""
    members = {digest for model in (a, b) for digest in parts(model, store)} - {seed.digest}
    models = (*sorted(members), seed.digest)
    inside_N = held.split_B[held.block_N] == split
    here = held._replace(windows=type(held.windows)(*(part[np.unique(held.window_N[inside_N])] for part in held.windows)))
    block_G = np.flatnonzero(held.split_B == split)

    @cache  # both models mostly go by the same
    def dist2(digest: Digest, signal: str) -> Floats:
        division = store.load(digest, Partition)
        return evaluate.distances(here, division, store, progress, signal=signal, open_model=opener(division.embedder.name))

    weight_a_NM, weight_b_NM = (weights(model, models, dist2, int(inside_N.sum()), store) for model in (a, b))
    return Sides(models, weight_a_NM, weight_b_NM, np.flatnonzero(inside_N), np.searchsorted(block_G, held.block_N[inside_N]), block_G)


def whole(model: Record) -> bool:
    """Whether a model is run as it is. An ensemble that mixes probabilities by distances is taken apart: its parts may be known."""
    if not isinstance(model, Ensemble) or model.mixing == "weights":
        return True
    return router_of(model).memory is not None


def parts(model: Record, store: Store) -> Sequence[str]:
    """Digests of the models a model consists of, as its weights name them; an ensemble's seed comes last."""
    if whole(model):
        return (model.digest,)
    assert isinstance(model, Ensemble)
    forest = store.load(model.forest, Forest)
    return (*forest.experts, forest.seed)


def weights(model: Record, models: Sequence[str], dist2: Callable[[Digest, str], Floats], tokens: int, store: Store) -> Floats:
    """How much of each of these models a model is, at each token [N, M]. `dist2`: distances [N, K] by partition and signal."""
    weight_NM = np.zeros((tokens, len(models)))
    if whole(model):
        weight_NM[:, models.index(model.digest)] = 1
        return weight_NM
    assert isinstance(model, Ensemble)
    routing = Routing.of(model)
    forest = store.load(model.forest, Forest)
    division, experts = store.load(forest.partition, Partition), [store.load(digest, Expert) for digest in forest.experts]
    served = serving(division, [(expert.partition, expert.domain) for expert in experts], store)
    dist2_NE = nearest_place(dist2(division.digest, router_of(routing).distances or "dense"), served)
    weight_NM[:, [models.index(digest) for digest in parts(model, store)]] = route.weights(Signals(dist2_NE), routing)
    return weight_NM


# ---- the test -------------------------------------------------------------------------------------------------------


def judge(
    sides: Sides, columns: Columns, rule: StoppingRule, clip: float, key: bytes, progress: Progress, among_G: Bools | None = None
) -> tuple[Finding, dict[str, Any]]:
    """Draw and score until the answer is known; the finding and what it cost. `among_G`: only of these blocks. Raises BadInput."""
    held, parts = columns.held, [columns[digest] for digest in sides.models]
    among_G = np.ones(len(sides.block_G), bool) if among_G is None else among_G
    drawn_G = sides.touched_G & among_G
    place_T = np.flatnonzero(drawn_G)
    before = sum(one.forwarded for one in parts)
    window = np.unique(held.window_N[sides.token_N])
    sides = sides.within(drawn_G)
    loglik_NM = np.column_stack([one.loglik_N[sides.token_N] for one in parts])
    missing_NM = np.isnan(loglik_NM) & ((sides.weight_a_NM > 0) | (sides.weight_b_NM > 0))
    unknown = int(missing_NM.any(0).sum())
    bounds = bounded(sides, loglik_NM, held, place_T, clip if unknown else None)
    draw = drawing(sides, columns, place_T, progress)
    order_B = random_order(key, len(place_T), bounds.scale_B)
    # where nothing need be run, all blocks are known and the answer is exact
    found = decide(draw, order_B, bounds, rule) if unknown else look(draw(order_B), order_B, bounds, rule)
    return found._replace(total=int(among_G.sum()), moved=float(sides.moved_B(place_T).mean())), {
        "tokens_forwarded": sum(one.forwarded for one in parts) - before,
        "full_tokens": unknown * int(held.windows.length_W[window].sum()),
        "models_known": len(sides.models) - unknown, "models_run": unknown,
    }  # fmt: skip


def drawing(sides: Sides, columns: Columns, place_T: Ints, progress: Progress) -> Callable[[Ints], Floats]:
    """Places among the blocks that may be drawn -> their differences, bits per byte; runs what is missing for them."""
    held = columns.held
    window_N = held.window_N[sides.token_N]
    by_block = np.argsort(sides.block_N, kind="stable")
    start_G = np.searchsorted(sides.block_N[by_block], np.arange(len(sides.block_G) + 1))

    def draw(places: Ints) -> Floats:
        token_n = np.concatenate([by_block[start_G[block] : start_G[block + 1]] for block in place_T[places]])
        spoken_nM = (sides.weight_a_NM[token_n] > 0) | (sides.weight_b_NM[token_n] > 0)
        windows = {digest: np.unique(window_N[token_n[spoken_nM[:, m]]]) for m, digest in enumerate(sides.models)}
        found = ensure([("", digest) for digest in sides.models], columns, windows=windows, progress=progress)
        loglik_nM = np.column_stack([found.columns[digest][sides.token_N[token_n]] for digest in sides.models])
        gain_n = worst(loglik_nM, sides.weight_b_NM[token_n]) - worst(loglik_nM, sides.weight_a_NM[token_n])
        nats_G = np.bincount(sides.block_N[token_n], gain_n, len(sides.block_G)).astype(np.float64)
        return per_byte(nats_G, held.block_bytes_B[sides.block_G])[place_T[places]]

    return draw


def bounded(sides: Sides, loglik_NM: Floats, held: evaluate.Holdout, place_T: Ints, clip: float | None) -> Population:
    """Floors and ceilings of the blocks that may be drawn, from what is known of the columns (NaN elsewhere); and control variates."""
    known_NM = ~np.isnan(loglik_NM)
    a_NM, b_NM = np.where(known_NM, sides.weight_a_NM, 0), np.where(known_NM, sides.weight_b_NM, 0)
    bytes_G = held.block_bytes_B[sides.block_G]

    def block(value_N: Floats) -> Floats:
        return per_byte(np.bincount(sides.block_N, value_N, len(sides.block_G)).astype(np.float64), bytes_G)[place_T]

    floor_B, ceiling_B = (block(low_N) - block(high_N) for low_N, high_N in (
        (worst(loglik_NM, b_NM), best(loglik_NM, a_NM)), (best(loglik_NM, b_NM), worst(loglik_NM, a_NM)),
    ))  # fmt: skip
    moved_B, size_B = sides.moved_B(place_T), block(np.ones(len(sides.token_N)))
    feature_BF = np.column_stack([moved_B, size_B, *(block(-one_N) for one_N in loglik_NM.T[known_NM.all(0)])])
    return population(floor_B, ceiling_B, len(sides.block_G), clip=clip, moved_B=moved_B, feature_BF=feature_BF)
