"""Backup while members write, restore, migration between databases, doctor, retirement by hand."""

import threading
from pathlib import Path

import pytest
from sqlalchemy import select, update

from elmwood.errors import BadInput
from elmwood.hub import care, events
from elmwood.hub.database import Database
from elmwood.hub.home import Clock, Home, Hub
from elmwood.hub.tables import blob, credit, metadata, snapshot
from elmwood.store import Store
from tests.hub.server.people import Person
from tests.hub.server.world import adapter, keys


def grow(hub, client, count: int = 2) -> None:
    """Some accepted experts."""
    verifier = Person(client, keys(hub)["verifier"])
    for number in range(count):
        member = Person(client).enter(f"member {number}")
        member.give(member.claim().json(), adapter(number))
        verifier.verify()


def rows(database: Database) -> dict:
    return {
        table.name: sorted(tuple(dict(row).values()) for row in database.read(lambda c, table=table: c.all(select(table))))
        for table in metadata.sorted_tables
    }


def bad(hub) -> list[str]:
    return [one.what for one in care.doctor(hub) if not one.good]


def test_a_backup_made_under_load_is_a_whole_hub(hub, started, tmp_path):
    client = started(hub)
    grow(hub, client)
    ended = threading.Event()
    people = [Person(client).enter() for _ in range(2)]

    def write():
        while not ended.is_set():
            for one in people:
                reply = one.post("/v1/leases", {"tier": "cpu", "boot_id": "b007b007"})
                if reply.status_code == 201:
                    one.post(f"/v1/leases/{reply.json()['lease']}/release", {"token": reply.json()["token"]})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        care.backup(hub, tmp_path / "backup")
    finally:
        ended.set()
        writer.join()
    copy = Hub(Home("test", Store(tmp_path / "backup")))
    try:
        assert bad(copy) == []
        assert care.status(copy)["experts"] == {"probation": 2}
        assert copy.read(lambda c: c.one(select(snapshot).order_by(snapshot.c.version.desc()))["signed"]) == hub.read(
            lambda c: c.one(select(snapshot).order_by(snapshot.c.version.desc()))["signed"]
        )
    finally:
        copy.close()
    with pytest.raises(BadInput, match="new folder"):
        care.backup(hub, tmp_path / "backup")


def test_a_hub_moves_to_postgresql_and_back_with_every_row(tmp_path, new_database, started, monkeypatch):
    from tests.hub.server.world import open_run

    hub = open_run(tmp_path / "store")
    grow(hub, started(hub))
    before, back = rows(hub.database), f"sqlite:///{tmp_path}/back.sqlite"
    care.copy_database(hub.database.url, new_database)
    care.copy_database(new_database, back)
    for url in (new_database, back):
        database = Database(url)
        assert rows(database) == before
        assert database.read(events.check_log) == hub.read(events.check_log)
        database.close()
    with pytest.raises(BadInput, match="empty"):
        care.copy_database(hub.database.url, back)
    moved = Hub(hub.home, database=new_database)
    assert bad(moved) == []
    assert care.retire(moved, hub.read(lambda c: c.value(select(care.expert.c.digest)))[:12], "regression", True) > 2
    moved.close()
    hub.close()


def test_a_retired_domain_is_open_at_once(hub, client):
    """Whatever the clock of the process says that retires: it may be ahead of the server's until the next tick."""
    grow(hub, client)
    gone, place = hub.read(lambda c: [*dict(c.one(select(care.expert.c.digest, care.expert.c.domain).limit(1))).values()])
    ahead = Hub(hub.home, database=hub.database.url)
    ahead.clock.tick(hub.clock.now() + 60)
    care.retire(ahead, gone)
    ahead.close()
    assert Person(client).enter("another").claim(domains=[place]).json()["domain"] == place


def test_doctor_names_what_is_wrong(hub, client):
    grow(hub, client)
    assert bad(hub) == []
    if hub.blobs.folder:
        sha = hub.read(lambda c: c.value(select(blob.c.sha).where(blob.c.secret == 0)))
        path = Path(hub.blobs.folder) / "sha256" / sha[:2] / sha[2:]
        content = path.read_bytes()
        path.write_bytes(content + b"x")
        assert bad(hub) == ["blobs"]
        path.write_bytes(content)
    hub.database.write(lambda c: c.run(update(credit).where(credit.c.number == 2).values(number=7)))
    assert bad(hub) == ["ledger"]


def test_the_clock_counts_uptime_and_no_standstill():
    """H2, H6: while the hub is down or stopped, no time passes for anybody."""
    now = [100.0]
    clock = Clock(50.0, lambda: now[0])
    now[0] += 4
    assert clock.now() == 54
    assert clock.tick() == 54
    now[0] += 7200  # SIGSTOP for two hours
    assert clock.now() == 64
    assert clock.tick() == 64
    assert clock.tick(known=80.0) == 80  # another process of this hub counted on
