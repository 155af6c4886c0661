"""Acceptance, retirement, snapshots and credit: each change of the forest is a new signed snapshot."""

import json
from collections.abc import Sequence

from sqlalchemy import bindparam, delete, select, update

from elmwood.errors import BadInput
from elmwood.hub.actions.request import Caller, Moment, current, log, move_domain, need, plain
from elmwood.hub.database import Connection
from elmwood.hub.events import pay
from elmwood.hub.messages import Done, Measurement, Member, Retirement, Snapshot
from elmwood.hub.rules import Refusal, credit
from elmwood.hub.signing import Office, digest, sign
from elmwood.hub.tables import blob, derived, derived_expert, domain, expert, record, snapshot
from elmwood.hub.tables import credit as credits
from elmwood.records import Forest, canonical

_newest = select(snapshot).order_by(snapshot.c.version.desc()).limit(1)
_members = (
    select(expert.c.digest, expert.c.domain, expert.c.status, expert.c.account, expert.c.since)
    .where(expert.c.status != "retired")
    .order_by(expert.c.digest)
)
_expert = select(expert).where(expert.c.digest == bindparam("digest"))
_retire = (
    update(expert)
    .where(expert.c.digest == bindparam("digest_"), expert.c.status != "retired")
    .values(status="retired", until=bindparam("until_"), reason=bindparam("reason_"))
)
_publish_blob = update(blob).where(blob.c.sha == bindparam("sha_")).values(secret=0)
_publish_record = update(record).where(record.c.digest == bindparam("digest_")).values(secret=0)
_owner = select(domain.c.expert).where(domain.c.number == bindparam("number"))
_taint = (
    update(derived)
    .where(derived.c.digest.in_(select(derived_expert.c.derived).where(derived_expert.c.expert == bindparam("expert_"))))
    .values(tainted=1)
)
_marked = select(derived.c.digest).where(derived.c.kind == bindparam("kind"), derived.c.tainted == 1)
_drop_parts = delete(derived_expert).where(derived_expert.c.derived == bindparam("name"))
_drop_derived = delete(derived).where(derived.c.digest == bindparam("name"))
_paid = select(credits.c.amount, credits.c.account, credits.c.verdict).where(
    credits.c.submission == bindparam("submission"), credits.c.kind == "gain"
)
_probation = update(expert).where(expert.c.status == "probation", expert.c.full_at <= bindparam("now")).values(status="full")
_due = select(expert.c.digest).where(expert.c.status == "probation", expert.c.full_at <= bindparam("now"))
_measured = update(snapshot).where(snapshot.c.version == bindparam("version_")).values(measured=bindparam("measured_"))


def newest(c: Connection):
    """The row of the newest snapshot."""
    return c.one(_newest)


def accept(c: Connection, row, verdict: str, gain: float, copies: Sequence[str], when: Moment, office: Office) -> int:
    """A submission becomes an expert of the forest; the version of the new snapshot. `copies`: later committed ones that it replaces."""
    gate, version = current(c).gate, newest(c)["version"] + 1
    for one in copies:
        _drop(c, one, "copy", version, when)
        _take_back(c, c.one(_expert, digest=one)["submission"])
    status = "probation" if gate.probation_s > 0 else "full"
    c.insert(
        expert, digest=row["expert"], submission=row["id"], domain=row["domain"], account=row["account"], status=status, since=version,
        full_at=when.uptime + gate.probation_s, gain=gain, at=int(when.unix),
    )  # fmt: skip
    move_domain(c, row["domain"], "accept", expert=row["expert"])
    c.run(_publish_blob, sha_=row["adapter"])
    for one in (row["expert"], verdict):
        c.run(_publish_record, digest_=one)
    pay(c, row["account"], credit(gain), "gain", row["id"], verdict)
    log(c, "expert.accepted", row["expert"], when.unix, domain=row["domain"], token=row["token"], verdict=verdict, version=version)
    return take_snapshot(c, when, office, added=row["expert"], removed=tuple(copies))


def retire(c: Connection, caller: Caller, name: str, message: Retirement, when: Moment, office: Office) -> Done:
    """Take an expert out of the shared ensemble; its domain opens again."""
    need(caller, "admin")
    row = c.one(_expert, digest=name)
    if row is None:
        raise Refusal(404, "no-expert", "there is no such expert", do="look its digest up")
    retire_all(c, [name], message.reason, when, office)
    if message.compensate:
        _take_back(c, row["submission"])
    return Done()


def _take_back(c: Connection, submission: str) -> None:
    """The credit of an acceptance, by an entry against it."""
    if paid := c.one(_paid, submission=submission):
        pay(c, paid["account"], -paid["amount"], "compensation", submission, paid["verdict"])


