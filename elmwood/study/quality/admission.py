"""May an expert join a forest? Its weights are checked first, then its gain on held-out text.

What the weights alone refuse draws no block and spends nothing of the error budget. G blocks of a split, K domains
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.domains.partition import serving
from elmwood.engine import Progress, placed, silent
from elmwood.errors import BadInput, ForeignExpert
from elmwood.evaluate.admission import Evidence, Policy, cosine, judge_evidence, novelty
from elmwood.evaluate.holdout import GATE, TUNE, Holdout
from elmwood.evaluate.sequential.decision import Finding, StoppingRule
from elmwood.evaluate.sequential.error_budget import begin, commitment, derive_key, finish, open_slice, random_order, slices_key
from elmwood.ranges import Count, Documents, Window, checked
from elmwood.records import Digest, Ensemble, Expert, Forest, Ledger, Partition, Record, Seed, Verdict
from elmwood.store import AnyStore, Named, Store
from elmwood.study.ancestry import as_model
from elmwood.study.quality.contest import Clip, Pair, drawing, judge, pair_models
from elmwood.study.quality.scoring import Columns, holdout_spec
from elmwood.weights.similarity import is_finite, products
from elmwood.weights.sketch import likely

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating]

LEDGER = "ledger"  # the ref
SLICE = 1000  # blocks of the gate split, at least, that serve some submissions and are then retired
SLICES = 10
SMALL = 0.02  # of the blocks that an expert touches; domains with fewer are tested together
SURE = 1e3  # log wealth that counts as certainty
MANY = 40  # experts that are all compared exactly


class Submission(NamedTuple):
    """One entry of a ledger: its place, its error level, the key of its order of blocks, and the blocks it may draw.

    `submit` makes it from the store's own ledger. A hub has a ledger of its own, and any machine runs the trial (elmwood/hub/client).
    """

    number: int  # from 0
    level: float
    key: bytes
    slice_G: Bools  # of the gate split

    @property
    def commitment(self) -> str:
        """Published before anything is drawn."""
        return commitment(self.key)


class AdmissionCost(NamedTuple):
    """What was drawn and run: nothing where the weights decided."""

    blocks: dict[str, int | None]  # drawn for each question; None: the expert touches none
    tokens_forwarded: int
    clip: float | None = None  # bits per byte


class Admission(NamedTuple):
    """The verdict, its evidence and the submission. No submission where the weights decided, or where another process made it."""

    record: Verdict
    forest: Forest  # with the expert
    evidence: Evidence | None
    submission: Submission | None
    cost: AdmissionCost

    def _repr_html_(self) -> str | None:
        return self.record._repr_html_()


class Candidate(NamedTuple):
    """An expert, and the ensemble that it asks to join."""

    expert: Expert
    seed: Seed
    without: Record  # the ensemble as it is; the seed where it has no expert
    joined: Ensemble  # with the expert
    others: tuple[Expert, ...]
    division: Partition
    own: tuple[int, ...]  # domains that the expert serves

    @property
    def models(self) -> tuple[Digest, ...]:
        """Digests of all models that may be run."""
        return (self.seed.digest, self.expert.digest, *(one.digest for one in self.others), self.joined.digest, self.without.digest)


@placed
@checked
def accept(
    expert: Named, forest: Named, store: AnyStore = None, *, length: Window = None, documents: Documents = None, cap: Count = 5000,
    clip: Clip = 0.5, name: str | None = None, device: str | None = None, progress: Progress = silent,
    on_submission: Callable[[Submission], None] = lambda submission: None,
) -> Admission:  # fmt: skip
    """May an expert join a forest, or an ensemble whose settings are used? The verdict is kept, also in the store's ledger.

    `cap`: most blocks of 2 KiB for each question. `clip`: most bits per byte that a block counts where no bound is certain. `name`: of the
    forest with the expert in it, where it is accepted. `on_submission` gets the commitment before anything is drawn. An interrupted call
    is resumed by the next one, to the same verdict. Models are run anew on the blocks drawn, whatever was scored before, so the verdict
    does not depend on it. Raises BadInput, ForeignExpert.
    """
    store, policy = Store(store), Policy()
    before = ledger_of(store)  # first: a verdict that is not in it came while this call was under way
    if name:
        store.check_name(name)
    candidate = open_candidate(store.load(expert, Expert), as_model(store.load(forest), store), store)
    joined = store.load(candidate.joined.forest, Forest)
    evidence, submission = Evidence(expert=candidate.expert.digest, finite=is_finite(candidate.expert, store)), None
    cost, holdout = AdmissionCost({}, 0), ""
    with store.held(LEDGER, progress):
        if evidence.finite:
            evidence = evidence.model_copy(update=likeness(candidate, store))
        if evidence.finite and is_new(evidence, policy):
            columns = Columns(holdout_spec(candidate.division, candidate.seed, length, documents), store, stay=True)
            holdout = columns.held.name
            if known := decided_meanwhile(before, candidate, holdout, store):
                return _finish_naming(Admission(known, joined, None, None, cost), name, store)
            submission = submit(candidate.expert, columns.held, store)
            on_submission(submission)
            columns.begin_alone(_folder(candidate, submission, store))
            measured, cost = Trial(candidate, columns, submission, policy, cap, clip, progress).gather()
            evidence = evidence.model_copy(update=measured)
        verdict = judge_evidence(evidence, policy).model_copy(update={"forest": joined.digest, "holdout": holdout})
        store.add(verdict)
        made = _finish_naming(Admission(verdict, joined, evidence, submission, cost), name, store)
        if submission:
            close(submission, verdict, candidate, store)
    return made


def _finish_naming(made: Admission, name: str | None, store: Store) -> Admission:
    if made.record.accepted and name:
        store.name(name, made.forest.digest)
    return made


def open_candidate(expert: Expert, base: Record, store: Store) -> Candidate:
    """The expert, and the ensemble without it and with it. Raises BadInput, ForeignExpert."""
    if not isinstance(base, Ensemble):
        raise BadInput(f"{base.digest[:8]} is a {base.kind}; name a forest, or an ensemble whose settings are used")
    there = store.load(base.forest, Forest)
    if expert.seed != there.seed:
        raise ForeignExpert(
            f"expert {expert.digest[:8]} grew from seed {expert.seed[:8]}, this forest from {there.seed[:8]}: choose a forest of its seed"
        )
    others = [digest for digest in there.experts if digest != expert.digest]
    without, joined = (
        base.model_copy(update={"forest": store.add(there.model_copy(update={"experts": tuple(sorted(members))}))})
        for members in (others, [*others, expert.digest])
    )
    for ensemble in (without, joined):
        store.add(ensemble)
    seed, division = store.load(expert.seed, Seed), store.load(there.partition, Partition)
    (own,) = serving(division, [(expert.partition, expert.domain)], store)
    return Candidate(
        expert, seed, without if others else seed, joined, tuple(store.load(digest, Expert) for digest in others), division, tuple(own)
    )  # fmt: skip


# ---- weights --------------------------------------------------------------------------------------------------------


def likeness(candidate: Candidate, store: Store) -> dict[str, float]:
    """How similar the expert's delta is to those of the forest's experts."""
    own, with_E, gram_EE = compare_deltas(candidate.expert, candidate.others, candidate.seed, store)
    return {"cosine": cosine(own, with_E, gram_EE), "novelty": novelty(own, with_E, gram_EE)}


def compare_deltas(expert: Expert, others: Sequence[Expert], seed: Seed, store: Store) -> tuple[float, Floats, Floats]:
    """The squared length of a delta, its inner products with the others [E], and theirs [E, E]: of many adapters, with those that a
    sketch finds it to be made of."""
    if len(others) > MANY and all("adapter_config.json" in each.files for each in (expert, *others)):
        others = likely(expert, others, seed, store)
    product_MM = products([expert, *others], seed, store)
    return float(product_MM[0, 0]), product_MM[0, 1:], product_MM[1:, 1:]


def is_new(evidence: Evidence, policy: Policy) -> bool:
    """Neither a copy nor a blend; NaN is neither new."""
    cosine, novelty = evidence.cosine, evidence.novelty
    return cosine is not None and novelty is not None and cosine <= policy.cosine and novelty >= policy.novelty


# ---- the ledger -----------------------------------------------------------------------------------------------------


def ledger_of(store: Store) -> Ledger:
    """The store's sequence of submissions."""
    return store.load(LEDGER, Ledger) if LEDGER in store.names() else Ledger()


