"""One submission judged, in a process of its own: `python -m elmwood.hub.client.judge CASE FOUND`, two files of JSON.

The gate has let the file in before. What is found depends on the case alone, so a verifier that takes the job up again finds the same.
"""

import errno
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged, DoesNotFit, NotFinite
from elmwood.evaluate.admission import Evidence, check_length, cosine, judge_evidence, novelty
from elmwood.evaluate.holdout import GATE
from elmwood.hub import messages
from elmwood.hub.messages import Gate, MemberFault
from elmwood.records import Check, Digest, Expert, Frozen, Verdict
from elmwood.store import Store
from elmwood.study.ancestry import as_model
from elmwood.study.quality.admission import Candidate, Submission, Trial, compare_deltas, cut_slice, is_new, open_candidate
from elmwood.study.quality.scoring import Columns, holdout_spec
from elmwood.weights.similarity import is_finite, top_energy

# checks of judge_evidence, in its order, and what a member is told when one is the first that failed
CODES: tuple[MemberFault, ...] = ("not-finite", "duplicate", "not-novel", "no-gain")
CODES += ("no-ensemble-gain", "no-ensemble-gain", "harms", "overfit-public")
SHORT_OF_MEMORY = ("allocate memory", "out of memory", "failed to map", "start new thread", "unable to allocate")
WINDOWS = 8  # that the noise floor is measured on
SPECTRAL = 0.7  # share of a module's delta in one direction, from which it is worth a look: advice, and no check
# exit status of the process -> the fault of the verifier that it stands for
FAULTS: dict[int, messages.VerifierFault] = {
    10: "out-of-memory",
    11: "disk-full",
    12: "damaged",
    13: "slices-retired",
    14: "error",
    -9: "killed",
    -24: "time",
}


class Case(Frozen):
    """All that a verdict depends on."""

    store: Path
    expert: Digest
    base: Digest  # the forest that it asks to join, or an ensemble whose settings are used
    later: tuple[Digest, ...] = ()  # accepted experts that were committed to after this one: it is no copy of these
    gate: Gate = Gate()
    trial: messages.Trial | None = None  # what the hub's error budget gives the submission; None: only the weights are looked at
    noise: int = Field(0, ge=0)  # repetitions to measure the noise floor with; 0: it is not measured
    memory: int = Field(8 << 30, gt=0)  # bytes of the process
    seconds: int = Field(3600, gt=0)  # of CPU time


class Judged(Frozen):
    """What was found. The verdict and its evidence become records; advice is for people and decides nothing."""

    verdict: Verdict
    evidence: Evidence
    code: MemberFault | None = None  # of the first check that failed; None with a verdict that rejects: it needs its trial
    advice: tuple[str, ...] = ()
    copied_by: tuple[Digest, ...] = ()  # of the later ones, those that are copies of this
    blocks: dict[str, int | None] = Field(default_factory=dict)
    tokens_forwarded: int = 0
    noise_floor: float | None = None  # bits per byte
    seconds: float = 0.0


class Weights(NamedTuple):
    """What the weights alone say."""

    evidence: Evidence
    checks: tuple[Check, ...]  # the band of lengths
    copied_by: tuple[Digest, ...]
    advice: tuple[str, ...]


def judge(case: Case, progress: Progress = silent) -> Judged:
    """The verdict on a submission. Raises BadInput, Damaged, DoesNotFit: faults of the verifier or the run, never of the member."""
    began, store = time.monotonic(), Store(case.store)
    candidate = open_candidate(store.load(case.expert, Expert), as_model(store.load(case.base), store), store)
    found = look_at_weights(candidate, case, store)
    evidence, cost, broken, holdout, noise = found.evidence, None, False, "", None
    passed = evidence.finite and is_new(evidence, case.gate.policy) and all(check.passed for check in found.checks)
    if passed and (trial := case.trial):
        columns = Columns(holdout_spec(candidate.division, candidate.seed, case.gate.length, case.gate.documents), store, stay=True)
        holdout = columns.held.name
        columns.begin_alone(store.work(f"judge-{trial.number}") / candidate.joined.digest[:16])
        slice_G = cut_slice(bytes.fromhex(trial.slices_key), trial.earlier, columns.held)
        submission = Submission(trial.number, trial.level, bytes.fromhex(trial.key), slice_G)
        try:
            measured, cost = Trial(candidate, columns, submission, case.gate.policy, case.gate.cap, case.gate.clip, progress).gather()
            evidence = evidence.model_copy(update=measured)
            noise = measure_noise(candidate, columns, store, case.noise) if case.noise else None
        except NotFinite:
            if not _scores_are_finite(candidate, columns):
                raise Damaged("the ensemble without the expert gives scores that are not finite: its files are damaged here") from None
            broken = True
    verdict = judge_evidence(evidence, case.gate.policy)
    checks = (*verdict.checks[:3], *found.checks, *verdict.checks[3:])
    unlike = all(check.passed for check in checks) and not broken and not _says_its_probe(candidate.expert, store)
    if unlike:
        checks = (*checks, Check(name="it says what its record has", value=0.0, threshold=1.0, side="at least", passed=False))
    if broken:
        checks = (*checks, Check(name="scores are finite", value=0.0, threshold=1.0, side="at least", passed=False))
    verdict = verdict.model_copy(
        update={"checks": checks, "accepted": all(check.passed for check in checks), "forest": candidate.joined.forest, "holdout": holdout}
    )
    code: MemberFault | None = "not-finite-scores" if broken else "other-probe" if unlike else first_code(verdict, found.checks)
    if passed and not case.trial:
        code = None
    return Judged(
        verdict=verdict, evidence=evidence, code=code, advice=found.advice, copied_by=found.copied_by, blocks=cost.blocks if cost else {},
        tokens_forwarded=cost.tokens_forwarded if cost else 0, noise_floor=noise, seconds=round(time.monotonic() - began, 3),
    )  # fmt: skip


