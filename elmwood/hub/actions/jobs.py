"""Verification as leased work: taken in the order of commitments, fenced by a token, and judged against the newest snapshot."""

import secrets

from sqlalchemy import bindparam, func, select, update

from elmwood.evaluate.sequential.error_budget import budget_share, commitment, derive_key, slices_key
from elmwood.hub import rules
from elmwood.hub.actions import experts
from elmwood.hub.actions.request import Caller, Moment, current, log, move_domain, need, plain
from elmwood.hub.actions.submissions import describe
from elmwood.hub.database import Connection
from elmwood.hub.messages import Done, Job, JobBeat, Report, ReportReply, RunManifest, TakeJob, Trial
from elmwood.hub.rules import Refusal
from elmwood.hub.signing import Office
from elmwood.hub.tables import expert, job, record, run, snapshot, submission, trial
from elmwood.records import Expert, canonical

AGAIN = 20.0  # seconds to wait where nothing is queued

_running = select(job).where(job.c.key == bindparam("key"), job.c.boot_id == bindparam("boot"), job.c.state == "running").limit(1)
_verifying = select(func.count()).select_from(job).where(job.c.state == "running")
_queued = select(submission).where(submission.c.state == "queued").order_by(submission.c.order).limit(1)
_take = (
    update(submission)
    .where(submission.c.id == bindparam("id_"), submission.c.state == "queued", submission.c.job_token == bindparam("token_"))
    .values(state="verifying", job_token=bindparam("next"))
)
_job = select(job).where(job.c.id == bindparam("id"))
_submission = select(submission).where(submission.c.id == bindparam("id"))
_end = (
    update(job)
    .where(job.c.id == bindparam("id_"), job.c.token == bindparam("token_"), job.c.state == "running")
    .values(state=bindparam("after"), fault=bindparam("fault_"), detail=bindparam("detail_"))
)
_beat = (
    update(job)
    .where(job.c.id == bindparam("id_"), job.c.token == bindparam("token_"), job.c.state == "running")
    .values(done=bindparam("done_"), due=bindparam("due_"))
)
_move = (
    update(submission)
    .where(submission.c.id == bindparam("id_"), submission.c.state == "verifying", submission.c.job_token == bindparam("token_"))
    .values(
        state=bindparam("after"), code=bindparam("code_"), verdict=bindparam("verdict_"), report=bindparam("report_"),
        tries=bindparam("tries_"),
    )
)  # fmt: skip
_overdue = select(job).where(job.c.state == "running", job.c.due < bindparam("now")).limit(100)
_fault = update(run).values(faults=run.c.faults + 1)
_later = (
    select(expert.c.digest)
    .join(submission, submission.c.id == expert.c.submission)
    .where(expert.c.status != "retired", submission.c.order > bindparam("order"))
    .order_by(expert.c.digest)
)
_record = select(record.c.body).where(record.c.digest == bindparam("digest"))
_trial = select(trial).where(trial.c.submission == bindparam("submission"), trial.c.version == bindparam("version"))
_trials = select(func.count()).select_from(trial)
_won = select(func.count()).select_from(trial).where(trial.c.accepted == 1)
_close = (
    update(trial)
    .where(trial.c.submission == bindparam("submission_"), trial.c.accepted.is_(None))
    .values(accepted=bindparam("accepted_"), key=bindparam("key_"))
)
_undecided = select(trial.c.number, trial.c.submission, trial.c.version).where(
    trial.c.submission == bindparam("submission"), trial.c.accepted.is_(None)
)
_snapshot = select(snapshot.c.forest, snapshot.c.ensemble).where(snapshot.c.version == bindparam("version"))


