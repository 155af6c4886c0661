"""The whole way over HTTP: claim, beat, upload, submit, verify, snapshot, credit, retire."""

import hashlib
import json

from elmwood.hub import events
from elmwood.hub.messages import Signed, Snapshot
from elmwood.hub.signing import open_manifest, open_signed
from tests.hub.server.people import Person
from tests.hub.server.world import adapter, keys


def test_from_a_claim_to_a_snapshot_and_back(hub, client):
    manifest = open_manifest(Signed(**client.get("/v1/run").json()["manifest"]), hub.moment().unix)
    member, verifier, admin = Person(client).enter("Ada"), Person(client, keys(hub)["verifier"]), Person(client, keys(hub)["admin"])
    grant = member.claim().json()
    assert grant["token"] == 1
    assert grant["recipe"]["rng_seed"] == grant["recipe"]["rng_seed"]
    assert member.beat(grant, 3).json()["alive"]
    data = adapter(1)
    made = member.give(grant, data).json()
    assert made["state"] == "queued"
    blob = f"/v1/blobs/{hashlib.sha256(data).hexdigest()}"
    assert client.get(blob).status_code == 404
    assert verifier.ask("GET", blob).content == data
    assert verifier.verify().json() == {"state": "accepted", "snapshot": 1}
    assert client.get(blob).content == data
    state = client.get(f"/v1/submissions/{made['submission']}").json()
    assert (state["state"], state["credit"], state["checks"][0]["value"]) == ("accepted", 0.01, 0.01)
    signed = Signed(**client.get("/v1/snapshot").json())
    body = open_signed(signed, Snapshot, manifest.hub_key)
    assert [one.expert for one in body.experts] == [made["expert"]]
    for digest in (body.forest, body.ensemble, made["expert"], state["verdict"]):
        record = client.get(f"/v1/records/{digest}")
        assert hashlib.sha256(record.content).hexdigest() == digest
    assert client.get(f"/v1/records/{body.ensemble}").json()["bounded"] == [made["expert"]]  # it is on probation
    admin.post(f"/v1/experts/{made['expert']}/retire", {"reason": "regression", "compensate": True}, status=200)
    after = open_signed(Signed(**client.get("/v1/snapshot").json()), Snapshot, manifest.hub_key)
    first = open_signed(Signed(**client.get("/v1/snapshot?version=0").json()), Snapshot, manifest.hub_key)
    assert (after.forest, after.ensemble) == (first.forest, first.ensemble)  # as if it had never been there
    assert [line["amount"] for line in client.get("/v1/ledger").json()] == [0.01, -0.01]
    assert client.get("/v1/domains").json()[grant["domain"]]["state"] == "open"
    log = client.get("/v1/events?many=1000").json()
    assert events.check_chain(log)[0] == hub.read(events.check_log)
    assert "Ada" not in json.dumps(log)
