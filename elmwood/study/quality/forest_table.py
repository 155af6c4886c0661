"""A forest by the columns of its experts: weights, values, choices. A model is run only where its column is missing.

N scored tokens, E experts by digest, C = E + 1 candidates (the seed last), W windows
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.distances import nearest_place
from elmwood.domains.partition import serving
from elmwood.domains.route import Routing, Signals, places, remember, router_of
from elmwood.engine import Progress, placed, silent
from elmwood.errors import BadInput
from elmwood.evaluate.calibration import calibrate
from elmwood.evaluate.holdout import Holdout, distances
from elmwood.evaluate.losses import Estimate, bits_per_byte, mix
from elmwood.evaluate.partial import bring, claimed
from elmwood.evaluate.sequential.decision import best, worst
from elmwood.evaluate.subsets import greedy, member_weights, optimum, values, would_help
from elmwood.ranges import Between, Count, Documents, Window, checked
from elmwood.records import Ensemble, Expert, Forest, Partition, Seed
from elmwood.report.notebook import facts, grid
from elmwood.store import AnyStore, Named, Store
from elmwood.study.ancestry import as_model
from elmwood.study.quality.scoring import Budget, Columns, Ensured, ensure, holdout_spec
from elmwood.study.tasks import default_workers, label
from elmwood.units import parse_count

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

STRANGE = 0.02  # of the windows, chosen at random, on which every expert is scored: what the router may miss
EVERY = slice(None)
Some = Annotated[int | None, Between(1)]


class Routed(NamedTuple):
    """Loss of the ensemble of all experts. Where entries are missing: least and most that it can be, whatever they are."""

    loss: Estimate
    least: float | None  # bits per byte; None: not bounded
    most: float | None


class Static(NamedTuple):
    """The best weights that are the same for all tokens, chosen on the tune half."""

    loss: Estimate
    seed_weight: float
    gap: float  # nats per token on the tune half; no weights are better by more
    passes: int  # over the columns


class ExpertValue(NamedTuple):
    """One expert of the forest."""

    expert: str  # digest
    name: str
    weight: float  # static
    value: float  # bits per byte that are lost without it


class Chosen(NamedTuple):
    """One step of choosing experts one by one."""

    place: int  # of the expert among the rows
    tune: float  # bits per byte on the tune half, with those chosen before
    test: Estimate


class CandidateRow(NamedTuple):
    """An expert that may join: mean p_new / p_mix on its own domain's tune half. Above one, some weight on it lowers the loss there."""

    expert: str  # digest
    name: str
    ratio: float
    error: float | None
    tokens: int


class TableCost(NamedTuple):
    """What was run for the table."""

    models_run: int
    tokens: int
    seconds: float  # of all machines together
    missing: int  # tokens that the budget did not reach
    known: float  # share of all entries
    brought: int  # columns taken over from another store
    claimed: tuple[str, ...] = ()  # models whose columns are claims of another store, not checked here


class ForestTable(NamedTuple):
    """Losses are bits per byte on the test half; choices are made on the tune half."""

    record: Forest
    holdout: str
    protocol: str
    routing: Routing
    seed: Estimate
    routed: Routed
    static: Static
    experts: tuple[ExpertValue, ...]
    chosen: tuple[Chosen, ...]
    looked: int  # subsets tried for the choice
    candidates: tuple[CandidateRow, ...]
    cost: TableCost

    def _repr_html_(self) -> str:
        step_of = {one.place: (step, one.test) for step, one in enumerate(self.chosen, 1)}
        order = sorted(range(len(self.experts)), key=lambda e: step_of[e][0] if e in step_of else len(self.experts) + 1)
        rows = []
        for e in order:
            one, (step, test) = self.experts[e], step_of.get(e, ("", None))
            loss = f"{test.value:.4f} ± {test.standard_error:.4f}" if test else ""
            rows.append((one.name, f"{one.weight:.3f}", f"{one.value:+.4f}", str(step), loss))
        table = grid(
            ("expert", "static weight", "value", "chosen", "bits per byte"), rows,
            "Value: bits per byte that are lost without the expert. Chosen: in this order, with the loss of those up to it.",
        )  # fmt: skip
        losses = {"seed": self.seed, "ensemble of all": self.routed.loss, "one weight each": self.static.loss}
        beside = {what: f"{loss.value:.4f} ± {loss.standard_error:.4f}" for what, loss in losses.items()}
        helps = {one.name: f"mean p_new / p_mix {one.ratio:.4f}" for one in self.candidates}
        return table + facts("Bits per byte on the test half", beside | helps)