def retire_all(c: Connection, names: Sequence[str], reason: str, when: Moment, office: Office) -> int | None:
    """Retire some experts in one snapshot; its version. None where none of them is active."""
    version = newest(c)["version"] + 1
    gone = [name for name in names if _drop(c, name, reason, version, when)]
    return take_snapshot(c, when, office, removed=tuple(gone)) if gone else None


def _drop(c: Connection, name: str, reason: str, version: int, when: Moment) -> bool:
    row = c.one(_expert, digest=name)
    if row is None or not c.changed(_retire, digest_=name, until_=version, reason_=reason):
        return False
    if c.value(_owner, number=row["domain"]) == name:
        move_domain(c, row["domain"], "retire")  # open at once: it was leased before, whatever another process's clock says
    c.run(_taint, expert_=name)
    log(c, "expert.retired", name, when.unix, domain=row["domain"], reason=reason, version=version)
    return True


def take_snapshot(c: Connection, when: Moment, office: Office, added: str | None = None, removed: tuple[str, ...] = ()) -> int:
    """The forest as it is now, with the run's ensemble over it, signed; its version."""
    run, last = current(c), newest(c)
    members = tuple(
        Member(expert=row["digest"], domain=row["domain"], status=row["status"], account=row["account"], since=row["since"])
        for row in c.all(_members)
    )
    forest = Forest(seed=run.seed, partition=run.partition, experts=tuple(one.expert for one in members))
    bounded = tuple(one.expert for one in members if one.status == "probation")
    ensemble = run.ensemble.model_copy(update={"forest": forest.digest, "bounded": bounded})
    for made in (forest, ensemble):
        c.insert(record, ignore=True, digest=made.digest, kind=made.kind, body=canonical(made).decode(), secret=0)
    version = last["version"] + 1 if last else 0
    parent = digest(_open(last)) if last else None
    body = Snapshot(
        run=run.run, version=version, parent=parent, forest=forest.digest, ensemble=ensemble.digest, experts=members, added=added,
        removed=removed,
    )  # fmt: skip
    c.insert(
        snapshot, version=version, signed=sign(body, office.key).model_dump_json(), forest=forest.digest, ensemble=ensemble.digest,
        at=int(when.unix),
    )  # fmt: skip
    log(c, "snapshot.made", forest.digest, when.unix, version=version, ensemble=ensemble.digest)
    return version


def _open(row) -> Snapshot:
    return Snapshot.model_validate(json.loads(row["signed"])["body"])


def end_probation(c: Connection, when: Moment, office: Office) -> int:
    """Experts whose probation is over count in full, in a new snapshot; how many."""
    due = c.all(_due, now=when.uptime)
    if due:
        c.run(_probation, now=when.uptime)
        for row in due:
            log(c, "expert.full", row["digest"], when.unix)
        take_snapshot(c, when, office)
    return len(due)


def derive(c: Connection, name: str, kind: str, experts: Sequence[str], when: Moment) -> bool:
    """Enter a merge, state or mixture made of these experts; their retirement marks it. What was entered as the same kind and is marked has
    been rebuilt, and goes. Whether all of its experts are in the forest."""
    rows = [c.one(_expert, digest=one) for one in experts]
    if strange := [one for one, row in zip(experts, rows, strict=True) if row is None]:
        raise BadInput(f"{name[:8]} is made of {strange[0][:8]}, which is no expert of this run")
    good = all(row["status"] != "retired" for row in rows)
    if good:
        forget_marked(c, kind)
    if c.insert(derived, ignore=True, digest=name, kind=kind, version=newest(c)["version"], tainted=int(not good)):
        for one in experts:
            c.insert(derived_expert, derived=name, expert=one)
        log(c, "derived.made", name, when.unix, what=kind)
    return good


def forget_marked(c: Connection, kind: str) -> None:
    """What was entered as this kind, and is marked, is no more."""
    for old in c.all(_marked, kind=kind):
        c.run(_drop_parts, name=old["digest"])
        c.run(_drop_derived, name=old["digest"])


def measure(c: Connection, caller: Caller, message: Measurement, when: Moment) -> Done:
    """What a snapshot's ensemble loses on held-out text, as a verifier measured it."""
    need(caller, "verifier", "admin")
    if c.changed(_measured, version_=message.version, measured_=plain(message)) != 1:
        raise Refusal(404, "no-snapshot", f"there is no snapshot {message.version}", do="measure the newest one")
    log(c, "snapshot.measured", str(message.version), when.unix)
    return Done()
