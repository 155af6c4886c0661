"""The result and every control beside it, from columns alone. Settings come from the tune half, every number from the test half.

N scored tokens, E experts by digest, C = E + 1 candidates (the seed last), K domains
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.route import Routing, Signals, open_router, places, remember, router_of, weights
from elmwood.errors import BadInput
from elmwood.evaluate.calibration import Calibration, calibrate
from elmwood.evaluate.holdout import Holdout
from elmwood.evaluate.losses import bits_per_byte, mix, nats, row
from elmwood.evaluate.subsets import greedy
from elmwood.records import Frozen, Row

Floats = NDArray[np.floating]

TOP_K = (1, 2, 4)  # and all
LIVE_K = (1, 2)  # beside the seed: more of them gain little and cost a pass each (docs/log/routing.md)
BY_DISTANCE = ("centroid", "sparse")  # the better of them is a row
MOST_GROWN = 16  # experts that are chosen one by one


class Cost(Frozen):
    """What further training took, beyond the seed. None: not known."""

    batch: int | None = None  # sequences per step
    steps: int | None = None  # one after another, on one machine
    tokens: int | None = None  # all machines together
    machine_seconds: float | None = None  # summed over machines
    wall_seconds: float | None = None  # if every machine works at once


class Control(NamedTuple):
    """One dense model trained further."""

    name: str
    loglik_N: Floats
    cost: Cost = Cost()


class Side(NamedTuple):
    """Experts, by their digests, with the distances their router goes by: of discovered domains, or of random ones."""

    loglik_NK: Floats
    dist2_NK: Floats
    cost: Cost = Cost()
    owners: tuple[int, ...] | None = None  # the expert of each domain; None: one for each, in the domains' order
    sparse2_NK: Floats | None = None  # squared distances to sparse centroids, where the embedder has terms

    @property
    def owner_K(self) -> tuple[int, ...]:
        return tuple(range(self.loglik_NK.shape[1])) if self.owners is None else self.owners

    def distances(self, router: str) -> Floats | None:
        """What a router goes by; None where it looks at no distances. Raises BadInput where this side has not the ones it needs."""
        kind = router_of(Routing(router)).distances
        if kind == "sparse" and self.sparse2_NK is None:
            raise BadInput(f"router {router!r} needs sparse centroids, and this partition's embedder has no terms: choose another")
        return {None: None, "dense": self.dist2_NK, "sparse": self.sparse2_NK}[kind]


class Compared(NamedTuple):
    """Rows in the order of reading, and the settings found."""

    rows: tuple[Row, ...]
    fits: tuple[Calibration, ...]  # one for each result among the rows
    best: Calibration  # the one with the least loss on the tune half, among those that may be chosen
    chosen: str  # the name of its row
    routing: tuple[tuple[float, ...], ...]  # [domain of the document][expert, the seed last] mean weight under `best`, test half
    fitted: dict[str, float]  # the settings of every fitted row: of the best by their own names, of all with the row's name before
    growth: tuple[tuple[float, float], ...]  # bits per byte and its error with 1, 2, ... experts under `best`, chosen on the tune half
    column_N: Floats  # the log-likelihoods of the chosen ensemble, nats


class ExpertColumns(NamedTuple):
    """Columns of one seed's experts on one holdout, ready to be mixed."""

    holdout: Holdout
    loglik_NC: Floats
    side: Side

    @classmethod
    def of(cls, holdout: Holdout, seed_N: Floats, side: Side) -> "ExpertColumns":
        return cls(holdout, np.column_stack([side.loglik_NK, seed_N]), side)

    def calibrate(self, router: str, top_ks: Sequence[int]) -> list[Calibration]:
        """The settings of a router that are best on the tune half, for each top-k."""
        tune_N, dist2_NE = self.holdout.tune_N, self.side.distances(router)
        tuned = self.loglik_NC[tune_N], None if dist2_NE is None else dist2_NE[tune_N], self.holdout.document_N[tune_N]
        return [calibrate(*tuned, top_k, router) for top_k in top_ks]

    def signals(self, routing: Routing) -> Signals:
        """Of every token; the memory begins with its document."""
        looks = router_of(routing).memory
        memory_NC = remember(self.loglik_NC, routing.fading, self.holdout.document_N) if looks else None
        return Signals(self.side.distances(routing.router), memory_NC, places(self.holdout.document_N))

    def column(self, routing: Routing) -> Floats:
        """The log-likelihoods of the ensemble [N]."""
        return mix(self.loglik_NC, weights(self.signals(routing), routing))


class UnratedRow(NamedTuple):
    """One row before it is held against the others."""

    name: str
    role: str
    loglik_N: Floats
    cost: Cost
    fit: Calibration | None = None


