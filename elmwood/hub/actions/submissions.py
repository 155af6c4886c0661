"""Commitments, uploads and submissions: what a volunteer gives, bound to the lease and its token."""

import json
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import bindparam, func, select, update

from elmwood.hub import rules
from elmwood.hub.actions.leases import mine, parse_shards
from elmwood.hub.actions.request import Caller, Moment, current, manifest_of, move_domain, need, plain
from elmwood.hub.database import Connection
from elmwood.hub.events import log
from elmwood.hub.messages import (
    CheckReply,
    Commitment,
    CommitmentReply,
    Decision,
    Done,
    SubmissionReply,
    SubmissionRequest,
    Tier,
    UploadReply,
)
from elmwood.hub.rules import LIVE, Refusal
from elmwood.hub.signing import commit
from elmwood.hub.tables import blob, commitment, credit, domain, expert, lease, record, submission, upload
from elmwood.records import Expert, canonical

SECRET = ("per byte", "wealth", "secret")  # in the names of checks that look at held-out text
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_commitments = select(func.coalesce(func.max(commitment.c.number), 0))
_commitment = select(commitment.c.number).where(commitment.c.lease == bindparam("lease"), commitment.c.commitment == bindparam("sha"))
_upload = select(upload).where(upload.c.id == bindparam("id"))
_advance = (
    update(upload)
    .where(upload.c.id == bindparam("id_"), upload.c.offset == bindparam("before"), upload.c.state == "open")
    .values(offset=bindparam("after"), parts=bindparam("parts_"), due=bindparam("due_"), state=bindparam("state_"), sha=bindparam("sha_"))
)
_drop = update(upload).where(upload.c.id == bindparam("id_")).values(state="gone")
_old = select(upload.c.id, upload.c.parts).where(upload.c.state == "open", upload.c.due < bindparam("now")).limit(100)
_bytes = select(func.coalesce(func.sum(upload.c.bytes), 0)).where(upload.c.lease == bindparam("lease"), upload.c.state != "gone")
_finish = (
    update(lease).where(lease.c.id == bindparam("id_"), lease.c.token == bindparam("token_"), lease.c.state.in_(LIVE)).values(state="done")
)
_submit_domain = (
    update(domain)
    .where(domain.c.number == bindparam("number_"), domain.c.token == bindparam("token_"), domain.c.state == "leased")
    .values(state="submitted")
)
_by_lease = select(submission).where(submission.c.lease == bindparam("lease"))
_by_id = select(submission).where(submission.c.id == bindparam("id"))
_ahead = select(func.count()).select_from(
    select(submission.c.id)
    .where(submission.c.state.in_(("queued", "verifying")), submission.c.order < bindparam("order"))
    .limit(100)  # "100 or more" is all that anybody needs
    .subquery()
)
_paid = select(func.coalesce(func.sum(credit.c.amount), 0.0)).where(credit.c.submission == bindparam("submission"))
_verdict = select(record.c.body).where(record.c.digest == bindparam("digest"))
_shards = select(domain.c.shards).where(domain.c.number == bindparam("number"))
_move = (
    update(submission)
    .where(submission.c.id == bindparam("id_"), submission.c.state == bindparam("before"))
    .values(state=bindparam("after"), code=bindparam("code_"), tries=bindparam("tries_"))
)
_known = select(expert.c.submission).where(expert.c.digest == bindparam("digest"))


# ---- before the write -----------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """What is made of a submission before its write: the record of the expert."""

    expert: Expert
    body: str


def prepare(c: Connection, caller: Caller, message: SubmissionRequest) -> tuple[Prepared, Tier]:
    """The record of the expert, from the grant and the uploaded tensors' name and its tier. Raises Refusal."""
    row = mine(c, caller, message.lease, message.token)
    run = manifest_of(c, row["manifest"])
    tier = run.tiers[row["tier"]]
    shards = parse_shards(c.value(_shards, number=row["domain"]))
    made = Expert(
        seed=run.seed, partition=run.partition, domain=row["domain"], data=tuple(shard.blob for shard in shards),
        recipe=tier.recipe.model_copy(update={"rng_seed": row["rng_seed"]}),
        files={CONFIG: tier.config, WEIGHTS: f"sha256:{message.adapter}"}, probe=message.probe,
    )  # fmt: skip
    return Prepared(made, canonical(made).decode()), tier


# ---- writes ---------------------------------------------------------------------------------------------------------


