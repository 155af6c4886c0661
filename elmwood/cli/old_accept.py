"""What `elmwood accept` does: an expert asks to join a forest. Its weights are looked at, then what it says of held-out text.

Nothing is drawn, and nothing of the error budget is spent, for what its weights alone refuse. G blocks of a split
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood import evaluate
from elmwood.cli.old_compare import Sides, drawing, judge, mix_up
from elmwood.cli.screen import bars, emit, out, short, talk
from elmwood.domains.partition import serving as served
from elmwood.engine import Progress
from elmwood.errors import BadInput, ForeignExpert
from elmwood.evaluate.admission import Evidence, Policy, cosine, judge_evidence, novelty
from elmwood.evaluate.holdout import GATE, TUNE
from elmwood.evaluate.sequential.decision import Finding, StoppingRule
from elmwood.evaluate.sequential.error_budget import begin, commitment, derive_key, finish, open_slice, random_order
from elmwood.records import Ensemble, Entry, Expert, Forest, Ledger, Partition, Record, Seed, Verdict
from elmwood.store import Store
from elmwood.study.ancestry import as_model
from elmwood.study.scoring import Columns
from elmwood.weights.similarity import is_finite, products

Bools = NDArray[np.bool_]

LEDGER = "ledger"  # the ref
SLICE = 1000  # blocks of the gate split that serve some submissions and are then retired, at least
SLICES = 10
SMALL = 0.02  # of the blocks an expert touches: domains with fewer are judged together
SURE = 1e3  # log wealth that stands for certainty


class Trial(NamedTuple):
    """One submission on the blocks it was given."""

    expert: Expert
    seed: Seed
    without: Record  # the ensemble that is there
    joined: Ensemble  # the same with the expert in it
    division: Partition
    own: tuple[int, ...]  # domains the expert serves
    columns: Columns
    slice_G: Bools  # of the gate split
    key: bytes
    level: float
    store: Store

    @property
    def held(self) -> evaluate.Holdout:
        return self.columns.held


def accept(*, expert, forest, length, documents, cap, clip, name, store, as_json) -> None:
    home, policy = Store(store), Policy()
    one = home.load(expert, Expert)
    seed, without, joined, others = sides_of(one, as_model(home.load(forest), home), home)
    division = home.load(home.load(joined.forest, Forest).partition, Partition)
    own = served(division, [(one.partition, one.domain)], home)[0]
    evidence = Evidence(expert=one.digest, finite=is_finite(one, home))
    told: dict[str, Any] = {"tokens_forwarded": 0}
    with bars() as progress, home.held(LEDGER):
        if evidence.finite:
            evidence = evidence.model_copy(update=likeness(one, others, seed, home))
        if evidence.finite and _fresh(evidence, policy):
            spec = evaluate.HoldoutSpec(
                partition=division.digest, seed=seed.digest, length=length or min(seed.context, 1024), documents=documents
            )
            columns = Columns(spec, home, stay=True)
            number, key, slice_G = submit(one, columns.held, home)
            level = ledger_of(home).entries[number].level
            trial = Trial(one, seed, without, joined, division, own, columns, slice_G, key, level, home)
            measured, told = gather(trial, policy, cap, clip, progress)
            evidence = evidence.model_copy(update=measured | {"level": level})
            told |= {
                "level": level,
                "submission": number + 1,
                "sealed": commitment(key),
                "key": key.hex(),
                "slice_blocks": int(slice_G.sum()),
            }
        verdict = judge_evidence(evidence, policy).model_copy(update={"forest": joined.forest, "holdout": told.get("holdout", "")})
        home.add(verdict)
        if "key" in told:
            facts = {"key": f"key={told['key']}", "verdict": verdict.digest}
            _keep(finish(ledger_of(home), number, verdict.accepted, **facts), home)
    if verdict.accepted and name:
        home.name(name, joined.forest)
    if as_json:
        emit({"digest": verdict.digest, "verdict": verdict.model_dump(mode="json"), "evidence": evidence.model_dump(mode="json"), **told})
    else:
        tell(verdict, told, expert, forest)


def sides_of(one: Expert, base: Record, store: Store) -> tuple[Seed, Record, Ensemble, list[Expert]]:
    """The seed, the ensemble without the expert and with it, and the experts that are there. Raises BadInput, ForeignExpert."""
    if not isinstance(base, Ensemble):
        raise BadInput(f"{base.digest[:8]} is a {base.kind}; an expert joins a forest, or an ensemble whose settings are to be used")
    there = store.load(base.forest, Forest)
    if one.seed != there.seed:
        raise ForeignExpert(f"expert {one.digest[:8]} grew from seed {one.seed[:8]}, this forest from {there.seed[:8]}: it cannot join")
    seed, others = store.load(one.seed, Seed), [digest for digest in there.experts if digest != one.digest]
    ensembles = []
    for members in (others, [*others, one.digest]):
        forest = there.model_copy(update={"experts": tuple(sorted(members))})
        ensemble = base.model_copy(update={"forest": store.add(forest)})
        store.add(ensemble)
        ensembles.append(ensemble)
    without = ensembles[0] if others else seed
    return seed, without, ensembles[1], [store.load(digest, Expert) for digest in others]


# ---- weights --------------------------------------------------------------------------------------------------------


def likeness(one: Expert, others: Sequence[Expert], seed: Seed, store: Store) -> dict[str, float]:
    """How far what it changed of the seed is what others did."""
    product_MM = products([one, *others], seed, store)
    mine, with_E, gram_EE = float(product_MM[0, 0]), product_MM[0, 1:], product_MM[1:, 1:]
    return {"cosine": cosine(mine, with_E, gram_EE), "novelty": novelty(mine, with_E, gram_EE)}


def _fresh(evidence: Evidence, policy: Policy) -> bool:
    """Neither a copy nor a blend. What is not a number is neither fresh."""
    cosine, novelty = evidence.cosine, evidence.novelty
    return cosine is not None and novelty is not None and cosine <= policy.cosine and novelty >= policy.novelty


# ---- the ledger -----------------------------------------------------------------------------------------------------


def ledger_of(store: Store) -> Ledger:
    """The store's sequence of submissions."""
    return store.load(LEDGER, Ledger) if LEDGER in store.names() else Ledger()


