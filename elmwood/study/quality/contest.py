"""Is B better than A? Two models of one seed on held-out blocks, drawn until the answer is known.

G blocks of a split, N scored tokens in them, M models (experts by digest, the seed last), T blocks that may be drawn, n tokens of some
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.domains import route
from elmwood.domains.distances import nearest_place
from elmwood.domains.partition import serving
from elmwood.domains.route import Routing, Signals, places, router_of
from elmwood.engine import Progress, placed, silent
from elmwood.evaluate.holdout import GATE, Holdout, distances
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
from elmwood.ranges import Between, Count, Documents, ErrorRate, Window, checked
from elmwood.records import Contest, Digest, Ensemble, Expert, Forest, Partition, Record, fingerprint
from elmwood.store import AnyStore, Named, Store
from elmwood.store.own import keep_own
from elmwood.study.ancestry import as_model, common_seed, name_of, partition_of
from elmwood.study.quality.scoring import Columns, ensure, holdout_spec

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]

LOOKS = 200  # of a wealth that the record keeps
LEAST_WEALTH = 99.0  # powers of ten

Effect = Annotated[float, Between(0)]  # bits per byte
Clip = Annotated[float, Between(0, inside=True)]  # bits per byte


class ContestCost(NamedTuple):
    """What a contest ran, and what a full run would take."""

    tokens_forwarded: int
    full_tokens: int  # to run what is missing on all blocks
    models_known: int
    models_run: int


class ContestResult(NamedTuple):
    """The record of a contest, every step of the two bettors, and the cost."""

    record: Contest
    finding: Finding
    cost: ContestCost

    def _repr_html_(self) -> str | None:
        return self.record._repr_html_()


@placed
@checked
def compare(
    a: Named, b: Named, store: AnyStore = None, *, partition: Named | None = None, length: Window = None, documents: Documents = None,
    min_effect: Effect = 0.002, alpha: ErrorRate = 0.05, beta: ErrorRate = 0.1, cap: Count = 5000, clip: Clip = 0.5,
    device: str | None = None, progress: Progress = silent,
) -> ContestResult:  # fmt: skip
    """Is model B better than model A by held-out text? Runs both only on as many blocks as the answer takes.

    `min_effect`: the least gain worth having, bits per byte where the two can differ. `alpha`, `beta`: how often "better" and "not
    better" may be wrong. `cap`: most blocks of 2 KiB. `clip`: most bits per byte that a block counts where no bound is certain.
    Raises BadInput where the models have several seeds, or agree on all text.
    """
    store = Store(store)
    one, other = (as_model(store.load(model), store) for model in (a, b))
    seed, division = common_seed([one, other], store), partition_of([other, one], partition, store)
    rule = StoppingRule(alpha=alpha, beta=beta, worthless=min_effect, cap=cap)
    columns = Columns(holdout_spec(division, seed, length, documents), store, stay=True)
    names = name_of(a, store), name_of(b, store)
    return hold_contest(one, other, names, columns, rule, clip, progress)


def hold_contest(
    a: Record, b: Record, names: tuple[str, str], columns: Columns, rule: StoppingRule, clip: float, progress: Progress
) -> ContestResult:
    """A contest of two models of the columns' seed, in the order of blocks that the models and the text fix; its record is kept."""
    held, store = columns.held, columns.store
    key = fingerprint("compare", a.digest, b.digest, held.name)
    pair = pair_models(a, b, columns, progress)
    finding, cost = judge(pair, columns, rule, clip, key.encode(), progress)
    made = record_of(finding, rule, a=a.digest, b=b.digest, names=names, holdout=held.name, protocol=held.protocol, clip=clip, order=key)
    keep_own(made, store)
    return ContestResult(made, finding, cost)


def record_of(found: Finding, rule: StoppingRule, **fields: Any) -> Contest:
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


class Pair(NamedTuple):
    """Two models as mixtures of the same M models, on the tokens of one split."""

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

    def moved_T(self, place_T: Ints) -> Floats:
        """The share of the weight that differs in some blocks."""
        moved_N = np.abs(self.weight_b_NM - self.weight_a_NM).sum(1) / 2
        tokens_G, moved_G = (np.bincount(self.block_N, some_N, len(self.block_G)) for some_N in (None, moved_N))
        return moved_G[place_T] / tokens_G[place_T]

    def within(self, among_G: Bools) -> "Pair":
        """The same on the tokens of some blocks."""
        here_N = among_G[self.block_N]
        return self._replace(**{name: getattr(self, name)[here_N] for name in ("weight_a_NM", "weight_b_NM", "token_N", "block_N")})


