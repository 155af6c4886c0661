"""Claims, beats, pauses, releases and the end of leases. The token is checked in the same UPDATE as each write."""

import json
import secrets

from sqlalchemy import bindparam, func, select, update

from elmwood.hub import rules
from elmwood.hub.actions.members import has_agreed
from elmwood.hub.actions.request import Caller, Moment, current, manifest_of, plain
from elmwood.hub.database import Connection
from elmwood.hub.events import log
from elmwood.hub.messages import Beat, BeatReply, Claim, Grant, RunManifest
from elmwood.hub.rules import LIVE, Life, Refusal
from elmwood.hub.tables import domain, lease, submission
from elmwood.records import Shard

AGAIN = 60.0  # seconds to wait where no domain is open

_held = select(lease).where(lease.c.key == bindparam("key"), lease.c.state.in_(LIVE)).limit(1)
_count = select(func.count()).select_from(lease).where(lease.c.account == bindparam("account"), lease.c.state.in_(LIVE))
_near = select(func.count()).select_from(lease).where(lease.c.address == bindparam("address"), lease.c.state.in_(LIVE))
_open = (
    select(domain.c.number, domain.c.name, domain.c.token, domain.c.shards)
    .where(domain.c.state == "open", domain.c.open_at <= bindparam("now"), domain.c.has_text >= bindparam("text"))
    .order_by(domain.c.token, domain.c.number)
    .limit(1)
)
_given = (
    select(func.count())
    .select_from(submission)
    .where(submission.c.account == bindparam("account"), submission.c.domain == bindparam("domain"))
)
_domain = select(domain.c.name, domain.c.shards).where(domain.c.number == bindparam("number"))
_next_open = select(func.min(domain.c.open_at)).where(domain.c.state == "open")
_take = (
    update(domain)
    .where(domain.c.number == bindparam("number_"), domain.c.state == "open", domain.c.token == bindparam("token_"))
    .values(state="leased", token=bindparam("next"))
)
_lease = select(lease).where(lease.c.id == bindparam("id"))
_live = (
    update(lease)
    .where(lease.c.id == bindparam("id_"), lease.c.token == bindparam("token_"), lease.c.state == bindparam("before"))
    .values(
        state=bindparam("after"), due=bindparam("due_"), beat_due=bindparam("beat"), progress_due=bindparam("progress"),
        pause_left=bindparam("left"), paused_at=bindparam("paused"), step=bindparam("step_"), phase=bindparam("phase_"),
        loss=bindparam("loss_"), boot_id=bindparam("boot"), why=bindparam("why_"),
    )
)  # fmt: skip
_revive = (
    update(domain)
    .where(domain.c.number == bindparam("number_"), domain.c.state == "open", domain.c.token == bindparam("token_"))
    .values(state="leased")
)
_free = (
    update(domain)
    .where(domain.c.number == bindparam("number_"), domain.c.state == "leased", domain.c.token == bindparam("token_"))
    .values(state="open")
)
_overdue = select(lease).where(lease.c.state.in_(LIVE), lease.c.due < bindparam("now")).order_by(lease.c.due).limit(500)


def claim(c: Connection, caller: Caller, message: Claim, when: Moment, address: str | None = None) -> Grant:
    """A lease of an open domain, or the one that the key holds. `address`: a hash of where the claim comes from; leases of one are counted.
    Raises Refusal, with the status 204 where there is no work."""
    run = current(c)
    if message.tier not in run.tiers:
        tiers = ", ".join(run.tiers)
        raise Refusal(204, "too-small", f"this run has no recipe for the tier {message.tier}, only {tiers}", retry_after=3600, tiers=tiers)
    if not has_agreed(c, caller.account):
        raise Refusal(403, "consent-needed", "the licences of this run are not agreed to", do="read them, then POST /v1/consents")
    held = c.one(_held, key=caller.key)
    if held is not None:
        return _resume_claim(c, held, message, when)
    most = run.limits.leases_per_account
    if c.value(_count, account=caller.account) >= most:
        raise Refusal(409, "limit", f"your account holds {most} leases, the most there are", do="finish or release one")
    most = run.limits.leases_per_address
    if address and c.value(_near, address=address) >= most:
        raise Refusal(409, "limit", f"{most} leases are held from your address, the most there are", do="finish or release one")
    row = _find_open(c, message, when.uptime)
    token = row["token"] + 1
    if c.changed(_take, number_=row["number"], token_=row["token"], next=token) != 1:
        raise Refusal(409, "taken", "another claim was faster", do="claim again", retryable=True)
    life, made = rules.grant(run.terms, when.uptime), secrets.token_hex(16)
    given = c.value(_given, account=caller.account, domain=row["number"])
    seed = rules.init_seed(run.run, row["number"], caller.account, given)
    c.insert(
        lease, id=made, domain=row["number"], token=token, key=caller.key, account=caller.account, boot_id=message.boot_id,
        tier=message.tier, rng_seed=seed, manifest=run.version, state="running", due=life.due, beat_due=life.beat_due,
        progress_due=life.progress_due, final_due=life.final_due, pause_left=life.pause_left, step=0, phase="fetching",
        device=plain(message.device), address=address, at=int(when.unix),
    )  # fmt: skip
    log(c, "lease.granted", made, when.unix, domain=row["number"], token=token, key=caller.key)
    return _as_grant(run, made, row["number"], row["name"], token, seed, message.tier, row["shards"], life, when.uptime, False)


