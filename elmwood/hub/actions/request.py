"""What every signed write goes through: a nonce is good once, a blocked key does nothing, a repeated request gets its first reply."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy import bindparam, delete, select, update

from elmwood.hub import rules
from elmwood.hub.database import Connection
from elmwood.hub.events import log
from elmwood.hub.messages import RunManifest
from elmwood.hub.rules import Refusal
from elmwood.hub.signing import SKEW
from elmwood.hub.tables import device, domain, manifest, nonce, reply, run
from elmwood.records import Frozen, canonical

KEPT = 2 * 86400.0  # seconds that first replies are kept


class Moment(NamedTuple):
    """When: the hub's uptime decides, unix seconds are shown."""

    uptime: float
    unix: float


class Caller(NamedTuple):
    """A registered key."""

    key: str
    account: str
    role: str


class Request(NamedTuple):
    """What is known of a signed request before the database is asked."""

    key: str
    nonce: str
    time: int
    sha: str  # of method, target and body
    name: str = ""  # Idempotency-Key


class Reply(NamedTuple):
    """A status of HTTP and a JSON body."""

    status: int
    body: str


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode  # made once: `json.dumps` makes one each time
_device = select(device.c.account, device.c.role, device.c.blocked).where(device.c.key == bindparam("key"))
_reply = select(reply.c.request, reply.c.status, reply.c.body).where(reply.c.key == bindparam("key"), reply.c.name == bindparam("name"))
_version = select(run.c.version)
_manifest = select(manifest.c.signed).where(manifest.c.version == bindparam("version"))
_move = (
    update(domain)
    .where(domain.c.number == bindparam("number"), domain.c.state == bindparam("before"), domain.c.token == bindparam("token_"))
    .values(state=bindparam("after"), open_at=bindparam("open_at_"), expert=bindparam("expert_"))
)
_state = select(domain.c.state, domain.c.token, domain.c.open_at, domain.c.expert).where(domain.c.number == bindparam("number"))
_forget = delete(reply).where(reply.c.due < bindparam("now"))
_forget_nonces = delete(nonce).where(nonce.c.expires < bindparam("now"))


def perform(
    c: Connection, request: Request, fn: Callable[[Connection, Caller], Frozen], when: Moment, status: int = 200, new: bool = False
) -> Reply | Refusal:
    """Do what a signed request asks, once. `new`: the key may be unknown. A refusal is returned, and only the nonce is kept of it."""
    end, changes = c.end, c.changes + 1
    try:
        if not _fresh(c, request):
            raise Refusal(401, "replayed", "this signed request was sent before", do="sign it again, with a new nonce")
        caller = find_caller(c, request.key, new)
        if request.name and (known := c.one(_reply, key=request.key, name=request.name)):
            if known["request"] != request.sha:
                raise Refusal(422, "key-reused", "this Idempotency-Key was sent with another request", do="use a new key for a new request")
            return Reply(known["status"], known["body"])
        body = dump(fn(c, caller))
        if request.name:
            c.insert(reply, key=request.key, name=request.name, request=request.sha, status=status, body=body, due=when.uptime + KEPT)
        return Reply(status, body)
    except Refusal as refusal:
        if c.changes > changes:  # more than the nonce
            c.undo(end)
            _fresh(c, request)
        return refusal


def _fresh(c: Connection, request: Request) -> bool:
    return c.insert(nonce, ignore=True, key=request.key, nonce=request.nonce, expires=request.time + int(2 * SKEW)) == 1


def find_caller(c: Connection, key: str, new: bool = False) -> Caller:
    """Who has this key. Raises Refusal."""
    row = c.one(_device, key=key)
    if row is None:
        if new:
            return Caller(key, "", "")
        raise Refusal(403, "unknown-key", f"key {key[:8]} is not registered here", do="register it: POST /v1/accounts or /v1/devices")
    if row["blocked"] is not None:
        raise Refusal(403, "blocked", f"key {key[:8]} was blocked by a maintainer: {row['blocked']}", do="write to the maintainer")
    return Caller(key, row["account"], row["role"])


def need(caller: Caller, *roles: str) -> None:
    """Raises Refusal where the caller has none of these roles."""
    if caller.role not in roles:
        raise Refusal(
            403, "not-allowed", f"this needs the role {' or '.join(roles)}, the key has {caller.role or 'none'}", do="use another key"
        )


def current(c: Connection) -> RunManifest:
    """The manifest that applies. Raises Refusal where nothing is published."""
    version = c.value(_version)
    if version is None:
        raise Refusal(503, "no-run", "no run is published here", do="`elmwood hub publish` makes one", retryable=True, retry_after=60)
    return manifest_of(c, version)


def manifest_of(c: Connection, version: int) -> RunManifest:
    """A manifest by version; signed ones never change, so it is parsed once."""
    if version not in c.kept:
        text = c.value(_manifest, version=version)
        c.kept[version] = RunManifest.model_validate_json(json.dumps(json.loads(text)["body"]))
    return c.kept[version]


def licences_now(c: Connection) -> str:
    """Canonical JSON of the licences of the run."""
    run, key = current(c), "licences"
    if (run.version, key) not in c.kept:
        c.kept[run.version, key] = plain(run.licences)
    return c.kept[run.version, key]


def move_domain(c: Connection, number: int, what: str, *, open_at: float | None = None, expert: str | None = None) -> int:
    """The only place that changes a domain's state after a grant; its token. Raises Refusal where the state does not allow it."""
    row = c.one(_state, number=number)
    after = rules.after(rules.DOMAIN, row["state"], what)
    opens = row["open_at"] if open_at is None else open_at
    c.run(_move, number=number, before=row["state"], token_=row["token"], after=after, open_at_=opens, expert_=expert)
    return row["token"]


def forget(c: Connection, when: Moment) -> None:
    """Drop replies and nonces that are too old to matter."""
    c.run(_forget, now=when.uptime)
    c.run(_forget_nonces, now=int(when.unix))


def dump(value: Frozen) -> str:
    return value.model_dump_json()


def plain(value: Any) -> str:
    """Canonical JSON of a value for a column."""
    return canonical(value).decode() if isinstance(value, Frozen) else _encode(value)


__all__ = [
    "Caller", "Moment", "Refusal", "Reply", "Request", "current", "dump", "find_caller", "forget", "licences_now", "log", "manifest_of",
    "move_domain", "need", "perform", "plain",
]  # fmt: skip