@placed
@checked
def table(
    forest: Named, store: AnyStore = None, *, choose: Some = None, candidate: Named | Sequence[Named] = (), near: Some = None,
    top_k: Count = 2, partition: Named | None = None, length: Window = None, documents: Documents = None, budget: str | int | None = None,
    seconds: Annotated[float | None, Between(0)] = None, source: Path | str | None = None, workers: Some = None,
    device: str | None = None, progress: Progress = silent,
) -> ForestTable:  # fmt: skip
    """The best weights of a forest's experts, the value of each and which to keep; of an ensemble, as it is routed.

    choose: this many experts, one by one. candidate: experts that may join. near: score experts only where they are among this many
    nearest. top_k: for a forest. budget, seconds: run no more tokens, or no longer; a later call continues. source: another store, whose
    columns of these models are taken over. Raises BadInput, UnknownName, Damaged.
    """
    home, tokens = Store(store), None if budget is None else parse_count(budget)
    named = as_model(home.load(forest), home)
    if not isinstance(named, Ensemble):
        raise BadInput(f"{named.digest[:8]} is a {named.kind}; name a forest, or an ensemble of one")
    grown = home.load(named.forest, Forest)
    seed, division = home.load(grown.seed, Seed), home.load(partition or grown.partition, Partition)
    columns = Columns(holdout_spec(division, seed, length, documents), home)
    experts = [home.load(digest, Expert) for digest in grown.experts]
    new = [home.load(one, Expert) for one in home.expand(candidate)]
    dist2_NE = _distances(named, experts, division, columns, progress)
    models = [("seed", seed.digest), *((label(division, one.domain), one.digest) for one in (*experts, *new))]
    brought = bring([seed, *experts, *new], columns.held, Store(source), home) if source else 0
    windows = {experts[e].digest: window_W for e, window_W in near_windows(dist2_NE, columns.held, near).items()} if near else {}
    found = ensure(
        models, columns, windows=windows, budget=Budget(tokens, seconds), workers=workers or default_workers(seed, len(models)),
        progress=progress,
    )  # fmt: skip
    fixed = Routing.of(named) if named.digest == home.resolve(forest) else None
    pool = open_pool(found, seed, experts, dist2_NE, fixed, top_k)
    theirs = set(claimed([digest for _, digest in models], columns.held.name, home))
    names = tuple(name for name, digest in models if digest in theirs)
    cost = TableCost(found.run, found.tokens, round(found.seconds, 1), found.missing, found.known, brought, names)
    return _tabulate(pool, grown, experts, new, division, found, choose, cost)


def _distances(named: Ensemble, experts: Sequence[Expert], division: Partition, columns: Columns, progress: Progress) -> Floats:
    """Squared distances of every token's text to the experts, as the ensemble's router needs them [N, E]."""
    kind = router_of(named).distances or "dense"
    dist2_NK = distances(columns.held, division, columns.store, progress, signal=kind)
    return nearest_place(dist2_NK, serving(division, [(one.partition, one.domain) for one in experts], columns.store))


def near_windows(dist2_NE: Floats, held: Holdout, near: int) -> dict[int, Ints]:
    """The windows in which each expert is among the nearest at some token, and a few chosen at random."""
    window_N = held.window_N
    rank_NE = np.argsort(np.argsort(dist2_NE, axis=1, kind="stable"), axis=1)
    count = len(held.windows.rows_WL)
    strange_W = np.random.default_rng(0).permutation(count)[: max(2, int(STRANGE * count))]
    return {e: np.union1d(window_N[rank_NE[:, e] < near], strange_W) for e in range(dist2_NE.shape[1])}


# ---- arithmetic on columns ------------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """The columns of the experts and the seed, and what an ensemble of some of them is routed by."""

    held: Holdout
    known_NC: Floats  # NaN where nobody has scored
    loglik_NC: Floats  # with the seed's in their place
    signals: Signals
    routing: Routing

    @property
    def everyone(self) -> tuple[int, ...]:
        return tuple(range(self.loglik_NC.shape[1] - 1))

    def weights(self, members: Sequence[int], rows: Any = EVERY) -> Floats:
        """Weights of an ensemble of some experts and, where it is a candidate, the seed [n, C]."""
        return member_weights(self.signals.some(rows), self.routing, members)

    def mixed(self, members: Sequence[int], rows: Any = EVERY) -> Floats:
        """The column of that ensemble [n], nats."""
        return mix(self.loglik_NC[rows], self.weights(members, rows))

    def tune_loss(self, members: tuple[int, ...]) -> float:
        """Bits per byte on the tune half."""
        held = self.held
        return -float(self.mixed(members, held.tune_N).sum()) / float(np.log(2) * held.bytes_D[held.tune_D].sum())

    def loss_of(self, loglik_N: Floats) -> Estimate:
        """Bits per byte on the test half."""
        return bits_per_byte(loglik_N, self.held, ~self.held.tune_D)

    def test_loss(self, members: Sequence[int]) -> Estimate:
        return self.loss_of(self.mixed(members))