def promise(c: Connection, caller: Caller, message: Commitment, when: Moment) -> CommitmentReply:
    """Take a commitment; the first of two equal adapters wins. The same commitment keeps its place."""
    row = mine(c, caller, message.lease, message.token)
    if row["state"] not in LIVE:
        raise Refusal(410, "gone", f"this lease is {row['state']}", do="claim again")
    number = c.value(_commitment, lease=message.lease, sha=message.commitment)
    if number is None:
        number = c.value(_commitments) + 1
        c.insert(commitment, number=number, lease=message.lease, commitment=message.commitment)
        log(c, "commitment.made", message.lease, when.unix, number=number, token=message.token)
    return CommitmentReply(order=number)


def open_upload(c: Connection, caller: Caller, lease_id: str, token: int, size: int, when: Moment) -> UploadReply:
    """A new upload of `size` bytes for a lease. Raises Refusal."""
    row = mine(c, caller, lease_id, token)
    if row["state"] not in LIVE:
        raise Refusal(410, "gone", f"this lease is {row['state']}", do="claim again")
    run = manifest_of(c, row["manifest"])
    most = min(run.limits.adapter_bytes, run.tiers[row["tier"]].bytes)
    if not 0 < size <= most:
        raise Refusal(413, "too-large", f"the upload has {size} bytes, an adapter of this tier {most} at most", do="train with the recipe")
    if c.value(_bytes, lease=lease_id) + size > 4 * most:
        raise Refusal(429, "quota", f"the uploads of a lease have {4 * most} bytes at most", do="continue one of them", retry_after=60)
    made = secrets.token_hex(16)
    due = when.uptime + run.limits.upload_s
    c.insert(upload, id=made, lease=lease_id, token=token, key=caller.key, bytes=size, offset=0, parts="[]", state="open", due=due)
    return UploadReply(upload=made)


def find_upload(c: Connection, caller: Caller, name: str):
    """An upload of this key. Raises Refusal."""
    row = c.one(_upload, id=name)
    if row is None or row["key"] != caller.key or row["state"] == "gone":
        raise Refusal(404, "no-upload", "there is no such upload", do="begin again: POST /v1/uploads")
    return row


def advance(c: Connection, caller: Caller, name: str, offset: int, size: int, sha: str | None, when: Moment) -> int:
    """A part of `size` bytes was kept at `offset`; the new offset. `sha`: of the whole file, where this part was the last."""
    row = find_upload(c, caller, name)
    mine(c, caller, row["lease"], row["token"])
    if row["offset"] != offset or row["state"] != "open":
        raise wrong_offset(row["offset"])
    parts = [*json.loads(row["parts"]), size]
    due = when.uptime + current(c).limits.upload_s
    state = "whole" if sha else "open"
    if c.changed(_advance, id_=name, before=offset, after=offset + size, parts_=plain(parts), due_=due, state_=state, sha_=sha) != 1:
        raise wrong_offset(row["offset"])
    if sha:
        c.insert(blob, ignore=True, sha=sha, bytes=row["bytes"], secret=1)
    return offset + size


def wrong_offset(offset: int) -> Refusal:
    return Refusal(409, "wrong-offset", f"this upload has {offset} bytes", do=f"go on at {offset}", retryable=True, offset=offset)


def drop_upload(c: Connection, caller: Caller, name: str) -> Done:
    find_upload(c, caller, name)
    c.run(_drop, id_=name)
    return Done()


def reap_uploads(c: Connection, when: Moment) -> list[tuple[str, int]]:
    """Give up uploads that nobody continued: their ids and numbers of parts."""
    rows = c.all(_old, now=when.uptime)
    for row in rows:
        c.run(_drop, id_=row["id"])
    return [(row["id"], len(json.loads(row["parts"]))) for row in rows]


