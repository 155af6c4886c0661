"""What a maintainer does with a hub: serve it, look at it, back it up, check it, move it to another database."""

import gc
import logging
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Table, func, select

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged, ElmwoodError
from elmwood.hub import events, signing
from elmwood.hub.actions import experts, members
from elmwood.hub.actions.request import current, find_caller
from elmwood.hub.database import Connection, Database, transaction
from elmwood.hub.home import Hub
from elmwood.hub.messages import Retirement, Signed, Snapshot
from elmwood.hub.migrations import revision, upgrade
from elmwood.hub.rules import LIVE
from elmwood.hub.star import home as star_home
from elmwood.hub.tables import blob, credit, derived, domain, expert, lease, manifest, metadata, run, snapshot, submission
from elmwood.store.disk import hash_file

logger = logging.getLogger("elmwood.hub")
_made = select(derived.c.tainted, func.count().label("n")).group_by(derived.c.tainted)
SLACK = 1e-9  # of sums of credit


def serve(hub: Hub, host: str, port: int, names: Sequence[str] = (), star: star_home.Home | None = None) -> None:
    """Answer requests until the process is told to stop. One process is enough for thousands of volunteers; more need PostgreSQL. `names`:
    of its hosts, one of which each request must use; none: any will do. `star`: coordinated here too, at /star."""
    import uvicorn

    from elmwood.hub.app import create_app
    from elmwood.hub.star.app import create_app as star_app
    from elmwood.report.connections import Prompt

    app = create_app(hub, [host, *names] if names else [])
    if star:
        app.mount("/star", star_app(star))
        star.start(lambda error: logger.error("the star at /star is coordinated no more: %s", error))
    gc.collect()
    gc.freeze()  # modules, routes and the manifest stay: looking at them again and again cost 15 % of a request
    uvicorn.run(
        app, host=host, port=port, http=Prompt, log_level="warning", timeout_graceful_shutdown=10, timeout_keep_alive=75,
        server_header=False,
    )  # fmt: skip


def status(hub: Hub) -> dict[str, Any]:
    """What there is, in numbers."""

    def count(c: Connection, table: Table, column: str) -> dict[str, int]:
        rows = c.all(select(table.c[column], func.count().label("n")).group_by(table.c[column]).order_by(table.c[column]))
        return {row[column]: row["n"] for row in rows}

    def look(c: Connection) -> dict[str, Any]:
        made, newest = current(c), experts.newest(c)
        left = made.issued + made.expires_s - time.time()
        return {
            "run": made.run, "version": made.version, "expires_in_days": round(left / 86400, 1), "uptime_s": round(hub.clock.now()),
            "snapshot": newest["version"], "ensemble": newest["ensemble"], "domains": count(c, domain, "state"),
            "leases": count(c, lease, "state"), "submissions": count(c, submission, "state"), "experts": count(c, expert, "status"),
            "made of experts": {"current": 0} | {("to rebuild" if row["tainted"] else "current"): row["n"] for row in c.all(_made)},
            "events": c.value(select(func.count()).select_from(events.event)), "faults": c.value(select(run.c.faults)),
        }  # fmt: skip

    return hub.read(look)


def retire(hub: Hub, name: str, reason: str = "other", compensate: bool = False) -> int:
    """Retire an expert by digest, or the beginning of one; the version of the snapshot without it. Raises BadInput."""
    found = hub.read(lambda c: [row["digest"] for row in c.all(select(expert.c.digest).where(expert.c.status != "retired"))])
    chosen = [digest for digest in found if digest.startswith(name)]
    if len(chosen) != 1:
        raise BadInput(f"{name!r} begins the digests of {len(chosen)} experts of the forest: `elmwood hub status` and the pages list them")
    key = signing.public(signing.load_key(hub.home.key_path("admin")))
    message = Retirement.model_validate({"reason": reason, "compensate": compensate})

    def write(c: Connection) -> int:
        experts.retire(c, find_caller(c, key), chosen[0], message, hub.moment(), hub.office)
        return experts.newest(c)["version"]

    return hub.database.write(write)