def _find_open(c: Connection, message: Claim, now: float):
    text = 0 if message.own_text else 1
    statement = _open
    if message.domains:
        statement = _open.where(domain.c.number.in_(message.domains)) if len(message.domains) < 500 else _open
    row = c.one(statement, now=now, text=text)
    if row is None:
        opens = c.value(_next_open)
        wait = AGAIN if opens is None else min(max(opens - now, 5.0), 600.0)
        raise Refusal(204, "no-open-domain", "all domains are leased or done", retry_after=wait)
    return row


def _resume_claim(c: Connection, held, message: Claim, when: Moment) -> Grant:
    run, life = manifest_of(c, held["manifest"]), life_of(held)
    if not rules.who_resumes(message.boot_id, held["boot_id"], life, run.terms, when.uptime):
        raise Refusal(
            409, "held-elsewhere", f"this key holds domain {held['domain']} on another machine, which is alive",
            do="give each machine its own key", kept=f"the lease {held['id']}",
        )  # fmt: skip
    life = rules.resume(life, run.terms, when.uptime)
    state = "running" if held["state"] == "paused" else held["state"]
    _write(c, held, life, state, boot=message.boot_id)
    row = c.one(_domain, number=held["domain"])
    return _as_grant(
        run, held["id"], held["domain"], row["name"], held["token"], held["rng_seed"], held["tier"], row["shards"], life, when.uptime, True
    )


def _as_grant(
    run: RunManifest, made: str, number: int, name: str, token: int, seed: int, tier, shards: str, life: Life, now: float, resumed: bool
) -> Grant:
    return Grant(
        lease=made, domain=number, name=name, token=token, recipe=run.tiers[tier].recipe.model_copy(update={"rng_seed": seed}), tier=tier,
        seed=run.seed, partition=run.partition, shards=parse_shards(shards), beat_s=run.terms.beat_s, progress_s=run.terms.progress_s,
        final_s=max(life.final_due - now, 1e-3), pause_s=life.pause_left, manifest=run.version, resumed=resumed,
    )  # fmt: skip


def parse_shards(text: str) -> tuple[Shard, ...]:
    return tuple(Shard(**one) for one in json.loads(text))


def beat(c: Connection, caller: Caller, name: str, message: Beat, when: Moment) -> BeatReply:
    """A sign of life, with the step. An expired lease whose domain nobody got goes on. Raises Refusal."""
    row = mine(c, caller, name, message.token)
    run, life, now = manifest_of(c, row["manifest"]), life_of(row), when.uptime
    if row["state"] in ("done", "released"):
        raise _gone(row)
    if row["state"] == "expired":
        again = rules.revive(life, run.terms, message.step, now)
        if again is None or c.changed(_revive, number_=row["domain"], token_=row["token"]) != 1:
            raise _gone(row)
        log(c, "lease.revived", name, when.unix, domain=row["domain"], token=row["token"])
        life, state = again, "running"
    else:
        life, state = rules.beat(life, run.terms, message.step, now), row["state"]
        if state != "paused":
            state = "uploading" if message.phase == "uploading" else "running"
    _write(c, row, life, state, phase=message.phase, loss=message.loss)
    return _as_reply(life, state, run, now)