def compare(
    holdout: Holdout, seed_N: Floats, experts: Side, dense: Sequence[Control] = (), random: Side | None = None, router: str | None = None
) -> Compared:
    """The honest table. Gains are over the dense control with the least loss on the test half (so chosen against the result),
    or over the seed where there is no control.

    `best` goes by `router`, or else by the best of `centroid`, `sparse` and `live` on the tune half: `posterior` must be asked for,
    since it runs every expert. The router of the result has a row for each top-k, the others one for their best. Random clusters, and
    the strongest dense control mixed with the seed, are routed as the result is. Raises BadInput where columns do not match the holdout
    or this side lacks the distances of `router`, UnknownName.
    """
    for side in [experts] + ([random] if random else []):
        _check(holdout, seed_N, *(control.loglik_N for control in dense), side.loglik_NK, side.dist2_NK)
    mixture = ExpertColumns.of(holdout, seed_N, experts)
    best, shown = choose(mixture, router)
    results = [UnratedRow(_name(one, experts), "result", mixture.column(one.routing), experts.cost, one) for one in shown]
    test_D = ~holdout.tune_D
    strongest = min(dense, key=lambda one: nats(one.loglik_N, holdout)[test_D].sum(), default=Control("seed", seed_N))
    found = [UnratedRow("seed", "seed", seed_N, Cost()), *(UnratedRow(one.name, "control", one.loglik_N, one.cost) for one in dense)]
    if dense:
        found.append(_with_seed(holdout, seed_N, strongest, best.routing.router))
    if random:
        found += _random(ExpertColumns.of(holdout, seed_N, random), best.routing.router)
    found += [UnratedRow("uniform routing", "control", _uniform(experts), experts.cost), *results, _oracle(holdout, experts)]
    rows = tuple(
        row(one.name, one.loglik_N, holdout, domains=len(experts.owner_K), role=one.role, **one.cost.model_dump(),
            against_N=None if one.loglik_N is strongest.loglik_N else strongest.loglik_N)
        for one in found
    )  # fmt: skip
    chosen = next(one for one in results if one.fit is best)
    fitted = _settings(best) | {f"{one.name}: {key}": value for one in found if one.fit for key, value in _settings(one.fit).items()}
    who, more = mean_weights(mixture, best.routing), growth(mixture, best.routing)
    return Compared(rows, tuple(shown), best, chosen.name, who, fitted, more, chosen.loglik_N)


def choose(mixture: ExpertColumns, router: str | None) -> tuple[Calibration, list[Calibration]]:
    """The settings of the result, and those of all rows in the order of reading."""
    found = {name: mixture.calibrate(name, top_ks(name, mixture.side)) for name in _routers(mixture.side, router)}
    best = least(one for name, fits in found.items() if name == router or (router is None and name != "posterior") for one in fits)
    near = least(one for name in BY_DISTANCE for one in found.get(name, []))
    return best, [
        one for name, fits in found.items() for one in fits
        if name == best.routing.router or (one is least(fits) and (one is near or name not in BY_DISTANCE))
    ]  # fmt: skip


def least(fits: Iterable[Calibration]) -> Calibration:
    """The one with the least loss on the tune half."""
    return min(fits, key=lambda one: one.nats)


def top_ks(router: str, side: Side, control: bool = False) -> list[int]:
    """What is tried: 1, 2, 4 where there are so many experts, and all of them with the seed. Of a router that adds the seed to the
    nearest experts 1 and 2; and all, for a control."""
    row, experts = router_of(Routing(router)), side.loglik_NK.shape[1]
    if row.distances and row.memory:
        return sorted({k for k in LIVE_K if k <= experts} | ({experts} if control else set()))
    return [k for k in TOP_K if k < experts] + [experts + 1]


def growth(mixture: ExpertColumns, routing: Routing) -> tuple[tuple[float, float], ...]:
    """Bits per byte on the test half with ever more experts, the one that lowers the loss of the tune half most first; those that do not
    lower it come last, by their numbers. Nothing where experts are many."""
    experts, holdout, signals = mixture.side.loglik_NK.shape[1], mixture.holdout, mixture.signals(routing)
    if not 1 < experts <= MOST_GROWN:
        return ()

    def mixed(members: tuple[int, ...], rows: NDArray[np.integer]) -> Floats:
        loglik_nC = mixture.loglik_NC[rows][:, [*members, experts]]
        return mix(loglik_nC, weights(signals.some(rows).among(members), routing))

    tune_n, every_n = np.flatnonzero(holdout.tune_N), np.arange(len(mixture.loglik_NC))
    helpful = greedy(lambda members: -float(mixed(members, tune_n).mean()), range(experts), experts).order
    order = [*helpful, *(expert for expert in range(experts) if expert not in helpful)]
    losses = [bits_per_byte(mixed(tuple(sorted(order[: n + 1])), every_n), holdout, ~holdout.tune_D) for n in range(len(order))]
    return tuple((loss.value, loss.standard_error) for loss in losses)