def pair_models(a: Record, b: Record, columns: Columns, progress: Progress, split: int = GATE, near: "Nearness | None" = None) -> Pair:
    """The weights of both models' parts at every token of a split."""
    held, store, seed = columns.held, columns.store, columns.spec.seed
    members = {digest for model in (a, b) for digest in parts(model, store)} - {seed}
    models = (*sorted(members), seed)
    inside_N = held.split_B[held.block_N] == split
    block_G = np.flatnonzero(held.split_B == split)
    near = near or Nearness(held, split, store, progress)
    weight_a_NM, weight_b_NM = (weights(model, models, near, int(inside_N.sum()), store) for model in (a, b))
    if (same_N := same_candidates(a, b, near, store)) is not None:
        weight_b_NM[same_N] = weight_a_NM[same_N]
    return Pair(models, weight_a_NM, weight_b_NM, np.flatnonzero(inside_N), np.searchsorted(block_G, held.block_N[inside_N]), block_G)


class Nearness:
    """Squared distances of the tokens of a split to the experts of forests. The text is routed once for each partition."""

    def __init__(self, held: Holdout, split: int, store: Store, progress: Progress):
        self.store = store
        window_W = np.unique(held.window_N[held.split_B[held.block_N] == split])
        here = held._replace(windows=type(held.windows)(*(part[window_W] for part in held.windows)))
        self.place_N = places(np.repeat(here.windows.document_W, here.windows.count_W))

        @cache
        def to_domains(partition: Digest, signal: str) -> Floats:
            division = store.load(partition, Partition)
            return distances(here, division, store, progress, signal=signal)

        self.to_domains = to_domains

    def to_experts(self, model: Ensemble) -> Floats:
        """[N, E], experts by digest."""
        forest = self.store.load(model.forest, Forest)
        division, experts = self.store.load(forest.partition, Partition), [self.store.load(one, Expert) for one in forest.experts]
        served = serving(division, [(expert.partition, expert.domain) for expert in experts], self.store)
        return nearest_place(self.to_domains(division.digest, router_of(model).distances or "dense"), served)


def runs_whole(model: Record) -> bool:
    """Whether a model is scored as it is. An ensemble that mixes probabilities by distances is a mixture of its parts' columns."""
    return not (isinstance(model, Ensemble) and model.is_sum) or router_of(model).memory is not None


def parts(model: Record, store: Store) -> Sequence[str]:
    """Digests of the models whose columns a model mixes; an ensemble's seed comes last."""
    if runs_whole(model):
        return (model.digest,)
    assert isinstance(model, Ensemble)
    forest = store.load(model.forest, Forest)
    return (*forest.experts, forest.seed)


def weights(model: Record, models: Sequence[str], near: Nearness, tokens: int, store: Store) -> Floats:
    """The weight of each of these models in a model at each token [N, M]."""
    weight_NM = np.zeros((tokens, len(models)))
    if runs_whole(model):
        weight_NM[:, models.index(model.digest)] = 1
        return weight_NM
    assert isinstance(model, Ensemble)
    weight_NC = route.weights(Signals(near.to_experts(model), place_N=near.place_N), Routing.of(model))
    weight_NM[:, [models.index(digest) for digest in parts(model, store)]] = weight_NC
    return weight_NM


def same_candidates(a: Record, b: Record, near: Nearness, store: Store) -> Bools | None:
    """Tokens at which two ensembles with a memory have the same candidates, so the same probabilities, for a candidate's memory is of
    its own log-likelihoods alone [N]. None where the two differ in more than their experts."""
    if not (isinstance(a, Ensemble) and isinstance(b, Ensemble) and a.model_copy(update={"forest": b.forest}) == b):
        return None
    if not a.is_sum or not (router_of(a).distances and router_of(a).memory):
        return None
    forests = [store.load(model.forest, Forest) for model in (a, b)]
    if forests[0].model_copy(update={"experts": forests[1].experts}) != forests[1]:
        return None
    experts = sorted({digest for forest in forests for digest in forest.experts})
    found = []
    for model, forest in zip((a, b), forests, strict=True):
        live_NC = route.candidates(Signals(near.to_experts(model), place_N=near.place_N), Routing.of(model))
        live_NM = np.zeros((len(live_NC), len(experts) + 1), bool)
        live_NM[:, [*(experts.index(digest) for digest in forest.experts), -1]] = live_NC
        found.append(live_NM)
    return (found[0] == found[1]).all(1)


# ---- the test -------------------------------------------------------------------------------------------------------