def open_pool(
    found: Ensured, seed: Seed, experts: Sequence[Expert], dist2_NE: Floats, routing: Routing | None, top_k: int
) -> Pool:  # fmt: skip
    """Columns with the routing of an ensemble, or the one with the least loss on the tune half. Raises BadInput."""
    held, seed_N = found.holdout, found.columns[seed.digest]
    if np.isnan(seed_N).any():
        raise BadInput(
            "the budget did not reach the whole column of the seed, which replaces missing entries: give a larger budget; what was "
            "run is kept"
        )
    known_NC = np.column_stack([*(found.columns[one.digest] for one in experts), seed_N])
    loglik_NC = np.where(np.isnan(known_NC), seed_N[:, None], known_NC)
    if routing is None:
        tune_N = held.tune_N
        routing = calibrate(loglik_NC[tune_N], dist2_NE[tune_N], held.document_N[tune_N], top_k).routing
    memory_NC = remember(loglik_NC, routing.fading, held.document_N) if router_of(routing).memory else None
    return Pool(held, known_NC, loglik_NC, Signals(dist2_NE, memory_NC, places(held.document_N)), routing)


def _tabulate(
    pool: Pool, forest: Forest, experts: Sequence[Expert], new: Sequence[Expert], division: Partition, found: Ensured,
    choose: int | None, cost: TableCost,
) -> ForestTable:  # fmt: skip
    static, weight_C = _static(pool)
    grown = greedy(pool.tune_loss, pool.everyone, choose or len(experts))
    value_E = values(lambda members: pool.test_loss(members).value, pool.everyone)
    rows = zip(experts, weight_C, value_E, strict=False)  # the seed has a weight and no row
    return ForestTable(
        record=forest,
        holdout=pool.held.name,
        protocol=pool.held.protocol,
        routing=pool.routing,
        seed=pool.loss_of(pool.loglik_NC[:, -1]),
        routed=_routed(pool),
        static=static,
        experts=tuple(ExpertValue(one.digest, label(division, one.domain), float(weight), value) for one, weight, value in rows),
        chosen=tuple(
            Chosen(one, loss, pool.test_loss(grown.order[: n + 1]))
            for n, (one, loss) in enumerate(zip(grown.order, grown.losses, strict=True))
        ),
        looked=grown.looked,
        candidates=tuple(_candidate(one, found.columns[one.digest], pool, division) for one in new),
        cost=cost,
    )


def _routed(pool: Pool) -> Routed:
    loss = pool.test_loss(pool.everyone)
    complete = not np.isnan(pool.known_NC).any()
    if router_of(pool.routing).memory and not complete:  # the weights themselves depend on the missing entries
        return Routed(loss, None, None)
    sure_NC = np.where(np.isnan(pool.known_NC), 0, pool.weights(pool.everyone))
    high_N, low_N = best(pool.known_NC, sure_NC), worst(pool.known_NC, sure_NC)
    bounded = np.isfinite(low_N[~pool.held.tune_N]).all()  # else a missing entry may have all the weight
    return Routed(loss, pool.loss_of(high_N).value, pool.loss_of(low_N).value if bounded else None)


def _static(pool: Pool) -> tuple[Static, Floats]:
    """And the weights [C]."""
    found = optimum(pool.loglik_NC[pool.held.tune_N])
    mixed_N = mix(pool.loglik_NC, np.broadcast_to(found.weight_E, pool.loglik_NC.shape))
    return Static(pool.loss_of(mixed_N), float(found.weight_E[-1]), found.gap, found.passes), found.weight_E


def _candidate(new: Expert, new_N: Floats, pool: Pool, division: Partition) -> CandidateRow:
    """Whether some weight on a new expert would lower the loss on its own domain's tune half; on all of that half where it has none."""
    held = pool.held
    among_N = held.tune_N & ~np.isnan(new_N)
    if new.partition == division.digest and new.domain is not None:
        among_N &= held.block_domain_B[held.block_N] == new.domain
    ratio = would_help(np.nan_to_num(new_N), pool.mixed(pool.everyone), held.block_N, among_N)
    error = None if np.isnan(ratio.standard_error) else ratio.standard_error
    return CandidateRow(new.digest, label(division, new.domain), ratio.value, error, int(among_N.sum()))