def submit(c: Connection, caller: Caller, message: SubmissionRequest, prepared: Prepared, when: Moment) -> SubmissionReply:
    """Reveal what was committed to, and queue it. The same submission again gets the same answer."""
    known = c.one(_by_lease, lease=message.lease)
    if known is not None and (known["key"], known["token"], known["adapter"]) == (caller.key, message.token, message.adapter):
        return describe(c, known)
    row = mine(c, caller, message.lease, message.token)
    sent = c.one(_upload, id=message.upload)
    if sent is None or (sent["lease"], sent["state"], sent["sha"], sent["bytes"]) != (
        message.lease,
        "whole",
        message.adapter,
        message.bytes,
    ):
        raise Refusal(409, "not-uploaded", "this lease has no whole upload with this sha256", do="finish the upload", kept="the lease")
    promised = commit(message.adapter, caller.key, message.salt)
    order = c.value(_commitment, lease=message.lease, sha=promised)
    if order is None:
        raise Refusal(409, "not-committed", "this adapter was not committed to", do="POST /v1/commitments first", kept="lease and upload")
    if c.value(_known, digest=prepared.expert.digest) is not None:
        raise Refusal(409, "known-expert", "this very expert is in the run already", do="release the lease")
    if c.changed(_finish, id_=message.lease, token_=message.token) != 1:
        raise Refusal(410, "gone", f"this lease is {row['state']}", do="claim again")
    if c.changed(_submit_domain, number_=row["domain"], token_=message.token) != 1:
        raise Refusal(409, "stale-token", "another volunteer has this domain now", do="claim again")
    made = secrets.token_hex(16)
    facts = message.model_dump(mode="json", include={"tokens", "curve", "hardware", "client"})
    c.insert(
        submission, id=made, lease=message.lease, domain=row["domain"], token=message.token, account=caller.account, key=caller.key,
        order=order, adapter=message.adapter, expert=prepared.expert.digest, tier=row["tier"], facts=plain(facts), state="queued",
        job_token=0, tries=0, at=int(when.unix),
    )  # fmt: skip
    c.insert(record, ignore=True, digest=prepared.expert.digest, kind="expert", body=prepared.body, secret=1)
    log(c, "submission.queued", made, when.unix, domain=row["domain"], token=message.token, expert=prepared.expert.digest, order=order)
    return SubmissionReply(
        submission=made,
        state="queued",
        domain=row["domain"],
        expert=prepared.expert.digest,
        order=order,
        ahead=c.value(_ahead, order=order),
    )


def decide(c: Connection, caller: Caller, name: str, message: Decision, when: Moment) -> SubmissionReply:
    """A person decides on a quarantined submission: it is verified again, or rejected with a code."""
    need(caller, "admin")
    row = c.one(_by_id, id=name)
    if row is None:
        raise Refusal(404, "no-submission", "there is no such submission", do="look its id up")
    after = rules.after(rules.SUBMISSION, row["state"], message.outcome)
    if message.outcome == "reject" and message.code is None:
        raise Refusal(422, "no-code", "a rejection has a code", do="name the fault of the member's work")
    c.run(_move, id_=name, before=row["state"], after=after, code_=message.code, tries_=0)
    move_domain(c, row["domain"], "queue" if after == "queued" else "reject")
    log(c, f"submission.{after}", name, when.unix, domain=row["domain"], token=row["token"], code=message.code, by="person")
    return describe(c, c.one(_by_id, id=name))


# ---- answers --------------------------------------------------------------------------------------------------------


def find_submission(c: Connection, name: str) -> SubmissionReply:
    row = c.one(_by_id, id=name)
    if row is None:
        raise Refusal(404, "no-submission", "there is no such submission", do="look its id up")
    return describe(c, row)


def public_checks(checks: Iterable[Mapping[str, Any]]) -> tuple[CheckReply, ...]:
    """Checks of a verdict as everybody may see them. What was measured on secret text has one digit, so that nobody climbs by it."""
    found = [CheckReply(**{"value": None, "threshold": None} | dict(check)) for check in checks]
    return tuple(
        one.model_copy(update={"value": float(f"{one.value:.0e}")}) if one.value is not None and any(w in one.name for w in SECRET) else one
        for one in found
    )


def describe(c: Connection, row) -> SubmissionReply:
    """What everybody may know of a submission. Values measured on secret text are left out until it is decided."""
    verdict = json.loads(c.value(_verdict, digest=row["verdict"])) if row["verdict"] else {"checks": []}
    report = json.loads(row["report"]) if row["report"] else {}
    open_ = row["state"] in ("queued", "verifying")
    return SubmissionReply(
        submission=row["id"], state=row["state"], domain=row["domain"], expert=row["expert"], order=row["order"],
        ahead=c.value(_ahead, order=row["order"]) if open_ else 0, code=row["code"], verdict=row["verdict"],
        checks=public_checks(verdict["checks"]),
        advice=tuple(report.get("advice", ())), credit=c.value(_paid, submission=row["id"]),
    )  # fmt: skip
