"""The result and every control beside it, from columns alone. Settings come from the tune half, every number from the test half.

N scored tokens, K experts (one for each domain, in the domains' order), E = K + 1 candidates (the seed last)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.route import ROUTERS, posterior_scores
from elmwood.errors import BadInput
from elmwood.evaluate.calibrate import Fit, fit, weights
from elmwood.evaluate.holdout import Holdout
from elmwood.evaluate.losses import bits_per_byte, mix, nats, row
from elmwood.evaluate.subsets import greedy
from elmwood.records import Frozen, Row

Floats = NDArray[np.floating]

TOP_K = (1, 2, 4)  # and all
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
    """Experts with the distances their router goes by: of discovered domains, or of random ones."""

    loglik_NK: Floats
    dist2_NK: Floats
    cost: Cost = Cost()
    owners: tuple[int, ...] | None = None  # the expert of each domain; None: one for each, in the domains' order
    sparse2_NK: Floats | None = None  # squared distances to sparse centroids, where the embedder has terms

    @property
    def owner_K(self) -> tuple[int, ...]:
        return tuple(range(self.loglik_NK.shape[1])) if self.owners is None else self.owners


class Compared(NamedTuple):
    """Rows in the order of reading, the settings found, and who spoke where."""

    rows: tuple[Row, ...]
    fits: tuple[Fit, ...]  # one for each top-k of the discovered domains, then the best of each other router
    best: Fit  # the one with the least loss on the tune half
    chosen: str  # the name of its row
    routing: tuple[tuple[float, ...], ...]  # [domain of the document][expert, the seed last] mean weight under `best`, test half
    fitted: dict[str, float]  # the settings by name, for the record
    growth: tuple[tuple[float, float], ...]  # bits per byte and its error with 1, 2, ... experts under `best`, chosen on the tune half


def compare(
    holdout: Holdout, seed_N: Floats, experts: Side, dense: Sequence[Control] = (), random: Side | None = None, router: str | None = None
) -> Compared:
    """The honest table. Gains are over the dense control with the least loss on the test half (so chosen against the result),
    or over the seed where there is no control. `best` goes by `router`, or else by the better of `centroid` and `sparse`: `posterior`
    must be asked for, since it runs every expert. Raises BadInput when columns do not match the holdout, or nothing here goes by `router`.
    """
    sides = [experts] + ([random] if random else [])
    for column in (seed_N, *(control.loglik_N for control in dense), *(columns for side in sides for columns in side[:2])):
        if len(column) != len(holdout.document_N):
            raise BadInput(f"a column has {len(column)} tokens, the holdout {len(holdout.document_N)}: score the model on this holdout")
    domains = len(experts.owner_K)
    ks = top_ks(experts.loglik_NK.shape[1])
    signals = {"centroid": experts.dist2_NK} | other_signals(holdout, seed_N, experts)
    if router is not None and router not in signals:
        raise BadInput(f"no ensemble of this table is routed by {router!r}: choose one of {', '.join(signals)}")
    found = {name: [_fit(holdout, seed_N, experts, top_k, signal_NS, name) for top_k in ks] for name, signal_NS in signals.items()}
    fits = found.pop("centroid") + [min(several, key=lambda one: one.nats) for several in found.values()]
    lines = [("seed", "seed", seed_N, Cost())]
    lines += [(control.name, "control", control.loglik_N, control.cost) for control in dense]
    if random:
        tried = [_fit(holdout, seed_N, random, top_k, random.dist2_NK) for top_k in top_ks(random.loglik_NK.shape[1])]
        chosen = min(tried, key=lambda one: one.nats)
        lines += [(f"random clusters, {_top(chosen, random)}", "control", mixed(seed_N, random, chosen, random.dist2_NK), random.cost)]
        lines += [("random clusters, uniform", "control", _uniform(random), random.cost)]
    lines += [("uniform routing", "control", _uniform(experts), experts.cost)]
    lines += [(_name(one, experts), "result", mixed(seed_N, experts, one, signals[one.router]), experts.cost) for one in fits]
    own_N = np.take_along_axis(experts.loglik_NK, np.array(experts.owner_K)[holdout.domain_D[holdout.document_N], None], 1)[:, 0]
    lines += [("oracle routing", "bound", own_N, experts.cost)]

    test_D = ~holdout.tune_D
    strongest = min((control.loglik_N for control in dense), key=lambda one_N: nats(one_N, holdout)[test_D].sum(), default=seed_N)
    rows = tuple(
        row(name, one_N, holdout, domains=domains, against_N=None if one_N is strongest else strongest, role=role, **cost.model_dump())
        for name, role, one_N, cost in lines
    )
    best = min((one for one in fits if one.router == router or (router is None and one.router != "posterior")), key=lambda one: one.nats)
    who, more = routing(holdout, experts, best, signals[best.router]), growth(holdout, seed_N, experts, best, signals[best.router])
    return Compared(rows, tuple(fits), best, _name(best, experts), who, _fitted(fits, best, experts), more)


def other_signals(holdout: Holdout, seed_N: Floats, side: Side) -> dict[str, Floats]:
    """What the routers beside `centroid` go by [N, S]: sparse distances where there are some, and the likelihoods so far.

    A table begins each document anew and reads on to its end; the live posterior sees one window, as all live models do.
    """
    signals = {} if side.sparse2_NK is None else {"sparse": side.sparse2_NK}
    return signals | {"posterior": posterior_scores(np.column_stack([side.loglik_NK, seed_N]), holdout.document_N)}


def top_ks(experts: int) -> list[int]:
    """1, 2, 4 where there are so many experts, and all of them with the seed."""
    return [k for k in TOP_K if k < experts] + [experts + 1]


def growth(holdout: Holdout, seed_N: Floats, side: Side, chosen: Fit, signal_NS: Floats) -> tuple[tuple[float, float], ...]:
    """Bits per byte on the test half with ever more experts, the one that lowers the loss of the tune half most first; nothing where
    experts are many, or are routed by what all of them say."""
    loglik_NE, experts = np.column_stack([side.loglik_NK, seed_N]), side.loglik_NK.shape[1]
    if not 1 < experts <= MOST_GROWN or ROUTERS[chosen.router].signal == "loglik":
        return ()

    def mixed(members: tuple[int, ...], some_N: NDArray[np.bool_]) -> Floats:
        weight_NE = weights(signal_NS[some_N][:, list(members)], *chosen[:4])
        return mix(loglik_NE[some_N][:, [*members, experts]], weight_NE)

    tune_N, every_N = holdout.tune_N, np.ones(len(loglik_NE), bool)
    order = greedy(lambda members: -float(mixed(members, tune_N).mean()), range(experts), experts).order
    losses = [bits_per_byte(mixed(tuple(sorted(order[: n + 1])), every_N), holdout, ~holdout.tune_D) for n in range(len(order))]
    return tuple((loss.value, loss.standard_error) for loss in losses)


def routing(holdout: Holdout, side: Side, chosen: Fit, signal_NS: Floats) -> tuple[tuple[float, ...], ...]:
    """Mean weight of each domain's expert, the seed last, over each domain's tokens of the test half [K][K + 1]; zeros where there
    are none. An expert of several domains stands at the document's own, or else at its first."""
    weight_NE = weights(signal_NS, *chosen[:4])
    domain_N = holdout.domain_D[holdout.document_N]
    owner_K = np.array(side.owner_K)
    made = []
    for k, own in enumerate(owner_K):
        mine_NE = weight_NE[(domain_N == k) & ~holdout.tune_N]
        mean_E = mine_NE.mean(0) if len(mine_NE) else np.zeros(weight_NE.shape[1])
        column_E = [k if e == own else int(np.flatnonzero(owner_K == e)[0]) for e in range(len(mean_E) - 1)]
        row = np.zeros(len(owner_K) + 1)
        row[[*column_E, -1]] = mean_E
        made.append(tuple(row.tolist()))
    return tuple(made)