def judge(
    pair: Pair, columns: Columns, rule: StoppingRule, clip: float, key: bytes, progress: Progress, among_G: Bools | None = None
) -> tuple[Finding, ContestCost]:
    """Draw and score until the answer is known. `among_G`: only these blocks. Raises BadInput where no block can differ."""
    held, models = columns.held, [columns[digest] for digest in pair.models]
    among_G = np.ones(len(pair.block_G), bool) if among_G is None else among_G
    drawn_G = pair.touched_G & among_G
    place_T = np.flatnonzero(drawn_G)
    before = sum(one.forwarded for one in models)
    window = np.unique(held.window_N[pair.token_N])
    pair = pair.within(drawn_G)
    loglik_NM = np.column_stack([columns.known(digest)[pair.token_N] for digest in pair.models])
    missing_NM = np.isnan(loglik_NM) & ((pair.weight_a_NM > 0) | (pair.weight_b_NM > 0))
    unknown = int(missing_NM.any(0).sum())
    bounds = bound_blocks(pair, loglik_NM, held, place_T, clip if unknown else None)
    draw = drawing(pair, columns, place_T, progress)
    order_B = random_order(key, len(place_T), bounds.scale_B)
    # where nothing must be run, all blocks are known and the answer is exact
    found = decide(draw, order_B, bounds, rule) if unknown else look(draw(order_B), order_B, bounds, rule)
    cost = ContestCost(
        tokens_forwarded=sum(one.forwarded for one in models) - before, full_tokens=unknown * int(held.windows.length_W[window].sum()),
        models_known=len(pair.models) - unknown, models_run=unknown,
    )  # fmt: skip
    return found._replace(total=int(among_G.sum()), moved=float(pair.moved_T(place_T).mean())), cost


def drawing(pair: Pair, columns: Columns, place_T: Ints, progress: Progress) -> Callable[[Ints], Floats]:
    """Places among the blocks that may be drawn -> their differences, bits per byte. The function runs what is missing for them."""
    held = columns.held
    window_N = held.window_N[pair.token_N]
    by_block = np.argsort(pair.block_N, kind="stable")
    start_G = np.searchsorted(pair.block_N[by_block], np.arange(len(pair.block_G) + 1))

    def draw(places: Ints) -> Floats:
        token_n = np.concatenate([by_block[start_G[block] : start_G[block + 1]] for block in place_T[places]])
        used_nM = (pair.weight_a_NM[token_n] > 0) | (pair.weight_b_NM[token_n] > 0)
        windows = {digest: np.unique(window_N[token_n[used_nM[:, m]]]) for m, digest in enumerate(pair.models)}
        found = ensure([("", digest) for digest in pair.models], columns, windows=windows, progress=progress)
        columns.reveal(windows)
        loglik_nM = np.column_stack([found.columns[digest][pair.token_N[token_n]] for digest in pair.models])
        gain_n = worst(loglik_nM, pair.weight_b_NM[token_n]) - worst(loglik_nM, pair.weight_a_NM[token_n])
        nats_G = np.bincount(pair.block_N[token_n], gain_n, len(pair.block_G)).astype(np.float64)
        return per_byte(nats_G, held.block_bytes_B[pair.block_G])[place_T[places]]

    return draw


def bound_blocks(pair: Pair, loglik_NM: Floats, held: Holdout, place_T: Ints, clip: float | None) -> Population:
    """Floors and ceilings of the blocks that may be drawn, from the known part of the columns (NaN elsewhere); and control variates."""
    known_NM = ~np.isnan(loglik_NM)
    a_NM, b_NM = np.where(known_NM, pair.weight_a_NM, 0), np.where(known_NM, pair.weight_b_NM, 0)
    bytes_G = held.block_bytes_B[pair.block_G]

    def block(value_N: Floats) -> Floats:
        return per_byte(np.bincount(pair.block_N, value_N, len(pair.block_G)).astype(np.float64), bytes_G)[place_T]

    floor_T, ceiling_T = (block(low_N) - block(high_N) for low_N, high_N in (
        (worst(loglik_NM, b_NM), best(loglik_NM, a_NM)), (best(loglik_NM, b_NM), worst(loglik_NM, a_NM)),
    ))  # fmt: skip
    moved_T, size_T = pair.moved_T(place_T), block(np.ones(len(pair.token_N)))
    feature_TF = np.column_stack([moved_T, size_T, *(block(-one_N) for one_N in loglik_NM.T[known_NM.all(0)])])
    return population(floor_T, ceiling_T, len(pair.block_G), clip=clip, moved_B=moved_T, feature_BF=feature_TF)
