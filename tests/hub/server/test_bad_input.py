"""What is wrong is refused with problem+json: a code, what is kept, what helps; never a traceback, never a path."""

import base64
import gzip
import json
import os
import pickle
import zipfile
from io import BytesIO

import numpy as np
import pytest

from elmwood.hub.actions import leases
from elmwood.hub.messages import Limits, Terms
from tests.hub.server.people import Person
from tests.hub.server.world import TENSORS, adapter, keys

# the same code on both kinds of hub; all of it on the second one too costs minutes, so that is asked for: `make hubs`
BOTH = ["embedded", *(["postgres and s3"] if os.environ.get("ELMWOOD_BOTH_HUBS") else [])]
pytestmark = pytest.mark.parametrize("make_hub", BOTH, indirect=True)


def problem(reply, status: int, code: str) -> dict:
    """The body of a refusal, which has all its fields."""
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/problem+json"), reply.text
    body = reply.json()
    assert body["code"] == code, body
    assert {"code", "detail", "kept", "do", "retryable"} <= set(body)
    assert body["detail"]
    for word in ("Traceback", "/tmp/", ".py", "sqlite", "site-packages"):
        assert word not in reply.text
    return body


@pytest.fixture
def member(client):
    return Person(client).enter()


def test_signatures(hub, client, member):
    body = problem(member.post("/v1/leases", {"tier": "cpu", "boot_id": "b007b007"}, late=400), 401, "bad-signature")
    assert abs(body["fields"]["time"] - hub.moment().unix) < 60
    problem(client.post("/v1/leases", json={"tier": "cpu", "boot_id": "b007b007"}), 401, "bad-signature")
    problem(Person(client).post("/v1/leases", {"tier": "cpu", "boot_id": "b007b007"}), 403, "unknown-key")


def test_a_request_that_is_sent_again_is_refused_and_changes_nothing(hub, client, member):
    grant, kept = member.claim().json(), {}

    class Keep:
        @staticmethod
        def request(method, target, **more):
            kept.update(method=method, url=target, **more)
            return client.request(method, target, **more)

    member.client = Keep
    member.beat(grant, 5)
    member.client = client
    assert member.beat(grant, 6).status_code == 200
    before = hub.read(lambda c: dict(c.one(leases.lease.select())))
    problem(client.request(**kept), 401, "replayed")
    assert hub.read(lambda c: dict(c.one(leases.lease.select()))) == before


@pytest.mark.parametrize(
    ("body", "field"),
    [(b"{", ""), (b"[1]", ""), (b'{"tier":"cpu"}', "boot_id"), (b'{"tier":"cpu","boot_id":"b007b007","more":1}', "more"),
     (b'{"tier":"huge","boot_id":"b007b007"}', "tier"), (b"[" * 100_000, ""), (b'{"tier":"cpu","boot_id":"../../etc"}', "boot_id")],
)  # fmt: skip
def test_bodies(client, member, body, field):
    reply = member.ask("POST", "/v1/leases", body, headers={"Content-Type": "application/json"})
    assert reply.status_code in (400, 422)
    assert field in problem(reply, reply.status_code, "bad-fields" if reply.status_code == 422 else "bad-body")["detail"]


def test_sizes_and_encodings(client, member):
    headers = {"Content-Type": "application/json"}
    problem(member.ask("POST", "/v1/leases", b" " * (1 << 20) + b"{}", headers=headers), 413, "too-large")
    problem(client.post("/v1/leases", content=b"{}", headers={"Content-Length": str(10 << 30)}), 413, "too-large")
    packed = gzip.compress(b"0" * (100 << 20))
    problem(member.ask("POST", "/v1/leases", packed, headers=headers | {"Content-Encoding": "gzip"}), 415, "encoded")


@pytest.mark.parametrize(
    "target", ["/v1/leases/../../etc/beat", "/v1/blobs/..%2f..%2fetc", "/v1/nothing", "/v1/records/zz", "/v1/submissions/1"]
)
def test_targets(client, target):
    assert client.get(target).status_code in (404, 405, 422)
    assert client.get(target).headers["content-type"] == "application/problem+json"


def test_stale_tokens_and_strange_leases(hub, client, member):
    grant = member.claim().json()
    problem(member.beat(grant | {"token": 2}, status=None), 409, "stale-token")
    problem(Person(client).enter().beat(grant, status=None), 404, "no-lease")
    problem(member.beat(grant | {"lease": "0" * 32}, status=None), 404, "no-lease")


def test_a_stale_holder_is_refused_and_the_new_one_is_not_touched(make_hub, started):
    """The first holder falls silent, the second gets the domain; then the first wakes up (21, H1)."""
    hub = make_hub(1, terms=Terms(beat_s=1, progress_s=5))
    client = started(hub)
    first, second = Person(client).enter(), Person(client).enter()
    grant = first.claim().json()
    hub.clock._uptime += 4
    hub.tick()
    other = second.claim().json()
    assert other["token"] == grant["token"] + 1
    for reply in (first.beat(grant, 99, status=None), first.promise(grant, adapter(1), status=None)):
        assert reply.status_code in (409, 410)
    problem(first.beat(grant, 99, status=None), 409, "stale-token")
    assert second.beat(other, 1).json()["alive"]


