"""The SELECTs of the pages. Compiled once; nothing here writes."""

from sqlalchemy import and_, bindparam, func, null, select

from elmwood.hub.rules import LIVE
from elmwood.hub.tables import (
    account,
    clock,
    credit,
    derived,
    derived_expert,
    device,
    domain,
    event,
    expert,
    job,
    lease,
    manifest,
    record,
    run,
    snapshot,
    submission,
)

SHOWN = 200  # rows of a table that only grows


RUN = select(run.c.name, run.c.version, run.c.atlas, run.c.faults, manifest.c.signed).join(manifest, manifest.c.version == run.c.version)
UPTIME = select(clock.c.uptime)

_held = and_(lease.c.domain == domain.c.number, lease.c.token == domain.c.token)
_owner = func.coalesce(expert.c.account, lease.c.account)
DOMAINS = (
    select(
        domain.c.number, domain.c.name, domain.c.terms, domain.c.shards, domain.c.has_text, domain.c.tokens, domain.c.state, domain.c.token,
        domain.c.expert, lease.c.step, lease.c.tier, expert.c.gain, account.c.id.label("account"), account.c.name.label("member"),
    )
    .outerjoin(expert, expert.c.digest == domain.c.expert)
    .outerjoin(lease, _held)
    .outerjoin(account, account.c.id == _owner)
    .order_by(domain.c.number)
)  # fmt: skip
NAMES = select(domain.c.number, domain.c.name)

_leases = (
    select(
        lease.c.id, lease.c.domain, lease.c.token, lease.c.tier, lease.c.state, lease.c.why, lease.c.step, lease.c.phase,
        lease.c.beat_due, lease.c.paused_at, lease.c.at, lease.c.account, account.c.name.label("member"),
        domain.c.name.label("domain_name"),
    )
    .join(account, account.c.id == lease.c.account)
    .join(domain, domain.c.number == lease.c.domain)
)  # fmt: skip
LEASES_OF = _leases.where(lease.c.domain == bindparam("number")).order_by(lease.c.token.desc()).limit(SHOWN)
LIVE_LEASES = _leases.where(lease.c.state.in_(LIVE)).order_by(lease.c.at).limit(SHOWN)

_submissions = (
    select(
        submission.c.id, submission.c.domain, submission.c.state, submission.c.code, submission.c.tries, submission.c.at,
        submission.c.account, expert.c.digest.label("accepted"), expert.c.gain, account.c.name.label("member"),
        domain.c.name.label("domain_name"),
    )
    .join(account, account.c.id == submission.c.account)
    .join(domain, domain.c.number == submission.c.domain)
    .outerjoin(expert, expert.c.submission == submission.c.id)
)  # fmt: skip
SUBMISSIONS_OF_DOMAIN = _submissions.where(submission.c.domain == bindparam("number")).order_by(submission.c.order.desc()).limit(SHOWN)
SUBMISSIONS_OF_MEMBER = _submissions.where(submission.c.account == bindparam("account")).order_by(submission.c.order.desc()).limit(SHOWN)
WAITING = _submissions.where(submission.c.state.in_(("queued", "verifying", "quarantined"))).order_by(submission.c.order).limit(SHOWN)
DECIDED = _submissions.where(submission.c.state.in_(("accepted", "rejected"))).order_by(submission.c.order.desc()).limit(20)
DONE_OF_JOBS = select(job.c.submission, job.c.done).where(job.c.state == "running")
REPORTS = select(submission.c.report).where(submission.c.report.is_not(None)).order_by(submission.c.order.desc()).limit(SHOWN)

EXPERT = (
    select(
        expert.c.digest, expert.c.domain, expert.c.status, expert.c.since, expert.c.until, expert.c.reason, expert.c.gain, expert.c.at,
        expert.c.account, account.c.name.label("member"), domain.c.name.label("domain_name"), submission.c.tier, submission.c.facts,
        submission.c.verdict, submission.c.adapter, submission.c.report, submission.c.code, submission.c.id.label("submission"),
    )
    .join(account, account.c.id == expert.c.account)
    .join(domain, domain.c.number == expert.c.domain)
    .join(submission, submission.c.id == expert.c.submission)
    .where(expert.c.digest == bindparam("digest"))
)  # fmt: skip
EXPERTS = select(expert.c.digest, expert.c.domain, expert.c.since, expert.c.until)
RECORD = select(record.c.kind, record.c.body).where(record.c.digest == bindparam("digest"))
DERIVED_OF = (
    select(derived.c.digest, derived.c.kind, derived.c.version, derived.c.tainted)
    .join(derived_expert, derived_expert.c.derived == derived.c.digest)
    .where(derived_expert.c.expert == bindparam("digest"))
    .order_by(derived.c.version)
    .limit(SHOWN)
)
SNAPSHOTS = select(snapshot.c.version, snapshot.c.signed, snapshot.c.measured).order_by(snapshot.c.version)

ACCOUNTS = select(account.c.id, account.c.name).order_by(account.c.at)
MEMBERS = ACCOUNTS.where(account.c.id.in_(select(device.c.account).where(device.c.role == "member")))  # not the maintainer's keys
CREDIT = select(credit.c.account, func.sum(credit.c.amount).label("amount")).group_by(credit.c.account)
SENT = select(submission.c.account, func.count().label("count")).group_by(submission.c.account)
ACCEPTED = (
    select(expert.c.account, expert.c.status, submission.c.tier, func.count().label("count"))
    .join(submission, submission.c.id == expert.c.submission)
    .group_by(expert.c.account, expert.c.status, submission.c.tier)
)
_ledger = (
    select(
        credit.c.number, credit.c.account, credit.c.amount, credit.c.kind, account.c.name.label("member"), submission.c.domain,
        domain.c.name.label("domain_name"), expert.c.digest.label("expert"), expert.c.at,
        func.sum(credit.c.amount).over(partition_by=credit.c.account, order_by=credit.c.number).label("balance"),
    )
    .join(account, account.c.id == credit.c.account)
    .join(submission, submission.c.id == credit.c.submission)
    .join(domain, domain.c.number == submission.c.domain)
    .outerjoin(expert, expert.c.submission == submission.c.id)
)  # fmt: skip
LEDGER = _ledger.order_by(credit.c.number.desc()).limit(SHOWN)
LEDGER_OF = _ledger.where(credit.c.account == bindparam("account")).order_by(credit.c.number.desc()).limit(SHOWN)
EVENTS = select(event.c.number, event.c.kind, event.c.subject, event.c.facts, event.c.at).order_by(event.c.number.desc()).limit(60)
# what events speak of: leases, submissions and experts by their ids
RECENT_LEASES = (
    select(lease.c.id, lease.c.domain, lease.c.account, null().label("expert"), null().label("code"))
    .order_by(lease.c.at.desc())
    .limit(SHOWN)
)
RECENT_SUBMISSIONS = (
    select(submission.c.id, submission.c.domain, submission.c.account, expert.c.digest.label("expert"), submission.c.code)
    .outerjoin(expert, expert.c.submission == submission.c.id)
    .order_by(submission.c.order.desc())
    .limit(SHOWN)
)
RECENT_EXPERTS = (
    select(expert.c.digest.label("id"), expert.c.domain, expert.c.account, expert.c.digest.label("expert"), null().label("code"))
    .order_by(expert.c.at.desc())
    .limit(SHOWN)
)