def trust(hub: Hub, key: str, role: str) -> None:
    """Give a key a role, here at the database. Raises BadInput."""
    if role not in ("member", "verifier", "admin"):
        raise BadInput(f"{role!r} is no role: member, verifier or admin")
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise BadInput(f"{key[:20]!r} is no public key: 64 hex digits")
    hub.database.write(lambda c: members.trust(c, key, role, hub.moment()))


# ---- backup ---------------------------------------------------------------------------------------------------------


def backup(hub: Hub, folder: Path, progress: Progress = silent) -> Path:
    """Copy database, keys and blobs of a running hub into a new folder, which is a store with this hub in it. Raises BadInput.

    The database comes first, so every blob that it names is there when blobs are copied.
    """
    if folder.exists():
        raise BadInput(f"{folder} exists: name a new folder")
    building = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    home = building / "hub" / hub.home.run
    home.mkdir(parents=True)
    shutil.copytree(hub.home.folder / "keys", home / "keys")
    target = home / "hub.sqlite"
    if hub.database.path:
        with sqlite3.connect(hub.database.path) as source, sqlite3.connect(target) as copy:
            source.backup(copy, pages=512, sleep=0)
        source.close()
        copy.close()
    else:
        upgrade(f"sqlite:///{target}")
        copy_database(hub.database.url, f"sqlite:///{target}")
    copied = Database(f"sqlite:///{target}")
    try:
        names = copied.read(lambda c: [row["sha"] for row in c.all(select(blob.c.sha).order_by(blob.c.sha))])
        for number, sha in enumerate(names):
            progress("backup", number, len(names), "blobs")
            path = building / "blobs" / "sha256" / sha[:2] / sha[2:]
            path.parent.mkdir(parents=True, exist_ok=True)
            with hub.blobs.file(sha) as found:
                shutil.copyfile(found, path)
            if hash_file(path) != sha:
                raise Damaged(f"blob {sha[:8]} of the hub does not match its digest: run `elmwood hub doctor`")
    finally:
        copied.close()
    building.rename(folder)
    return folder


def copy_database(source: str, target: str) -> None:
    """All rows of one database into another, empty one, whichever kinds they are. Raises BadInput."""
    upgrade(target)
    reader, writer = Database(source), Database(target)
    try:
        connection = writer.connect()

        def copy(c: Connection) -> None:
            if connection.one(select(manifest.c.version).limit(1)) is not None:
                raise BadInput("the target database holds a run already: name an empty one")
            with transaction(connection):
                for table in metadata.sorted_tables:
                    connection.run(table.delete())
                    for row in c.run(table.select()):
                        connection.insert(table, **dict(row))

        reader.read(copy)
        connection.raw.close()
    finally:
        reader.close()
        writer.close()


# ---- doctor ---------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """What `doctor` looked at."""

    what: str
    good: bool
    said: str


def doctor(hub: Hub) -> Iterator[Finding]:
    """Look at keys, manifest, database, log, ledger, snapshots and blobs of a hub."""
    checks = {
        "keys": _keys, "manifest": _manifest, "schema": _schema, "log": _log, "ledger": _ledger, "domains": _domains,
        "snapshots": _snapshots, "store": lambda hub: hub.blobs.probe(), "blobs": _blobs,
    }  # fmt: skip
    for what, look in checks.items():
        try:
            yield Finding(what, True, look(hub))
        except (ElmwoodError, OSError) as error:
            yield Finding(what, False, str(error))


def _keys(hub: Hub) -> str:
    for path in sorted((hub.home.folder / "keys").glob("*.key")):
        signing.load_key(path)
        if path.stat().st_mode & 0o077:
            raise Damaged(f"{path} can be read by others: chmod 600 it")
    return "present, readable by their owner alone"


