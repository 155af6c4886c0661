"""Accounts, their devices, consents, erasure, and what a maintainer does with keys."""

import secrets

from sqlalchemy import bindparam, func, select, update

from elmwood.hub.actions import experts
from elmwood.hub.actions.request import Caller, Moment, current, licences_now, need, plain
from elmwood.hub.database import Connection
from elmwood.hub.events import log
from elmwood.hub.messages import AccountReply, Appeal, Consent, Done, NewAccount, NewDevice
from elmwood.hub.rules import LIVE, Refusal
from elmwood.hub.signing import Office, secret_hash
from elmwood.hub.tables import account, appeal, consent, device, domain, expert, lease, submission

_account = select(account.c.recovery, account.c.name).where(account.c.id == bindparam("id"))
_devices = select(func.count()).select_from(device).where(device.c.account == bindparam("account"))
_consents = select(func.coalesce(func.max(consent.c.number), 0))
_consent = (
    select(consent.c.number)
    .where(consent.c.account == bindparam("account"), consent.c.licences == bindparam("licences"), consent.c.withdrawn == 0)
    .limit(1)
)
_withdraw = update(consent).where(consent.c.account == bindparam("account_"), consent.c.withdrawn == 0).values(withdrawn=1)
_erase = update(account).where(account.c.id == bindparam("id_")).values(name=None, recovery=None)
_role = update(device).where(device.c.key == bindparam("key_")).values(role=bindparam("role_"))
_block = update(device).where(device.c.key == bindparam("key_")).values(blocked=bindparam("why"))
_leases = select(lease.c.id, lease.c.domain, lease.c.token).where(lease.c.key == bindparam("key"), lease.c.state.in_(LIVE))
_end = update(lease).where(lease.c.id == bindparam("id_")).values(state="released", why="blocked")
_free = (
    update(domain)
    .where(domain.c.number == bindparam("number_"), domain.c.state == "leased", domain.c.token == bindparam("token_"))
    .values(state="open")
)
_experts = select(expert.c.digest).where(expert.c.account == bindparam("account"), expert.c.status != "retired")
_submission = select(submission.c.account, submission.c.state).where(submission.c.id == bindparam("id"))


def register(c: Connection, caller: Caller, message: NewAccount, when: Moment) -> AccountReply:
    """A new account with its first device. A key that is registered gets its account again."""
    if not caller.account:
        caller = caller._replace(account=secrets.token_hex(16), role="member")
        c.insert(account, id=caller.account, name=message.name, recovery=message.recovery, at=int(when.unix))
        c.insert(device, key=caller.key, account=caller.account, role="member", at=int(when.unix))
        log(c, "account.made", caller.account, when.unix)
        log(c, "device.added", caller.key, when.unix, account=caller.account)
    return AccountReply(account=caller.account, key=caller.key, role=caller.role)


def add_device(c: Connection, caller: Caller, message: NewDevice, when: Moment) -> AccountReply:
    """A further device of an account, by its recovery code."""
    row = c.one(_account, id=message.account)
    if row is None or row["recovery"] is None or not secrets.compare_digest(row["recovery"], secret_hash(message.recovery_code)):
        raise Refusal(403, "wrong-recovery-code", "there is no such account with this recovery code", do="look both up where you kept them")
    if caller.account and caller.account != message.account:
        raise Refusal(409, "key-taken", "this key belongs to another account", do="make a new key")
    if not caller.account:
        most = current(c).limits.devices_per_account
        if c.value(_devices, account=message.account) >= most:
            raise Refusal(409, "limit", f"an account has {most} devices at most", do="use one of them")
        c.insert(device, key=caller.key, account=message.account, role="member", at=int(when.unix))
        log(c, "device.added", caller.key, when.unix, account=message.account)
    return AccountReply(account=message.account, key=caller.key, role=caller.role or "member")


def agree(c: Connection, caller: Caller, message: Consent, when: Moment, proof: str) -> Done:
    """A signed consent to the licences of the run. `proof`: JSON of the signed request."""
    licences = current(c).licences
    if message.licences != licences:
        raise Refusal(409, "other-licences", "these are not the licence texts of this run", do="fetch GET /v1/run and show its texts again")
    if c.value(_consent, account=caller.account, licences=plain(licences)) is None:
        number = c.value(_consents) + 1
        c.insert(
            consent, number=number, account=caller.account, key=caller.key, licences=plain(licences), proof=proof, withdrawn=0,
            at=int(when.unix),
        )  # fmt: skip
        log(c, "consent.given", caller.account, when.unix, number=number)
    return Done()


def has_agreed(c: Connection, account_id: str) -> bool:
    return c.value(_consent, account=account_id, licences=licences_now(c)) is not None


def withdraw(c: Connection, caller: Caller, when: Moment, office: Office) -> Done:
    """Take a consent back: the account's experts are retired."""
    if c.changed(_withdraw, account_=caller.account):
        log(c, "consent.withdrawn", caller.account, when.unix)
        experts.retire_all(c, [row["digest"] for row in c.all(_experts, account=caller.account)], "withdrawn", when, office)
    return Done()


def erase(c: Connection, caller: Caller, account_id: str, when: Moment) -> Done:
    """Forget the name of an account and its recovery code. What it gave stays; ids are no names."""
    if caller.account != account_id:
        need(caller, "admin")
    if c.one(_account, id=account_id) is None:
        raise Refusal(404, "no-account", "there is no such account", do="look its id up")
    c.run(_erase, id_=account_id)
    log(c, "account.erased", account_id, when.unix)
    return Done()


def trust(c: Connection, key: str, role: str, when: Moment, name: str = "maintainer") -> None:
    """Give a key a role, by the maintainer at the database; it is registered where it is new."""
    if not c.changed(_role, key_=key, role_=role):
        made = secrets.token_hex(16)
        c.insert(account, id=made, name=name, at=int(when.unix))
        c.insert(device, key=key, account=made, role=role, at=int(when.unix))
    log(c, "device.trusted", key, when.unix, role=role)


def block(c: Connection, caller: Caller, key: str, reason: str, when: Moment) -> Done:
    """Block a key: from now on every route refuses it, and its leases end."""
    need(caller, "admin")
    if not c.changed(_block, key_=key, why=reason):
        raise Refusal(404, "unknown-key", f"key {key[:8]} is not registered here", do="look it up among the members")
    for held in c.all(_leases, key=key):
        c.run(_end, id_=held["id"])
        c.run(_free, number_=held["domain"], token_=held["token"])
    log(c, "device.blocked", key, when.unix)
    return Done()


def ask_a_person(c: Connection, caller: Caller, message: Appeal, when: Moment) -> Done:
    """An appeal against a verdict, for a maintainer to read."""
    row = c.one(_submission, id=message.submission)
    if row is None or row["account"] != caller.account:
        raise Refusal(404, "no-submission", "you have no such submission", do="look its id up")
    made = secrets.token_hex(16)
    c.insert(appeal, id=made, submission=message.submission, account=caller.account, text=message.text, at=int(when.unix))
    log(c, "appeal.made", made, when.unix, submission=message.submission)
    return Done()
