"""Commitments, submissions and verification."""

from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool

from elmwood.hub.actions import experts, jobs, submissions
from elmwood.hub.api.asked import Here, Recent, Whose, read
from elmwood.hub.client.gate import Refused, check_adapter
from elmwood.hub.messages import (
    Commitment,
    CommitmentReply,
    Decision,
    Done,
    Id,
    Job,
    JobBeat,
    Measurement,
    Report,
    ReportReply,
    SubmissionReply,
    SubmissionRequest,
    TakeJob,
    Trial,
    TrialRequest,
)  # fmt: skip
from elmwood.hub.rules import Refusal

router = APIRouter(tags=["work"])


@router.post("/v1/commitments", status_code=201, response_model=CommitmentReply)
async def promise(whose: Whose, message: Commitment) -> Response:
    """Commit to an adapter before it is shown to anybody."""
    return await whose.act(lambda c, caller: submissions.promise(c, caller, message, whose.hub.moment()), 201)


@router.post("/v1/submissions", status_code=202, response_model=SubmissionReply)
async def submit(whose: Whose, hub: Here, message: SubmissionRequest) -> Response:
    """Reveal what was committed to and uploaded. The file passes the gate for tensors here, and again at the verifier's."""
    prepared, tier = await whose.look(lambda c, caller: submissions.prepare(c, caller, message))

    def check() -> None:
        with hub.blobs.file(message.adapter) as path:
            check_adapter(path, tier.tensors)

    if hub.blobs.has(message.adapter):
        try:
            await run_in_threadpool(check)
        except Refused as error:
            raise Refusal(error.status, error.code, str(error), kept="your lease", do="upload another one") from None
    return await whose.act(lambda c, caller: submissions.submit(c, caller, message, prepared, hub.moment()), 202)


@router.get("/v1/submissions/{submission}", response_model=SubmissionReply)
async def look(hub: Here, submission: Id) -> SubmissionReply:
    """State and verdict of a submission."""
    return await read(hub, lambda c: submissions.find_submission(c, submission))


@router.post("/v1/submissions/{submission}/decide", response_model=SubmissionReply)
async def decide(whose: Whose, submission: Id, message: Decision) -> Response:
    """Decide on a quarantined submission (admin)."""
    return await whose.act(lambda c, caller: submissions.decide(c, caller, submission, message, whose.hub.moment()))


@router.post("/v1/jobs", status_code=201, response_model=Job, dependencies=[Recent], responses={204: {"description": "nothing waits"}})
async def take(whose: Whose, message: TakeJob) -> Response:
    """Take a submission to verify (verifier)."""
    return await whose.act(lambda c, caller: jobs.take(c, caller, message, whose.hub.moment()), 201)


@router.post("/v1/jobs/{job}/beat", response_model=Done)
async def beat(whose: Whose, job: Id, message: JobBeat) -> Response:
    """A verifier's sign of life."""
    return await whose.act(lambda c, caller: jobs.beat(c, caller, job, message, whose.hub.moment()), again=True)


@router.post("/v1/jobs/{job}/trial", response_model=Trial)
async def begin_trial(whose: Whose, hub: Here, job: Id, message: TrialRequest) -> Response:
    """The submission's entry of the error budget."""
    return await whose.act(lambda c, caller: jobs.begin_trial(c, caller, job, message.token, hub.moment(), hub.office))


@router.post("/v1/jobs/{job}/report", response_model=ReportReply)
async def report(whose: Whose, hub: Here, job: Id, message: Report) -> Response:
    """The end of a verification."""
    return await whose.act(lambda c, caller: jobs.report(c, caller, job, message, hub.moment(), hub.office))


@router.post("/v1/measurements", response_model=Done)
async def measure(whose: Whose, message: Measurement) -> Response:
    """What a snapshot's ensemble loses (verifier)."""
    return await whose.act(lambda c, caller: experts.measure(c, caller, message, whose.hub.moment()))