def test_beats_without_progress_end_a_lease(make_hub, started):
    hub = make_hub(1, terms=Terms(beat_s=1, progress_s=5))
    client = started(hub)
    first, second = Person(client).enter(), Person(client).enter()
    grant = first.claim().json()
    for _ in range(6):
        hub.clock._uptime += 1
        first.beat(grant, 0, status=None)
        hub.tick()
    assert first.beat(grant, 0, status=None).status_code == 410
    assert second.claim().json()["token"] == 2
    problem(first.beat(grant, 1, status=None), 409, "stale-token")


def test_uploads(make_hub, started):
    hub = make_hub(1, limits=Limits(chunk_bytes=100))
    member = Person(started(hub)).enter()
    grant, data = member.claim().json(), adapter(1)
    target = f"/v1/uploads/{member.begin(grant, len(data))}"
    member.part(target, 0, data[:100], status=204)
    reply = member.part(target, 50, data[50:100])
    assert problem(reply, 409, "wrong-offset")["fields"]["offset"] == 100
    assert reply.headers["Upload-Offset"] == "100"
    problem(member.part(target, 100, data[100:200], checksum="AAAA"), 460, "checksum")
    problem(member.part(target, 100, data[100:300]), 413, "too-large")
    assert member.ask("HEAD", target).headers["Upload-Offset"] == "100"
    for at in range(100, len(data), 100):
        member.part(target, at, data[at : at + 100], status=204)
    member.promise(grant, data)
    member.post("/v1/submissions", member.submission(grant, data, target.rpartition("/")[2]), status=202)
    for name, status, code in ((b"\0\0\0", 422, "bad-metadata"), (b"0" * 32, 404, "no-lease")):
        about = f"lease {base64.b64encode(name).decode()},token MQ=="
        problem(member.ask("POST", "/v1/uploads", b"", headers={"Upload-Length": "10", "Upload-Metadata": about}), status, code)
    problem(member.post("/v1/appeals", {"submission": "0" * 32, "text": "a\0b"}), 422, "bad-fields")


def archive() -> bytes:
    made = BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("../../x", "y")
    return made.getvalue()


NOT_FINITE = adapter(1, a=np.full(TENSORS["a"], np.nan, np.float32))
FILES = [
    (pickle.dumps({"a": 1}) * 9, 415, "not-safetensors"),
    (archive(), 415, "not-safetensors"),
    (b"GGUF" + bytes(60), 415, "not-safetensors"),
    (adapter(1, more=np.ones(2, np.float32)), 422, "wrong-tensors"),
    (adapter(1, a=np.ones((8, 4), np.float32)), 422, "wrong-tensors"),
    (adapter(1, a=np.ones(TENSORS["a"], np.float16)), 422, "wrong-tensors"),
    (NOT_FINITE, 422, "not-finite"),
]


@pytest.mark.parametrize(("data", "status", "code"), FILES)
def test_files_that_are_no_adapters(client, member, data, status, code):
    grant = member.claim().json()
    body = problem(member.give(grant, data, status=None), status, code)
    assert body["kept"] == "your lease"
    assert member.beat(grant, 1).json()["alive"]


def test_what_was_not_promised_or_uploaded_is_not_taken(client, member):
    grant, data = member.claim().json(), adapter(1)
    upload = member.upload(grant, data)
    problem(member.post("/v1/submissions", member.submission(grant, data, upload)), 409, "not-committed")
    problem(member.post("/v1/submissions", member.submission(grant, adapter(2), upload)), 409, "not-uploaded")


def test_limits_name_when_to_come_back(make_hub, started):
    member = Person(started(make_hub(1, limits=Limits(requests_per_minute=5)))).enter()
    replies = [member.post("/v1/leases", {"tier": "8", "boot_id": "b007b007"}) for _ in range(6)]
    assert (replies[0].status_code, replies[0].headers["Elmwood-Reason"]) == (204, "too-small")
    problem(replies[-1], 429, "too-many")
    assert float(replies[-1].headers["Retry-After"]) >= 1


def test_a_blocked_key_is_refused_on_every_route_and_its_domain_is_free(hub, client, member):
    """H10: while it uploads."""
    grant, data = member.claim().json(), adapter(1)
    target = f"/v1/uploads/{member.begin(grant, len(data))}"
    Person(client, keys(hub)["admin"]).post(f"/v1/devices/{member.public}/block", {"reason": "asked to"}, status=200)
    for reply in (
        member.part(target, 0, data), member.beat(grant, status=None), member.post("/v1/leases", {"tier": "cpu", "boot_id": "b007b007"}),
        member.promise(grant, data, status=None), member.post("/v1/submissions", member.submission(grant, data, "0" * 32)),
    ):  # fmt: skip
        problem(reply, 403, "blocked")
    assert client.get("/v1/domains").json()[grant["domain"]]["state"] == "open"


def test_an_erased_name_is_gone_and_the_chain_holds(hub, client, member):
    """H8."""
    member.post(f"/v1/accounts/{member.account}/erase", status=200)
    assert all(row["name"] != "somebody" for row in client.get("/v1/members").json())
    from elmwood.hub import events

    assert hub.read(events.check_log) > 0
    assert "somebody" not in json.dumps(client.get("/v1/events?many=1000").json())


def test_an_old_client_is_told_to_upgrade(client, member, hub):
    from elmwood.hub.rules import older_client

    assert older_client("0.9.3", "0.10") and not older_client("1.0.dev1", "1.0") and not older_client("2", "1.9")  # noqa: PT018