def take(c: Connection, caller: Caller, message: TakeJob, when: Moment) -> Job:
    """The submission with the earliest commitment that waits. The job that this verifier runs already, where it runs one."""
    need(caller, "verifier", "admin")
    gate = current(c).gate
    held = c.one(_running, key=caller.key, boot=message.boot_id)
    if held is not None:
        return _as_job(c, held, c.one(_submission, id=held["submission"]))
    if c.value(_verifying) >= gate.at_once:
        raise Refusal(204, "busy", "as many verifications run as may", retry_after=AGAIN)
    row = c.one(_queued)
    if row is None:
        raise Refusal(204, "no-job", "no submission waits", retry_after=AGAIN)
    token, made = row["job_token"] + 1, secrets.token_hex(16)
    if c.changed(_take, id_=row["id"], token_=row["job_token"], next=token) != 1:
        raise Refusal(409, "taken", "another verifier was faster", do="ask again", retryable=True)
    c.insert(
        job, id=made, submission=row["id"], token=token, key=caller.key, boot_id=message.boot_id, state="running",
        version=experts.newest(c)["version"], done=0.0, due=when.uptime + rules.MISSED * gate.job_beat_s,
        final_due=when.uptime + gate.job_s, at=int(when.unix),
    )  # fmt: skip
    log(c, "job.taken", made, when.unix, submission=row["id"], token=token)
    return _as_job(c, c.one(_job, id=made), row)


def _as_job(c: Connection, held, row) -> Job:
    run_, base = current(c), c.one(_snapshot, version=held["version"])
    return Job(
        job=held["id"], token=held["token"], submission=row["id"],
        expert=Expert.model_validate_json(c.value(_record, digest=row["expert"])), tier=row["tier"], without=base["ensemble"],
        forest=base["forest"], version=held["version"], seed=run_.seed, partition=run_.partition,
        later=tuple(one["digest"] for one in c.all(_later, order=row["order"])), manifest=run_.version, beat_s=run_.gate.job_beat_s,
        final_s=run_.gate.job_s, try_number=row["tries"],
    )  # fmt: skip


def find_job(c: Connection, caller: Caller, name: str, token: int):
    """A running job of this verifier. Raises Refusal."""
    need(caller, "verifier", "admin")
    row = c.one(_job, id=name)
    if row is None or row["key"] != caller.key:
        raise Refusal(404, "no-job", "this key has no such job", do="take one: POST /v1/jobs")
    if row["token"] != token or row["state"] != "running":
        raise Refusal(409, "stale-token", f"this job is {row['state']}", do="take another one")
    return row


def beat(c: Connection, caller: Caller, name: str, message: JobBeat, when: Moment) -> Done:
    row = find_job(c, caller, name, message.token)
    due = min(when.uptime + rules.MISSED * current(c).gate.job_beat_s, row["final_due"])
    if c.changed(_beat, id_=name, token_=message.token, done_=message.done, due_=due) != 1:
        raise Refusal(409, "stale-token", "this job is over", do="take another one")
    return Done()


def begin_trial(c: Connection, caller: Caller, name: str, token: int, when: Moment, office: Office) -> Trial:
    """The submission's entry of the error budget, fixed before any block is drawn and the same at each call: its level is spent once."""
    row = find_job(c, caller, name, token)
    sent, run_ = c.one(_submission, id=row["submission"]), current(c)
    known = c.one(_trial, submission=sent["id"], version=row["version"])
    if known is None:
        number = c.value(_trials)
        level = run_.gate.budget * budget_share(number + 1) * (1 + c.value(_won))
        key = _key(office, number, sent["expert"], run_)
        c.insert(trial, number=number, submission=sent["id"], version=row["version"], level=level, sealed=commitment(key))
        log(c, "trial.begun", sent["id"], when.unix, number=number, level=level, sealed=commitment(key))
        known = c.one(_trial, submission=sent["id"], version=row["version"])
    number = known["number"]
    key = _key(office, number, sent["expert"], run_)
    return Trial(number=number, level=known["level"], key=key.hex(), slices_key=slices_key(office.secret).hex(), earlier=number)


def _key(office: Office, number: int, expert_digest: str, run_: RunManifest) -> bytes:
    return derive_key(office.secret, f"{number} {expert_digest} {run_.run}")