def mean_weights(mixture: ExpertColumns, routing: Routing) -> tuple[tuple[float, ...], ...]:
    """Mean weight of each domain's expert, the seed last, over each domain's tokens of the test half [K][K + 1]; zeros where there
    are none. An expert of several domains stands at the document's own, or else at its first."""
    weight_NC, holdout = weights(mixture.signals(routing), routing), mixture.holdout
    domain_N = holdout.domain_D[holdout.document_N]
    owner_K = np.array(mixture.side.owner_K)
    made = []
    for k, own in enumerate(owner_K):
        mine_NC = weight_NC[(domain_N == k) & ~holdout.tune_N]
        mean_C = mine_NC.mean(0) if len(mine_NC) else np.zeros(weight_NC.shape[1])
        column_E = [k if e == own else int(np.flatnonzero(owner_K == e)[0]) for e in range(len(mean_C) - 1)]
        row = np.zeros(len(owner_K) + 1)
        row[[*column_E, -1]] = mean_C
        made.append(tuple(row.tolist()))
    return tuple(made)


# ---- inside ---------------------------------------------------------------------------------------------------------


def _check(holdout: Holdout, *columns: Floats) -> None:
    for column in columns:
        if len(column) != len(holdout.document_N):
            raise BadInput(f"a column has {len(column)} tokens, the holdout {len(holdout.document_N)}: score the model on this holdout")


def _routers(experts: Side, asked: str | None) -> list[str]:
    """The rows to calibrate, in the order of reading."""
    there = ["centroid", *(["sparse"] if experts.sparse2_NK is not None else []), "live", "posterior"]
    if asked is not None and asked not in there:
        if asked == "sparse":
            experts.distances(asked)
        open_router(asked)
        there.insert(-1, asked)
    return there


def _with_seed(holdout: Holdout, seed_N: Floats, dense: Control, router: str) -> UnratedRow:
    """A dense control and the seed, mixed as the result mixes. It is of no domain, so all text is equally near to it."""
    near_N1 = np.zeros((len(seed_N), 1), np.float32)
    mixture = ExpertColumns.of(holdout, seed_N, Side(np.asarray(dense.loglik_N)[:, None], near_N1, sparse2_NK=near_N1))
    fit = least(mixture.calibrate(router, top_ks(router, mixture.side)))
    return UnratedRow(f"{dense.name} + seed, {router} routing", "control", mixture.column(fit.routing), dense.cost, fit)


def _random(mixture: ExpertColumns, router: str) -> Iterator[UnratedRow]:
    """Experts of random clusters, routed as the result is, and by the posterior."""
    for name in dict.fromkeys((router, "posterior")):
        fit = least(mixture.calibrate(name, top_ks(name, mixture.side, control=True)))
        yield UnratedRow(f"random clusters, {_name(fit, mixture.side)}", "control", mixture.column(fit.routing), mixture.side.cost, fit)


def _oracle(holdout: Holdout, side: Side) -> UnratedRow:
    """Each document by the expert of its own domain."""
    owner_N = np.array(side.owner_K)[holdout.domain_D[holdout.document_N]]
    return UnratedRow("oracle routing", "bound", np.take_along_axis(side.loglik_NK, owner_N[:, None], 1)[:, 0], side.cost)


def _uniform(side: Side) -> Floats:
    return mix(side.loglik_NK, np.full(side.loglik_NK.shape, 1 / side.loglik_NK.shape[1]))


def _name(fit: Calibration, side: Side) -> str:
    """What the row is called: c-BTM is routed by centroids."""
    top = f"top-{fit.routing.top_k}" if fit.routing.top_k <= side.loglik_NK.shape[1] else "all"
    return f"c-BTM {top}" if fit.routing.router == "centroid" else f"{fit.routing.router} routing, {top}"


def _settings(fit: Calibration) -> dict[str, float]:
    """By name; those that the router looks at."""
    routing = fit.routing
    found: dict[str, float] = {"top_k": routing.top_k, "temperature": routing.temperature}
    if routing.seed_distance is not None:
        found["seed_distance"] = routing.seed_distance
    if router_of(routing).memory == "fading":
        found |= {"memory": routing.memory, "decay": routing.decay}
    return found
