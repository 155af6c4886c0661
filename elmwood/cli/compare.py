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
from elmwood.cli.domains import opener
from elmwood.cli.ensure import Columns, ensure
from elmwood.cli.models import as_model, common_seed, division_of
from elmwood.cli.screen import bars, emit, out, short, talk
from elmwood.domains.partition import serving
from elmwood.domains.route import ROUTERS, candidates, gate, nearest_place
from elmwood.engine import Progress
from elmwood.errors import UnknownName
from elmwood.evaluate.budget import order
from elmwood.evaluate.holdout import GATE
from elmwood.evaluate.sequential import Finding, Population, Rule, best, decide, look, per_byte, population, touched, worst
from elmwood.records import Digest, Ensemble, Expert, Forest, Partition, Record, Seed, fingerprint
from elmwood.report.sequential import wealth_plot
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]


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
        return touched(self.weight_a_NM, self.weight_b_NM, self.block_N, len(self.block_G))

    def within(self, among_G: Bools) -> "Sides":
        """The same on the tokens of some blocks."""
        here_N = among_G[self.block_N]
        return self._replace(**{name: getattr(self, name)[here_N] for name in ("weight_a_NM", "weight_b_NM", "token_N", "block_N")})


def compare(*, a, b, partition, length, documents, min_effect, alpha, beta, cap, clip, plot, store, as_json) -> None:
    home = Store(store)
    one, other = (as_model(home.load(name), home) for name in (a, b))
    seed = common_seed([one, other], home)
    division = division_of([other, one], partition, home)
    spec = evaluate.HoldoutSpec(partition=division.digest, seed=seed.digest, length=length or min(seed.context, 1024), documents=documents)
    rule = Rule(alpha=alpha, beta=beta, worthless=min_effect, cap=cap)
    with bars() as progress:
        columns = Columns(spec, home, stay=True)
        held = columns.held
        sides = mix_up(one, other, seed, held, home, progress)
        key = fingerprint("compare", one.digest, other.digest, held.name)
        found, cost = judge(sides, columns, rule, clip, key.encode(), progress)
    if plot:
        Path(plot).write_text(wealth_plot(found.for_T, found.against_T, alpha=alpha, beta=beta, names=("better", "not better")))
    told = {"a": one.digest, "b": other.digest, **facts(found, rule, clip), **cost, "order": key, "holdout": held.name}
    told |= {
        "protocol": held.protocol,
        "split": "gate",
        "machine": platform.machine(),
        "precision": "as each model is stored",
        "plot": plot and str(plot),
    }
    if as_json:
        emit(told)
    else:
        tell(a, b, found, rule, told)


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
    if model.router not in ROUTERS:  # a record may come from a stranger, so no 'module:function' here
        raise UnknownName(f"the ensemble asks for router {model.router!r}; have {', '.join(sorted(ROUTERS))}")
    return ROUTERS[model.router].signal not in ("dense", "sparse")


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
    router = ROUTERS[model.router]
    forest = store.load(model.forest, Forest)
    division, experts = store.load(forest.partition, Partition), [store.load(digest, Expert) for digest in forest.experts]
    served = serving(division, [(expert.partition, expert.domain) for expert in experts], store)
    dist2_NE = nearest_place(dist2(division.digest, router.signal), served)
    weight_NE = gate(router(candidates(dist2_NE, model.seed_distance)), model.temperature, model.top_k)
    weight_NM[:, [models.index(digest) for digest in parts(model, store)[: weight_NE.shape[1]]]] = weight_NE
    return weight_NM


# ---- the test -------------------------------------------------------------------------------------------------------


def judge(
    sides: Sides, columns: Columns, rule: Rule, clip: float, key: bytes, progress: Progress, among_G: Bools | None = None
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
    order_B = order(key, len(place_T), bounds.scale_B)
    # where nothing need be run, all blocks are known and the answer is exact
    found = decide(draw, order_B, bounds, rule) if unknown else look(draw(order_B), order_B, bounds, rule)
    return found._replace(total=int(among_G.sum())), {
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
    size_B = block(np.ones(len(sides.token_N)))
    moved_B = block(np.abs(sides.weight_b_NM - sides.weight_a_NM).sum(1) / 2) / size_B
    feature_BF = np.column_stack([moved_B, size_B, *(block(-one_N) for one_N in loglik_NM.T[known_NM.all(0)])])
    return population(floor_B, ceiling_B, len(sides.block_G), clip=clip, moved_B=moved_B, feature_BF=feature_BF)


# ---- what is said ---------------------------------------------------------------------------------------------------


def facts(found: Finding, rule: Rule, clip: float) -> dict[str, Any]:
    """A finding as JSON. Effects are of the blocks the change can touch, `overall` ones of all blocks."""
    return {
        "outcome": found.outcome, "effect": found.effect, "low": found.low, "high": found.high, "overall": found.effect * found.share,
        "blocks_drawn": found.drawn, "blocks_touched": found.size, "blocks": found.total, "estimand": found.estimand,
        "clip": clip, "clipped": found.clipped, "clip_effect": found.clip_effect, "alpha": rule.alpha, "beta": rule.beta,
        "min_effect": rule.worthless, "cap": rule.cap,
    }  # fmt: skip


def tell(a: str, b: str, found: Finding, rule: Rule, told: dict[str, Any]) -> None:
    """The answer, and everything one must know to weigh it."""
    words = {
        "better": f"{b} is better than {a}",
        "not better": f"{b} is not better than {a} by {rule.worthless:g} bits per byte",
        "undecided": f"undecided after {found.drawn:,} blocks: raise --cap, or ask for a larger --min-effect",
    }
    out.print(words[found.outcome], style="bold", soft_wrap=True)
    exact = found.drawn == found.size
    interval = "exact for these blocks" if exact else (
        f"from {found.low:+.4f} to {found.high:+.4f}, wrong below {rule.alpha:.0%} and above {rule.beta:.0%} of the time, at any look"
    )  # fmt: skip
    where = "where it can differ" if found.size < found.total else "over all blocks"
    over = f"; {found.effect * found.share:+.5f} over all blocks" if found.size < found.total else ""
    lines = [
        f"effect    {found.effect:+.4f} bits per byte {where} ({interval}){over}",
        f"blocks    {found.drawn:,} of {found.size:,} drawn" + (f"; the other {found.total - found.size:,} of {found.total:,} cannot differ"
                                                                if found.size < found.total else ""),
        f"tokens    {short(told['tokens_forwarded'])} forwarded; running what is missing on all blocks: {short(told['full_tokens'])}",
        f"judged    the {found.estimand} over the gate split of {told['holdout'][:24]}… ({told['protocol']})",
    ]  # fmt: skip
    if found.estimand != "mean":
        lines[-1] += f", clipped at {told['clip']:g}: {found.clipped} drawn blocks beyond, {found.clip_effect:+.5f} on the mean"
    lines += [
        f"order     {told['order'][:16]}…; {told['models_known']} models were known, {told['models_run']} were run, on {told['machine']}",
        "not run   text generation, benchmarks, the audit split; no error budget was charged",
    ]
    for line in lines:
        out.print(line, soft_wrap=True)
    if told["plot"]:
        talk.print(f"wealth over blocks: {told['plot']}")