def report(c: Connection, caller: Caller, name: str, message: Report, when: Moment, office: Office) -> ReportReply:
    """The end of a verification. A verdict that is sent again gets the same answer; a fault that comes after the verdict is refused."""
    held = c.one(_job, id=name)
    mine = held is not None and held["key"] == caller.key and held["token"] == message.token
    if mine and held["state"] == "reported" and message.verdict is not None:
        return ReportReply(state=describe(c, c.one(_submission, id=held["submission"])).state)
    held = find_job(c, caller, name, message.token)
    row = c.one(_submission, id=held["submission"])
    if message.fault:
        return ReportReply(state=_fail(c, held, row, "failed", message.fault, message.detail, when))
    verdict = message.verdict
    assert verdict is not None
    if verdict.expert != row["expert"]:
        raise Refusal(
            422, "other-expert", f"the verdict is about {verdict.expert[:8]}, the job about {row['expert'][:8]}", do="report again"
        )
    if verdict.accepted and experts.newest(c)["forest"] != c.one(_snapshot, version=held["version"])["forest"]:
        _finish(c, held, "reported")
        _set(c, row, "queued")
        close_trial(c, row, False, office, when)
        log(c, "submission.again", row["id"], when.unix, why="the forest changed meanwhile", version=held["version"])
        return ReportReply(state="queued")
    _finish(c, held, "reported")
    c.insert(record, ignore=True, digest=verdict.digest, kind="verdict", body=canonical(verdict).decode(), secret=1)
    kept = message.model_dump(mode="json", include={"gain", "evidence", "noise_floor", "advice", "seconds"})
    close_trial(c, row, verdict.accepted, office, when)
    state = "accepted" if verdict.accepted else "rejected"
    _set(c, row, state, code=message.code, verdict=verdict.digest, report=plain(kept))
    log(c, f"submission.{state}", row["id"], when.unix, domain=row["domain"], token=row["token"], verdict=verdict.digest, code=message.code)
    if not verdict.accepted:
        move_domain(c, row["domain"], "reject", open_at=when.uptime + current(c).gate.cooldown_s)
        return ReportReply(state="rejected")
    copies = [digest for digest in message.copied_by if digest in {one["digest"] for one in c.all(_later, order=row["order"])}]
    version = experts.accept(c, row, verdict.digest, message.gain, copies, when, office)
    return ReportReply(state="accepted", snapshot=version)


def reap(c: Connection, when: Moment) -> int:
    """End jobs whose verifier fell silent: faults of the verifier, never of the member."""
    rows = c.all(_overdue, now=when.uptime)
    for held in rows:
        _fail(c, held, c.one(_submission, id=held["submission"]), "expired", "killed", "no beat", when)
    return len(rows)


def _fail(c: Connection, held, row, after: str, fault: str, detail: str, when: Moment):
    """No verdict: the submission is queued again; after some tries a person decides. No field of the member changes."""
    _finish(c, held, after, fault, detail)
    tries = row["tries"] + 1
    what = rules.after_fault(tries, current(c).gate)
    state = rules.after(rules.SUBMISSION, row["state"], what)
    _set(c, row, state, tries=tries)
    if what == "quarantine":
        move_domain(c, row["domain"], "quarantine")
    c.run(_fault)
    log(c, "job.failed", held["id"], when.unix, submission=row["id"], fault=fault, tries=tries)
    return state


def _finish(c: Connection, held, after: str, fault: str | None = None, detail: str | None = None) -> None:
    if c.changed(_end, id_=held["id"], token_=held["token"], after=after, fault_=fault, detail_=detail) != 1:
        raise Refusal(409, "stale-token", "this job is over", do="take another one")


def _set(c: Connection, row, state: str, *, code=None, verdict=None, report=None, tries: int | None = None) -> None:
    changed = c.changed(
        _move, id_=row["id"], token_=row["job_token"], after=state, code_=code, verdict_=verdict, report_=report,
        tries_=row["tries"] if tries is None else tries,
    )  # fmt: skip
    if changed != 1:
        raise Refusal(409, "stale-token", "another verifier has this submission now", do="take another one")


def close_trial(c: Connection, row, accepted: bool, office: Office, when: Moment) -> None:
    """Enter the verdict, and publish the key of its order of blocks in the log."""
    for one in c.all(_undecided, submission=row["id"]):
        key = _key(office, one["number"], row["expert"], current(c)).hex()
        c.run(_close, submission_=row["id"], accepted_=int(accepted), key_=key)
        log(c, "trial.closed", row["id"], when.unix, number=one["number"], key=key)