def _fit(holdout: Holdout, seed_N: Floats, side: Side, top_k: int, signal_NS: Floats, router: str = "centroid") -> Fit:
    tune_N = holdout.tune_N
    return fit(np.column_stack([side.loglik_NK[tune_N], seed_N[tune_N]]), signal_NS[tune_N], top_k, router)


def mixed(seed_N: Floats, side: Side, chosen: Fit, signal_NS: Floats) -> Floats:
    """The column [N] of an ensemble of these experts and the seed."""
    return mix(np.column_stack([side.loglik_NK, seed_N]), weights(signal_NS, *chosen[:4]))


def _uniform(side: Side) -> Floats:
    return mix(side.loglik_NK, np.full(side.loglik_NK.shape, 1 / side.loglik_NK.shape[1]))


def _name(chosen: Fit, side: Side) -> str:
    """What the row is called: c-BTM is routed by centroids."""
    return f"c-BTM {_top(chosen, side)}" if chosen.router == "centroid" else f"{chosen.router} routing, {_top(chosen, side)}"


def _top(chosen: Fit, side: Side) -> str:
    return f"top-{chosen.top_k}" if chosen.top_k <= side.loglik_NK.shape[1] else "all"


def _fitted(fits: Sequence[Fit], best: Fit, side: Side) -> dict[str, float]:
    """Settings by name: those of the best, then those of each top-k."""
    named = {"": best} | {f"{_top(one, side)} " if one.router == "centroid" else f"{one.router} ": one for one in fits}
    found: dict[str, float] = {"top_k": best.top_k}
    for prefix, one in named.items():
        found[f"{prefix}temperature"] = one.temperature
        if one.seed_distance is not None:
            found[f"{prefix}seed_distance"] = one.seed_distance
    return found