def _keep(ledger: Ledger, store: Store) -> None:
    store.name(LEDGER, store.add(ledger))


def submit(one: Expert, held: evaluate.Holdout, store: Store) -> tuple[int, bytes, Bools]:
    """Enter a submission before anything is drawn: its number from 0, the key of its order, and the blocks that serve it.

    One that was begun and not decided is taken up again: same number, same level, same order. Raises BadInput when all blocks are retired.
    """
    ledger, secret = ledger_of(store), store.secret()
    blocks = int((held.split_B == GATE).sum())

    def mine(entry: Entry) -> bool:
        return (entry.expert, entry.holdout, entry.accepted) == (one.digest, held.name, None)

    number = next((n for n, entry in enumerate(ledger.entries) if mine(entry)), len(ledger.entries))
    key = derive_key(secret, f"{number} {one.digest} {held.name}")
    earlier = sum(entry.holdout == held.name for entry in ledger.entries[:number])
    slice_G = np.zeros(blocks, bool)
    slice_G[open_slice(secret, blocks, int(np.clip(blocks // SLICE, 1, SLICES)), earlier)] = True
    if number == len(ledger.entries):
        _keep(begin(ledger, one.digest, holdout=held.name, sealed=commitment(key)), store)
    talk.print(f"submission {number + 1}: the order is {commitment(key)}", soft_wrap=True)
    return number, key, slice_G


# ---- held-out text --------------------------------------------------------------------------------------------------


def gather(trial: Trial, policy: Policy, cap: int, clip: float, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run models on the blocks it takes to know; evidence, and what it cost. Stops where the expert is no better than the seed."""
    held, columns = trial.held, trial.columns
    own_G = trial.slice_G & np.isin(_domains(held, GATE), trial.own)

    def ask(sides: Sides, rule: StoppingRule, among_G: Bools, what: str) -> Finding | None:
        if not (sides.touched_G & among_G).any():
            return None
        return judge(sides, columns, rule, clip, derive_key(trial.key, what), progress, among_G)[0]

    def mixed(a: Record, b: Record, split: int = GATE) -> Sides:
        return mix_up(a, b, trial.seed, held, trial.store, progress, split)

    alone = ask(mixed(trial.seed, trial.expert), _at(policy.min_effect, policy, cap), own_G, "own")
    evidence: dict[str, Any] = {"own_low": alone and alone.low, "secret_gain": alone and alone.effect}
    blocks = {"own": alone and alone.drawn}
    if alone and alone.outcome == "better":
        public = _public_gain(mixed(trial.seed, trial.expert, TUNE), trial, alone.drawn, progress)
        sides = mixed(trial.without, trial.joined)
        rule = StoppingRule(alpha=trial.level, beta=policy.beta, better=policy.ensemble_effect, worthless=policy.min_effect, cap=cap)
        together = ask(sides, rule, trial.slice_G, "ensemble")
        evidence |= {"public_gain": public, "ensemble_low": together and together.low}
        evidence |= {"ensemble_wealth": together and float(min(together.for_T.max(), SURE))}
        blocks |= {"ensemble": together and together.drawn, "touched": together and together.size}
        if together and together.outcome == "better":
            found = {what: ask(sides, _at(-policy.harm / share, policy, cap), among_G, what)
                     for what, (among_G, share) in _groups(sides, trial).items()}  # fmt: skip
            evidence["domain_low"] = {what: one.low * one.share for what, one in found.items() if one}
            blocks |= {what: one.drawn for what, one in found.items() if one}
    forwarded = sum(columns[digest].forwarded for digest in {*mixed_models(trial)})
    return evidence, {"blocks": blocks, "tokens_forwarded": forwarded, "holdout": held.name, "clip": clip}


def _at(least: float, policy: Policy, cap: int) -> StoppingRule:
    """Above `least` or below it?"""
    return StoppingRule(alpha=policy.alpha, beta=policy.beta, better=least, worthless=least, cap=cap)


def mixed_models(trial: Trial) -> Sequence[str]:
    """Digests of all models that may have been run."""
    return (*trial.store.load(trial.joined.forest, Forest).experts, trial.seed.digest)


def _domains(held: evaluate.Holdout, split: int) -> NDArray[np.integer]:
    return held.block_domain_B[held.split_B == split]


def _public_gain(sides: Sides, trial: Trial, count: int, progress: Progress) -> float | None:
    """Mean gain over the seed on as many blocks of published text of the expert's own domains."""
    place_T = np.flatnonzero(np.isin(_domains(trial.held, TUNE), trial.own))
    if not len(place_T):
        return None
    draw = drawing(sides, trial.columns, place_T, progress)
    return float(draw(random_order(derive_key(trial.key, "public"), len(place_T))[:count]).mean())


def _groups(sides: Sides, trial: Trial) -> dict[str, tuple[Bools, float]]:
    """The blocks of each domain that the expert touches, small ones together, and the share of them it touches: what it does not touch
    is not harmed, and a domain's loss is over all its text."""
    touched_G = sides.touched_G & trial.slice_G
    domain_G = _domains(trial.held, GATE)
    count_K = np.bincount(domain_G[touched_G], minlength=len(trial.division.domains))
    large = count_K >= max(1, SMALL * count_K.sum())
    groups = {f"{trial.division.domains[k].name} ({k})": trial.slice_G & (domain_G == k) for k in np.flatnonzero(large)}
    if (small := np.flatnonzero((count_K > 0) & ~large)).size:
        groups["all small domains"] = trial.slice_G & np.isin(domain_G, small)
    return {what: (among_G, float(touched_G[among_G].mean())) for what, among_G in groups.items()}


# ---- what is said ---------------------------------------------------------------------------------------------------


def tell(verdict: Verdict, told: dict[str, Any], expert: str, forest: str) -> None:
    """The verdict, with every check."""
    out.print(f"{verdict.digest}  {expert} {'may join' if verdict.accepted else 'may not join'} {forest}", style="bold", soft_wrap=True)
    for check in verdict.checks:
        value = "not measured" if check.value is None else f"{check.value:+.4f}"
        threshold = "none was set" if check.threshold is None else f"{check.side} {check.threshold:g}"
        out.print(f"{'passed' if check.passed else 'FAILED':<7} {value:>13}  {threshold:<18} {check.name}", soft_wrap=True, markup=False)
    if "key" not in told:
        out.print("its weights decided: nothing was drawn, and no error budget was spent", soft_wrap=True)
        return
    drawn = ", ".join(f"{what} {count:,}" for what, count in told["blocks"].items() if count is not None)
    out.print(f"blocks drawn: {drawn}; {short(told['tokens_forwarded'])} tokens forwarded", soft_wrap=True, markup=False)
    out.print(
        f"submission {told['submission']}, error allowed {told['level']:.4g}; from a slice of {told['slice_blocks']:,} blocks, in the "
        f"order of key {told['key'][:16]}…, sealed before as {told['sealed'][:20]}…", soft_wrap=True,
    )  # fmt: skip