def look_at_weights(candidate: Candidate, case: Case, store: Store) -> Weights:
    """Finite, no copy or blend of earlier ones, of a usual length; and what is worth a look."""
    expert, gate = candidate.expert, case.gate
    evidence = Evidence(expert=expert.digest, finite=is_finite(expert, store))
    if not evidence.finite:
        return Weights(evidence, (), (), ())
    earlier = [other for other in candidate.others if other.digest not in case.later]
    own, with_E, gram_EE = compare_deltas(expert, earlier, candidate.seed, store)
    evidence = evidence.model_copy(update={"cosine": cosine(own, with_E, gram_EE), "novelty": novelty(own, with_E, gram_EE)})
    copies = []
    for other in candidate.others:
        if other.digest in case.later:
            mine, with_1, gram_11 = compare_deltas(expert, [other], candidate.seed, store)
            copies += [other.digest] * (cosine(mine, with_1, gram_11) > gate.policy.cosine)
    like = [other.recipe.rank == expert.recipe.rank and other.recipe.steps == expert.recipe.steps for other in earlier]
    lengths2 = np.diag(gram_EE)[like] if len(gram_EE) == len(earlier) else np.diag(gram_EE)
    energy = top_energy(expert, candidate.seed, store)
    advice = (f"one direction has {energy:.0%} of a module's delta; of installed backdoors it was 71 to 85 % of it",)
    return Weights(evidence, check_length(own, lengths2, gate.norm_low, gate.norm_high), tuple(copies), advice if energy > SPECTRAL else ())


def first_code(verdict: Verdict, lengths: tuple[Check, ...]) -> MemberFault | None:
    """The code of the first check that failed; None where none did."""
    norms: list[MemberFault] = ["norm"] * len(lengths)
    return next((code for code, check in zip((*CODES[:3], *norms, *CODES[3:]), verdict.checks, strict=False) if not check.passed), None)


def measure_noise(candidate: Candidate, columns: Columns, store: Store, times: int) -> float:
    """The spread of an expert's gain over the seed, bits per byte, over repeated scoring of the same windows with other batches and
    numbers of threads: what a verdict could change by on another machine."""
    from elmwood.ensemble.mixture import open_model
    from elmwood.train.loop import use_threads

    held = columns.held
    window_W = np.unique(held.window_N[held.split_B[held.block_N] == GATE])[:WINDOWS]
    inside_N = np.isin(held.window_N, window_W)
    share_D = np.bincount(held.document_N[inside_N], minlength=len(held.bytes_D)) / np.bincount(
        held.document_N, minlength=len(held.bytes_D)
    )
    size, rows_WL = float(share_D @ held.bytes_D), held.windows.rows_WL
    models = [open_model(record, store) for record in (candidate.seed, candidate.expert)]
    gains = []
    for n in range(times):
        total = [0.0, 0.0]
        with use_threads(2 if n % 10 == 1 else 1):  # two wait for each other where others compute: a few times are enough
            for m, model in enumerate(models):
                for batch in held.windows.batches(window_W, rows_WL.shape[1] * (1 + n)):
                    longest = int(held.windows.length_W[batch].max())
                    loglik_BL = np.asarray(model.score(rows_WL[batch, :longest]), np.float64)
                    total[m] += float(loglik_BL[held.windows.scored_WL[batch, :longest]].sum())
        gains.append((total[1] - total[0]) / (np.log(2) * size))
    return max(gains) - min(gains)


def _says_its_probe(expert: Expert, store: Store) -> bool:
    """Whether the expert says what it said at the end of its training, if its record has that."""
    from elmwood.lm import probe

    try:
        if expert.probe:
            probe.check(expert, store)
    except BadInput:
        return False
    return True


def _scores_are_finite(candidate: Candidate, columns: Columns) -> bool:
    """Whether the seed and the ensemble as it is give finite scores of some window."""
    window_1 = columns.held.window_N[columns.held.split_B[columns.held.block_N] == GATE][:1]
    try:
        for model in (candidate.seed, candidate.without):
            columns[model.digest].fill(window_1)
    except NotFinite:
        return False
    return True


# ---- the process ----------------------------------------------------------------------------------------------------


def main(case_file: str, found_file: str) -> int:
    """Judge a case within its limits; the exit status."""
    case = Case.model_validate_json(Path(case_file).read_bytes())
    resource.setrlimit(resource.RLIMIT_DATA, (case.memory, case.memory))
    resource.setrlimit(resource.RLIMIT_CPU, (case.seconds, case.seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        Path(found_file).write_bytes(judge(case).model_dump_json().encode())
    except Exception as error:
        Path(found_file).with_suffix(".error").write_text(f"{type(error).__name__}: {error}"[:2000], encoding="utf-8")
        return fault_of(error)
    return 0


def fault_of(error: BaseException) -> int:
    """The exit status for a fault of the verifier."""
    first = error
    while (cause := first.__cause__ or first.__context__) is not None:  # libraries wrap what the system refused
        first = cause
    for one in (first, error):
        number, words = getattr(one, "errno", None), str(one).lower()
        if isinstance(one, MemoryError) or number == errno.ENOMEM or any(short in words for short in SHORT_OF_MEMORY):
            return 10
        if isinstance(one, DoesNotFit) or number in (errno.ENOSPC, errno.EDQUOT):
            return 11
    if isinstance(error, Damaged):
        return 12
    return 13 if isinstance(error, BadInput) and "slices" in str(error) else 14


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