def submit(expert: Expert, held: Holdout, store: Store) -> Submission:
    """Enter a submission before anything is drawn. Raises BadInput when all blocks are retired.

    An undecided one is taken up again: same number, level and order.
    """
    ledger, secret = ledger_of(store), store.secret()
    undecided = (expert.digest, held.name, None)
    same = (n for n, entry in enumerate(ledger.entries) if (entry.expert, entry.holdout, entry.accepted) == undecided)
    number = next(same, len(ledger.entries))
    key = derive_key(secret, f"{number} {expert.digest} {held.name}")
    earlier = sum(entry.holdout == held.name for entry in ledger.entries[:number])
    slice_G = cut_slice(slices_key(secret), earlier, held)
    if number == len(ledger.entries):
        ledger = begin(ledger, expert.digest, holdout=held.name, sealed=commitment(key))
        store.name(LEDGER, store.add(ledger))
    return Submission(number, ledger.entries[number].level, key, slice_G)


def cut_slice(key: bytes, earlier: int, held: Holdout) -> Bools:
    """The blocks of the gate split that a submission may draw, after so many earlier ones on this holdout [G]. `key`: `slices_key` of the
    ledger's secret. Raises BadInput when all blocks are retired."""
    blocks = int((held.split_B == GATE).sum())
    slice_G = np.zeros(blocks, bool)
    slice_G[open_slice(key, blocks, int(np.clip(blocks // SLICE, 1, SLICES)), earlier)] = True
    return slice_G


def decided_meanwhile(before: Ledger, candidate: Candidate, holdout: str, store: Store) -> Verdict | None:
    """The verdict on the same question by a process that held the ledger while this one waited for it."""

    decided = {number for number, entry in enumerate(before.entries) if entry.verdict}
    for number, entry in enumerate(ledger_of(store).entries):
        if entry.verdict and number not in decided and (entry.expert, entry.holdout) == (candidate.expert.digest, holdout):
            verdict = store.load(entry.verdict, Verdict)
            if verdict.forest == candidate.joined.forest:
                return verdict
    return None


def close(submission: Submission, verdict: Verdict, candidate: Candidate, store: Store) -> None:
    """Enter the verdict, and publish the key."""
    facts = {"key": f"key={submission.key.hex()}", "verdict": verdict.digest}
    store.name(LEDGER, store.add(finish(ledger_of(store), submission.number, verdict.accepted, **facts)))
    shutil.rmtree(_folder(candidate, submission, store), ignore_errors=True)


def _folder(candidate: Candidate, submission: Submission, store: Store) -> Path:
    """Of the scores of an unfinished trial."""
    return store.work(LEDGER) / f"{submission.number}-{candidate.joined.digest[:16]}"


# ---- held-out text --------------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A submission on the blocks it was given."""

    candidate: Candidate
    columns: Columns
    submission: Submission
    policy: Policy
    cap: int
    clip: float
    progress: Progress

    def gather(self) -> tuple[dict[str, Any], AdmissionCost]:
        """Run models on as many blocks as the answers take; evidence and cost. Stops where the expert is no better than the seed."""
        one, policy = self.candidate, self.policy
        own_G = self.submission.slice_G & np.isin(self.domain_G(GATE), one.own)
        alone = self.ask(self.pair(one.seed, one.expert), self.above(policy.min_effect), own_G, "own")
        evidence: dict[str, Any] = {"level": self.submission.level, "own_low": alone and alone.low, "secret_gain": alone and alone.effect}
        blocks = {"own": alone and alone.drawn}
        if alone and alone.outcome == "better":
            evidence["public_gain"] = self.public_gain(alone.drawn)
            pair = self.pair(one.without, one.joined)
            rule = StoppingRule(
                alpha=self.submission.level, beta=policy.beta, better=policy.ensemble_effect, worthless=policy.min_effect, cap=self.cap
            )
            together = self.ask(pair, rule, self.submission.slice_G, "ensemble")
            evidence |= {"ensemble_low": together and together.low, "ensemble_gain": together and together.effect * together.share}
            evidence |= {"ensemble_wealth": together and float(min(together.for_T.max(), SURE))}
            blocks |= {"ensemble": together and together.drawn, "touched": together and together.size}
            if together and together.outcome == "better":
                found = self.by_domain(pair)
                evidence["domain_low"] = {what: finding.low * finding.share for what, finding in found.items()}
                blocks |= {what: finding.drawn for what, finding in found.items()}
        forwarded = sum(self.columns[digest].forwarded for digest in set(one.models))
        return evidence, AdmissionCost(blocks, forwarded, self.clip)

    def pair(self, a: Record, b: Record, split: int = GATE) -> Pair:
        return pair_models(a, b, self.columns, self.progress, split)

    def ask(self, pair: Pair, rule: StoppingRule, among_G: Bools, what: str) -> Finding | None:
        """The answer to one question; None where the two models are the same on all these blocks."""
        if not (pair.touched_G & among_G).any():
            return None
        return judge(pair, self.columns, rule, self.clip, derive_key(self.submission.key, what), self.progress, among_G)[0]

    def above(self, effect: float) -> StoppingRule:
        """Above this effect or below it?"""
        return StoppingRule(alpha=self.policy.alpha, beta=self.policy.beta, better=effect, worthless=effect, cap=self.cap)

    def domain_G(self, split: int) -> NDArray[np.integer]:
        held = self.columns.held
        return held.block_domain_B[held.split_B == split]

    def public_gain(self, count: int) -> float | None:
        """Mean gain over the seed on as many blocks of published text of the expert's own domains."""
        place_T = np.flatnonzero(np.isin(self.domain_G(TUNE), self.candidate.own))
        if not len(place_T):
            return None
        draw = drawing(self.pair(self.candidate.seed, self.candidate.expert, TUNE), self.columns, place_T, self.progress)
        return float(draw(random_order(derive_key(self.submission.key, "public"), len(place_T))[:count]).mean())

    def by_domain(self, pair: Pair) -> dict[str, Finding]:
        """Whether each domain is harmed. What the expert does not touch is not harmed, and a domain's loss is over all its text."""
        found = {
            what: self.ask(pair, self.above(-self.policy.harm / share), among_G, what)
            for what, (among_G, share) in self.domain_groups(pair).items()
        }
        return {what: finding for what, finding in found.items() if finding}

    def domain_groups(self, pair: Pair) -> Mapping[str, tuple[Bools, float]]:
        """The blocks of each domain that the expert touches, small ones together, and the share of them that it touches."""
        slice_G, domain_G, domains = self.submission.slice_G, self.domain_G(GATE), self.candidate.division.domains
        touched_G = pair.touched_G & slice_G
        count_K = np.bincount(domain_G[touched_G], minlength=len(domains))
        large = count_K >= max(1, SMALL * count_K.sum())
        groups = {f"{domains[k].name} ({k})": slice_G & (domain_G == k) for k in np.flatnonzero(large)}
        if (small := np.flatnonzero((count_K > 0) & ~large)).size:
            groups["all small domains"] = slice_G & np.isin(domain_G, small)
        return {what: (among_G, float(touched_G[among_G].mean())) for what, among_G in groups.items()}
