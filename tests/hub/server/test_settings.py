"""Settings of a run do what they say, and the schema is what its history makes."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from sqlalchemy import create_engine, inspect, select
from starlette.testclient import TestClient
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

import elmwood.hub
from elmwood.hub.api.asked import network
from elmwood.hub.app import create_app
from elmwood.hub.database import Database
from elmwood.hub.messages import Gate, Limits, RunDomain, RunManifest, Terms, Tier
from elmwood.hub.migrations import revision, upgrade
from elmwood.hub.tables import domain, lease, metadata
from tests.hub.server import services
from tests.hub.server.people import Person
from tests.hub.server.world import open_run

HUB = Path(elmwood.hub.__file__).parent


@pytest.mark.parametrize("kind", [RunManifest, RunDomain, Tier, Gate, Terms, Limits], ids=lambda kind: kind.__name__)
def test_every_setting_of_a_run_is_read(kind: type[BaseModel]):
    code = "\n".join(path.read_text() for path in HUB.rglob("*.py") if "messages" not in path.parts)
    assert not [name for name in kind.model_fields if not re.search(rf'\.{name}\b|"{name}"', code)]


# ---- where claims come from


def test_leases_of_one_address_are_counted_as_a_trusted_proxy_gives_it(tmp_path):
    hub = open_run(tmp_path, 4, limits=Limits(leases_per_address=1, accounts_per_hour=100))
    hub.start = lambda: None
    try:
        with TestClient(ProxyHeadersMiddleware(create_app(hub), "127.0.0.1"), client=("127.0.0.1", 50000)) as proxy:
            people = [Person(proxy).enter() for _ in range(4)]

            def claim(person, address, status):
                body = {"tier": "cpu", "boot_id": "b007b007"}
                return person.post("/v1/leases", body, headers={"X-Forwarded-For": address}, status=status).json()

            first = claim(people[0], "203.0.113.7", 201)
            assert claim(people[1], "203.0.113.7", 409)["code"] == "limit"
            assert claim(people[0], "203.0.113.7", 201)["lease"] == first["lease"]  # the one it holds
            claim(people[1], "203.0.113.8", 201)
            claim(people[2], "2001:db8:1:2::3", 201)
            assert claim(people[3], "2001:db8:1:2:ffff::4", 409)["code"] == "limit"
            people[0].post(f"/v1/leases/{first['lease']}/release", {"token": first["token"]}, status=200)
            claim(people[3], "203.0.113.7", 201)
        kept = hub.read(lambda c: [row["address"] for row in c.all(select(lease.c.address))])
        assert len(set(kept)) == 3
        assert all(re.fullmatch("[0-9a-f]{64}", one) for one in kept)  # no address
    finally:
        hub.close()


@pytest.mark.parametrize(
    ("host", "found"),
    [("192.0.2.1", "192.0.2.1"), ("2001:db8:1:2::3", "2001:db8:1:2::/64"), ("fe80::1%eth0", "fe80::/64"), ("testclient", "testclient")],
)
def test_an_ipv6_address_counts_as_its_network(host, found):
    class Asked:
        class client:
            pass

    Asked.client.host = host
    assert network(Asked) == found


# ---- the schema


def shape(url: str) -> dict:
    """Tables, columns, keys and indexes, without their order."""
    engine = create_engine(url)
    try:
        look = inspect(engine)
        found = {}
        for name in sorted(set(look.get_table_names()) - {"alembic_version"}):
            columns = {one["name"]: (str(one["type"]), one["nullable"]) for one in look.get_columns(name)}
            foreign = sorted(
                (one["constrained_columns"], one["referred_table"], one["referred_columns"]) for one in look.get_foreign_keys(name)
            )
            unique = sorted(one["column_names"] for one in look.get_unique_constraints(name))
            indexes = sorted((one["name"], one["column_names"], bool(one["unique"])) for one in look.get_indexes(name))
            found[name] = columns, look.get_pk_constraint(name)["constrained_columns"], foreign, unique, indexes
        if url.startswith("sqlite"):
            with engine.connect() as connection:
                rows = connection.exec_driver_sql("PRAGMA table_list").mappings()
                found["without rowid"] = sorted(row["name"] for row in rows if row["wr"])
        return found
    finally:
        engine.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def two_databases(request, tmp_path):
    """URLs of two empty databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/one.sqlite", f"sqlite:///{tmp_path}/other.sqlite"
    server = request.getfixturevalue("postgres")
    return tuple(services.create_database(server, f"shape{number}") for number in range(2))


def test_the_migrations_make_the_tables(two_databases):
    migrated, made = two_databases
    upgrade(migrated)
    engine = create_engine(made)
    metadata.create_all(engine)
    engine.dispose()
    assert shape(migrated) == shape(made)


def test_a_database_of_the_first_revision_is_brought_up_with_its_rows(tmp_path):
    url = f"sqlite:///{tmp_path}/hub.sqlite"
    upgrade(url, "0001")
    assert revision(url) == "0001"
    database = Database(url)
    old = {"id": "l", "domain": 0, "token": 1, "key": "k", "account": "a", "boot_id": "b", "tier": "cpu", "rng_seed": 1, "manifest": 1}
    old |= {"state": "running", "step": 0, "phase": "training", "device": "{}", "at": 0}
    old |= dict.fromkeys(("due", "beat_due", "progress_due", "final_due", "pause_left"), 1.0)
    place = {"number": 0, "name": "d", "terms": "[]", "shards": "[]", "has_text": 1, "tokens": 0, "state": "leased", "token": 1}

    def fill(c):
        c.insert(domain, open_at=0.0, **place)
        c.insert(lease, **old)

    try:
        database.write(fill)
        upgrade(url)
        (row,) = database.read(lambda c: [dict(row) for row in c.all(select(lease))])
    finally:
        database.close()
    assert {name: row[name] for name in old} == old
    assert row["address"] is None
