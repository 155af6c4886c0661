"""Verification is leased work: jobs, trials and reports."""

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from elmwood.hub.messages.words import (
    Finite,
    Id,
    Label,
    MemberFault,
    Natural,
    Seconds,
    Sha,
    SubmissionStateName,
    TierName,
    VerifierFault,
    Words,
)
from elmwood.hub.messages.work import DeviceFacts
from elmwood.records import Digest, Expert, Frozen, Verdict


class TakeJob(Frozen):
    """POST /v1/jobs"""

    boot_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{8,64}$")]
    device: DeviceFacts = DeviceFacts()


class Job(Frozen):
    """A submission to verify, leased like a domain: writes carry the token."""

    job: Id
    token: Annotated[int, Field(gt=0)]
    submission: Id
    expert: Expert  # made by the hub from the grant and the uploaded tensors
    tier: TierName
    without: Digest  # the ensemble that the expert asks to join
    forest: Digest  # of that ensemble
    version: Natural  # of the snapshot that they are
    seed: Digest
    partition: Digest
    later: tuple[Digest, ...] = ()  # accepted experts with a later commitment: a copy of these is no copy, `Report.copied_by` names them
    manifest: Natural  # version; its gate applies
    beat_s: Seconds
    final_s: Seconds
    try_number: Natural = 0


class Trial(Frozen):
    """POST /v1/jobs/{id}/trial, once the weights pass: the submission's entry of the error budget, the same at each call for it."""

    number: Natural
    level: Annotated[float, Field(gt=0, lt=1)]
    key: Sha  # of the order of blocks
    slices_key: Sha
    earlier: Natural  # submissions tested on this holdout before


class TrialRequest(Frozen):
    token: Annotated[int, Field(gt=0)]


class JobBeat(Frozen):
    """POST /v1/jobs/{id}/beat"""

    token: Annotated[int, Field(gt=0)]
    done: Annotated[float, Field(ge=0, le=1)] = 0.0


class Report(Frozen):
    """POST /v1/jobs/{id}/report: a verdict, or the fault that prevented one."""

    token: Annotated[int, Field(gt=0)]
    verdict: Verdict | None = None
    code: MemberFault | None = None  # where the verdict rejects
    gain: Finite = 0.0  # bits per byte that the ensemble gains with the expert, over all text; becomes credit
    evidence: dict[Label, Finite] = {}
    noise_floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # bits per byte
    advice: Annotated[tuple[Label, ...], Field(max_length=20)] = ()
    copied_by: Annotated[tuple[Digest, ...], Field(max_length=100)] = ()  # of `Job.later`: copies of this one
    fault: VerifierFault | None = None
    detail: Words = ""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _one(self) -> "Report":
        if (self.verdict is None) == (self.fault is None):
            raise ValueError("a report has either a verdict or a fault")
        if self.verdict and self.verdict.accepted == (self.code is not None):
            raise ValueError("a verdict that rejects has a code, one that accepts has none")
        return self


class ReportReply(Frozen):
    state: SubmissionStateName
    snapshot: Natural | None = None  # version of the one that this made