def pause(c: Connection, caller: Caller, name: str, token: int, when: Moment) -> BeatReply:
    row = _alive(c, caller, name, token)
    run = manifest_of(c, row["manifest"])
    life = rules.pause(life_of(row), run.terms, when.uptime)
    _write(c, row, life, rules.after(rules.LEASE, row["state"], "pause"))
    return _as_reply(life, "paused", run, when.uptime)


def resume(c: Connection, caller: Caller, name: str, token: int, when: Moment) -> BeatReply:
    row = _alive(c, caller, name, token)
    run = manifest_of(c, row["manifest"])
    life = rules.resume(life_of(row), run.terms, when.uptime)
    state = "running" if row["state"] == "paused" else row["state"]
    _write(c, row, life, state)
    return _as_reply(life, state, run, when.uptime)


def release(c: Connection, caller: Caller, name: str, token: int, when: Moment) -> BeatReply:
    """Give a domain back."""
    row = mine(c, caller, name, token)
    run, life = manifest_of(c, row["manifest"]), life_of(row)
    if row["state"] in LIVE:
        _write(c, row, life, "released")
        c.run(_free, number_=row["domain"], token_=row["token"])
        log(c, "lease.released", name, when.unix, domain=row["domain"], token=row["token"])
    elif row["state"] != "released":
        raise _gone(row)
    return _as_reply(life, "released", run, when.uptime)


def reap(c: Connection, when: Moment) -> int:
    """End the leases whose deadline has passed, by hub uptime; how many."""
    rows = c.all(_overdue, now=when.uptime)
    for row in rows:
        _write(c, row, life_of(row), "expired", why=life_of(row).missed(when.uptime))
        c.run(_free, number_=row["domain"], token_=row["token"])
        log(c, "lease.expired", row["id"], when.unix, domain=row["domain"], token=row["token"], why=life_of(row).missed(when.uptime))
    return len(rows)


def mine(c: Connection, caller: Caller, name: str, token: int):
    """The lease of this name and token. Raises Refusal: 404 where it is another's, 409 where the token is stale."""
    row = c.one(_lease, id=name)
    if row is None or row["key"] != caller.key:
        raise Refusal(404, "no-lease", "this key has no such lease", do="claim one: POST /v1/leases")
    if row["token"] != token:
        raise Refusal(409, "stale-token", f"token {token} is not that of this lease", do="claim again")
    if row["state"] == "expired" and c.value(_owner, number=row["domain"]) != token:
        age = "another volunteer has this domain now"
        raise Refusal(409, "stale-token", age, do="claim again; what you trained stays on your machine", kept="nothing of this lease")
    return row


_owner = select(domain.c.token).where(domain.c.number == bindparam("number"))


def _alive(c: Connection, caller: Caller, name: str, token: int):
    row = mine(c, caller, name, token)
    if row["state"] not in LIVE:
        raise _gone(row)
    return row


def _gone(row) -> Refusal:
    why = f" (deadline for {row['why']})" if row["why"] else ""
    return Refusal(410, "gone", f"this lease is {row['state']}{why}", do="claim again; what you trained stays on your machine")


def life_of(row) -> Life:
    return Life(row["beat_due"], row["progress_due"], row["final_due"], row["pause_left"], row["paused_at"], row["step"])


def _write(c: Connection, row, life: Life, state: str, *, phase=None, loss=None, boot=None, why=None) -> None:
    changed = c.changed(
        _live, id_=row["id"], token_=row["token"], before=row["state"], after=state, due_=life.due, beat=life.beat_due,
        progress=life.progress_due, left=life.pause_left, paused=life.paused_at, step_=life.step, phase_=phase or row["phase"],
        loss_=row["loss"] if loss is None else loss, boot=boot or row["boot_id"], why_=why,
    )  # fmt: skip
    if changed != 1:
        raise Refusal(409, "stale-token", "the lease changed meanwhile", do="ask again", retryable=True)


def _as_reply(life: Life, state, run: RunManifest, now: float) -> BeatReply:
    paused = 0 if life.paused_at is None else now - life.paused_at
    return BeatReply(
        alive=state in LIVE, state=state, beat_s=run.terms.beat_s, progress_s=max(life.progress_due + paused - now, 0.0),
        final_s=max(life.final_due - now, 0.0), pause_s=max(life.pause_left - paused, 0.0),
    )  # fmt: skip
