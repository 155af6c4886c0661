"""What `elmwood table` does: everything a forest's columns can say, and no model is run but where a column is missing.

N scored tokens, E experts by digest (M = E + 1 with the seed last), W windows
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood import evaluate
from elmwood.cli.screen import bars, count, duration, emit, expand, out, short, talk
from elmwood.cli.screen import table as draw
from elmwood.domains.partition import serving
from elmwood.domains.route import Routing, Signals, nearest_place, remember, router_of, weights
from elmwood.errors import BadInput
from elmwood.evaluate.losses import Estimate, bits_per_byte
from elmwood.evaluate.sequential.decision import best, worst
from elmwood.evaluate.subsets import greedy, member_weights, optimum, values, would_help
from elmwood.records import Ensemble, Expert, Forest, Partition, Seed
from elmwood.report.wealth import Line, experts_plot
from elmwood.store import Store
from elmwood.study.ancestry import as_model
from elmwood.study.scoring import Budget, Columns, ensure
from elmwood.study.tasks import default_workers, label, opener

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
STRANGE = 0.02  # of the windows, drawn by chance, on which an expert is scored though it is not near: what the router may miss


class Routed(NamedTuple):
    """What weights follow from."""

    signals: Signals
    routing: Routing


def table(
    *, forest, choose, candidate, near, top_k, partition, length, documents, budget, seconds, source, plot, workers, store, as_json
) -> None:  # fmt: skip
    home = Store(store)
    named = as_model(home.load(forest), home)
    if not isinstance(named, Ensemble):
        raise BadInput(f"{forest} is a {named.kind}: a table is of a forest, or of an ensemble of one")
    grown = home.load(named.forest, Forest)
    seed, division = home.load(grown.seed, Seed), home.load(partition or grown.partition, Partition)
    spec = evaluate.HoldoutSpec(partition=division.digest, seed=seed.digest, length=length or min(seed.context, 1024), documents=documents)
    new = [home.load(one, Expert) for one in expand(home, candidate)]
    experts = [home.load(digest, Expert) for digest in grown.experts]
    columns = Columns(spec, home)
    held = columns.held
    with bars() as progress:
        kind = router_of(named).distances or "dense"
        dist2_NK = evaluate.distances(held, division, home, progress, signal=kind, open_model=opener(division.embedder.name))
        served = serving(division, [(one.partition, one.domain) for one in experts], home)
        dist2_NE = nearest_place(dist2_NK, served)
        windows = near_windows(dist2_NE, held, near) if near else {}
        models = [("seed", seed.digest), *((label(division, one.domain), one.digest) for one in (*experts, *new))]
        came = evaluate.bring([seed, *experts, *new], held, Store(source), home) if source else 0
        found = ensure(
            models, columns, windows={experts[e].digest: window_W for e, window_W in windows.items()},
            budget=Budget(budget and count(budget), seconds), workers=workers or default_workers(seed, len(models)), progress=progress,
        )  # fmt: skip
    seed_N = found.columns[seed.digest]
    if np.isnan(seed_N).any():
        raise BadInput(
            "the budget did not reach the whole column of the seed, which stands in where others are missing: give a larger one; "
            "what was run is kept"
        )
    known_NM = np.column_stack([*(found.columns[one.digest] for one in experts), seed_N])
    loglik_NM = np.where(np.isnan(known_NM), seed_N[:, None], known_NM)
    how = settings(named if named.digest == home.resolve(forest) else None, loglik_NM, dist2_NE, held, top_k)
    names = [f"{label(division, one.domain)}" for one in experts]
    told: dict[str, Any] = {
        "forest": grown.digest, "holdout": held.name, "protocol": held.protocol, "router": how.routing.router,
        "temperature": how.routing.temperature, "top_k": how.routing.top_k, "seed_joins": how.routing.seed_distance is not None,
        "cost": {"models_run": found.run, "tokens": found.tokens, "seconds": round(found.seconds, 1), "missing": found.missing,
                 "known": found.known, "brought": came},
    }  # fmt: skip
    told |= said(known_NM, loglik_NM, how, held, choose)
    told["candidates"] = [
        {"expert": one.digest, "name": label(division, one.domain)}
        | screened(found.columns[one.digest], loglik_NM, how, held, one.domain if one.partition == division.digest else None)
        for one in new
    ]
    told["experts"] = [{"expert": one.digest, "name": name} | row for one, name, row in zip(experts, names, told["experts"], strict=True)]
    if plot:
        drawn(told, plot)
    if as_json:
        emit(told)
    else:
        tell(told, plot)


def near_windows(dist2_NE: Floats, held: evaluate.Holdout, near: int) -> dict[int, Ints]:
    """The windows on which each expert is among the nearest at some token, and a few drawn by chance."""
    window_N = held.window_N
    rank_NE = np.argsort(np.argsort(dist2_NE, axis=1, kind="stable"), axis=1)
    count = len(held.windows.rows_WL)
    strange_W = np.random.default_rng(0).permutation(count)[: max(2, int(STRANGE * count))]
    return {e: np.union1d(window_N[rank_NE[:, e] < near], strange_W) for e in range(dist2_NE.shape[1])}


def settings(named: Ensemble | None, loglik_NM: Floats, dist2_NE: Floats, held: evaluate.Holdout, top_k: int) -> Routed:
    """Those of an ensemble, or for a forest those with the least loss on the tune half."""
    if named is None:
        tune_N = held.tune_N
        routing = evaluate.calibrate(loglik_NM[tune_N], dist2_NE[tune_N], held.document_N[tune_N], top_k).routing
    else:
        routing = Routing.of(named)
    memory_NM = remember(loglik_NM, routing.fading, held.document_N) if router_of(routing).memory else None
    return Routed(Signals(dist2_NE, memory_NM), routing)


def said(known_NM: Floats, loglik_NM: Floats, how: Routed, held: evaluate.Holdout, choose: int | None) -> dict[str, Any]:
    """Everything that is of these members alone. Choices are made on the tune half, losses are of the other."""
    tune_N, test_D, experts = held.tune_N, ~held.tune_D, loglik_NM.shape[1] - 1
    size = np.log(2) * held.bytes_D[held.tune_D].sum()

    def weigh(members: Sequence[int], some_N: Any) -> Floats:
        return member_weights(how.signals.some(some_N), how.routing, members)

    def chosen_by(members: tuple[int, ...]) -> float:
        return -float(evaluate.mix(loglik_NM[tune_N], weigh(members, tune_N)).sum()) / size

    def told(members: Sequence[int]) -> Estimate:
        return bits_per_byte(evaluate.mix(loglik_NM, weigh(members, slice(None))), held, test_D)

    everyone = tuple(range(experts))
    weight_NM = weigh(everyone, slice(None))
    sure_NM = np.where(np.isnan(known_NM), 0, weight_NM)
    high_N, low_N = best(known_NM, sure_NM), worst(known_NM, sure_NM)
    most = bits_per_byte(low_N, held, test_D).value if np.isfinite(low_N[~held.tune_N]).all() else None  # one not known may speak alone
    static = optimum(loglik_NM[tune_N])
    mixed_N = evaluate.mix(loglik_NM, np.broadcast_to(static.weight_E, loglik_NM.shape))
    grown = greedy(chosen_by, everyone, choose or experts)
    value_E = values(lambda members: told(members).value, everyone)
    return {
        "seed": bits_per_byte(loglik_NM[:, -1], held, test_D)._asdict(),
        "routed": told(everyone)._asdict() | {"least": bits_per_byte(high_N, held, test_D).value, "most": most},
        "static": bits_per_byte(mixed_N, held, test_D)._asdict() | {"gap_nats_per_token": static.gap, "passes": static.passes,
                                                                    "seed_weight": float(static.weight_E[-1])},
        "experts": [{"weight": float(w), "value": v} for w, v in zip(static.weight_E[:-1], value_E, strict=True)],
        "chosen": [
            {"place": one, "tune": loss, "test": told(grown.order[: n + 1])._asdict()}
            for n, (one, loss) in enumerate(zip(grown.order, grown.losses, strict=True))
        ],
        "looked": grown.looked,
    }  # fmt: skip


def screened(new_N: Floats, loglik_NM: Floats, how: Routed, held: evaluate.Holdout, domain: int | None) -> dict[str, Any]:
    """Whether some weight on a new expert would lower the loss on its own domain's tune half; all of that half, where it has none here."""
    mixed_N = evaluate.mix(loglik_NM, weights(how.signals, how.routing))
    among_N = held.tune_N & ~np.isnan(new_N)
    if domain is not None:
        among_N &= held.block_domain_B[held.block_N] == domain
    ratio = would_help(np.nan_to_num(new_N), mixed_N, held.block_N, among_N)
    return {"ratio": ratio.value, "error": None if np.isnan(ratio.standard_error) else ratio.standard_error, "tokens": int(among_N.sum())}