def _manifest(hub: Hub) -> str:
    text = hub.read(lambda c: c.value(select(manifest.c.signed).order_by(manifest.c.version.desc()).limit(1)))
    made = signing.open_manifest(Signed.model_validate_json(text), time.time())
    days = (made.issued + made.expires_s - time.time()) / 86400
    if made.hub_key != signing.public(hub.office.key):
        raise Damaged("the manifest names another hub key than the one in keys/: publish again")
    return f"version {made.version}, signed by its root key, expires in {days:.1f} days"


def _schema(hub: Hub) -> str:
    return f"revision {revision(hub.database.url)}"


def _log(hub: Hub) -> str:
    return f"{hub.read(events.check_log)} events, the chain holds"


def _ledger(hub: Hub) -> str:
    """Every line of credit has its accepted submission, once; each acceptance has its line."""

    def look(c: Connection) -> int:
        lines = c.all(select(credit).order_by(credit.c.number))
        gains = {row["submission"]: row["amount"] for row in lines if row["kind"] == "gain"}
        accepted = {row["submission"] for row in c.all(select(expert.c.submission))}
        if set(gains) != accepted:
            raise Damaged(f"{len(set(gains) ^ accepted)} acceptances and lines of credit do not match: restore the hub from a backup")
        if bad := [row["number"] for row in lines if row["kind"] == "compensation" and row["amount"] < -gains[row["submission"]] - SLACK]:
            raise Damaged(f"line {bad[0]} of the ledger takes more than was given: restore the hub from a backup")
        if [row["number"] for row in lines] != list(range(1, len(lines) + 1)):
            raise Damaged("a line of the ledger is missing: restore the hub from a backup")
        return len(lines)

    return f"{hub.read(look)} lines, each with its verdict"


_live = select(lease.c.domain, lease.c.token).where(lease.c.state.in_(LIVE))
_waiting = select(submission.c.domain, submission.c.token).where(submission.c.state.in_(("queued", "verifying", "quarantined")))
_active = select(expert.c.domain, submission.c.token).join(submission).where(expert.c.status != "retired")
_domain_rows = select(domain.c.number, domain.c.state, domain.c.token, domain.c.expert)


def check_domains(c: Connection) -> int:
    """Each domain has one live lease, one submission or one expert, of its last token, as its state says; how many. Raises Damaged."""
    owners = {"leased": _live, "submitted": _waiting, "accepted": _active}
    found = {state: [(row["domain"], row["token"]) for row in c.all(statement)] for state, statement in owners.items()}
    rows = c.all(_domain_rows)
    for state, pairs in found.items():
        also = "quarantined" if state == "submitted" else state
        wanted = sorted((row["number"], row["token"]) for row in rows if row["state"] in (state, also))
        if sorted(pairs) != wanted:
            raise Damaged(f"domains and tokens {wanted} are {state!r}, and there are {sorted(pairs)}: restore the hub from a backup")
    return len(rows)


def _domains(hub: Hub) -> str:
    return f"{hub.read(check_domains)} domains agree with leases, submissions and experts"


def _snapshots(hub: Hub) -> str:
    def look(c: Connection) -> int:
        parent, rows = None, c.all(select(snapshot).order_by(snapshot.c.version))
        for number, row in enumerate(rows):
            body = signing.open_signed(Signed.model_validate_json(row["signed"]), Snapshot, signing.public(hub.office.key))
            if (body.version, body.parent) != (number, parent):
                raise Damaged(f"snapshot {row['version']} does not follow the one before it: restore the hub from a backup")
            parent = signing.digest(body)
        return len(rows)

    return f"{hub.read(look)} snapshots, signed, each naming the one before"


def _blobs(hub: Hub) -> str:
    names = hub.read(lambda c: [row["sha"] for row in c.all(select(blob.c.sha))])
    if bad := [sha for sha in names if not hub.blobs.check(sha)]:
        raise Damaged(f"{len(bad)} of {len(names)} blobs are missing or damaged, first {bad[0][:12]}: copy them from a backup")
    return f"{len(names)} blobs match their digests"