def drawn(told: dict[str, Any], plot: Path) -> None:
    """Bits per byte against the number of experts, in the order chosen."""
    test = [row["test"] for row in told["chosen"]]
    line = Line("chosen one by one", range(1, len(test) + 1), [one["value"] for one in test], [one["standard_error"] for one in test])
    Path(plot).write_text(experts_plot([line], reference=("seed", told["seed"]["value"])))


def tell(told: dict[str, Any], plot: Path | None) -> None:
    cost, experts = told["cost"], told["experts"]
    order = {row["place"]: n + 1 for n, row in enumerate(told["chosen"])}
    rows = [
        [one["name"], f"{one['weight']:.4f}", f"{one['value']:+.5f}", str(order.get(e, "")),
         f"{told['chosen'][order[e] - 1]['test']['value']:.4f}" if e in order else ""]
        for e, one in sorted(enumerate(experts), key=lambda item: order.get(item[0], len(order) + 1))
    ]  # fmt: skip
    draw("value: what is lost without it; chosen: in which order on the tune half, and the loss with those up to it",
         ["expert", "static weight", "value", "chosen", "bits/byte"], rows)  # fmt: skip
    seed, mixed, static = told["seed"], told["routed"], told["static"]
    lines = [
        f"seed      {seed['value']:.4f} ± {seed['standard_error']:.4f} bits per byte on the test half",
        f"routed    {mixed['value']:.4f} ± {mixed['standard_error']:.4f} (top-{told['top_k']}, temperature {told['temperature']:.3g})",
        f"static    {static['value']:.4f} ± {static['standard_error']:.4f}, the seed weighing {static['seed_weight']:.3f}",
        f"          no weights are better by more than {static['gap_nats_per_token']:.1e} nats per token ({static['passes']} passes)",
        f"cost      {cost['models_run']} models run, {short(cost['tokens'])} tokens in {duration(cost['seconds'])}",
        f"          {cost['brought']} columns brought in; {told['looked']} subsets looked at for the choice, none run",
    ]
    if cost["known"] < 1:
        lines.append(f"absent    {1 - cost['known']:.0%} of all entries; the seed stands in, and whatever they are the routed loss lies")
        most = "any loss" if mixed["most"] is None else f"{mixed['most']:.4f}"
        lines.append(f"          between {mixed['least']:.4f} and {most}; {short(cost['missing'])} tokens asked for are left")
    for one in told["candidates"]:
        word = "would help" if one["ratio"] > 1 else "would not help"
        said_so = f"mean p_new / p_mix {one['ratio']:.4f} ± {one['error'] or float('nan'):.4f} over {one['tokens']:,} tokens"
        lines.append(f"new       {one['name']} {word}: {said_so}")
    for line in lines:
        out.print(line, soft_wrap=True)
    if plot:
        talk.print(f"loss against the number of experts: {plot}")
