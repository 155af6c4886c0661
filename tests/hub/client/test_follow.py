"""A server follows a hub: a newer snapshot is served within one look, no request is dropped, and what is not right is refused."""

import json
import threading
from contextlib import closing

import httpx
import pytest
from live_hub import draft, live_hub
from small_run import RECIPE
from sqlalchemy import delete, select, update
from test_volunteer import AGREED, verify

from elmwood.hub.actions import experts
from elmwood.hub.client.gate import WEIGHTS
from elmwood.hub.client.http import Hub
from elmwood.hub.client.join import join
from elmwood.hub.client.pull import Following
from elmwood.hub.signing import load_key, sign
from elmwood.hub.tables import snapshot
from elmwood.serve.app import create_app
from elmwood.serve.live import Source
from elmwood.serve.model import open_served
from elmwood.store import Store
from tests.serve.conftest import start
from tests.serve.test_serve_cancel import Paced


@pytest.fixture(scope="module")
def live(run, tmp_path_factory):
    """A hub whose experts come one by one, by a volunteer who has them ready."""
    folder = tmp_path_factory.mktemp("followed")
    with live_hub(draft(run, RECIPE), run.store, "followed") as found:
        found.more = lambda: join(
            found.url, Store(folder / "volunteer"), options=AGREED, sleep=lambda seconds: verify(found, folder),
            train=lambda grant, fetched, work, step: run.store.get(run.experts[grant.domain].files[WEIGHTS]),
        )  # fmt: skip
        yield found


class Watched:
    """A server that follows a hub, and looks when it is told to."""

    def __init__(self, live, store):
        self.following = Following(live.url, store)
        first = self.following.begin()
        served = open_served(first, store, name=self.following.model)
        served.engine = self.engine = Paced(served.engine)
        source = Source(self.following.newest, lambda found, like: open_served(found, store, like=like, name=like.name), 3600.0, first)
        self.app = create_app(served, source=source)
        self.running = start(self.app, 5)
        self.address, self.follower, self.live = self.running.address, self.app.state.follower, self.app.state.live

    def complete(self, **more):
        body = {"prompt": "abc", "max_tokens": 12, "temperature": 0} | more
        return httpx.post(f"{self.address}/v1/completions", json=body, trust_env=False, timeout=60).json()

    def metric(self, name):
        text = httpx.get(f"{self.address}/metrics", trust_env=False).text
        return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))

    def close(self):
        self.engine.go.set()
        self.running.server.should_exit = True
        self.running.thread.join()


@pytest.fixture(scope="module")
def watched(live, tmp_path_factory):
    with closing(Watched(live, Store(tmp_path_factory.mktemp("server") / "store"))) as found:
        yield found


def test_a_hub_without_experts_is_served_by_its_seed(live, tmp_path):
    """They appear as they are admitted."""
    with closing(Watched(live, Store(tmp_path / "store"))) as first:
        assert not first.live.now.cards
        (choice,) = first.complete(elmwood={"provenance": True})["choices"]
        assert choice["elmwood"]["experts"] == [{"id": "seed", "name": "seed", "weight": 1}]
        route = httpx.post(f"{first.address}/v1/route", json={"prompt": "abc"}, trust_env=False).json()
        assert [(one["id"], one["weight"]) for one in route["candidates"]] == [("seed", 1.0)]
        live.more()
        assert first.follower.look()
        assert len(first.live.now.cards) == 1


def test_a_newer_snapshot_is_served_while_a_request_streams_and_the_stream_ends_with_the_old_one(live, watched):
    before, old = watched.complete(), watched.live.now
    assert not watched.follower.look(), "nothing is new"
    watched.engine.at(3)
    parts = []

    def read():
        wish = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{watched.address}/v1/completions", json=wish, trust_env=False, timeout=60) as reply:
            parts.extend(json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {"))

    reader = threading.Thread(target=read)
    reader.start()
    assert watched.engine.reached.wait(60)
    live.more()
    assert watched.follower.look()
    new = watched.live.now
    assert len(new.cards) == len(old.cards) + 1
    after = watched.complete()
    assert watched.metric("elmwood_engines") == 2
    watched.engine.go.set()
    reader.join(60)
    assert "".join(part["choices"][0]["text"] for part in parts) == before["choices"][0]["text"], "every token of it"
    assert parts[-1]["choices"][0]["finish_reason"] == before["choices"][0]["finish_reason"]
    assert {part["system_fingerprint"] for part in parts} == {before["system_fingerprint"]} == {old.fingerprint}
    assert after["system_fingerprint"] == new.fingerprint != old.fingerprint
    with watched.live._changed:
        assert watched.live._changed.wait_for(lambda: watched.live.engines == 1, 60), "the old one is closed"
    assert not old.engine.counts().open
    weights = [next(one.engine.weights.model.parameters()).data_ptr() for one in (old, new)]
    assert weights[0] == weights[1], "the seed is in memory once"
    assert watched.metric("elmwood_adoptions_total") == 1
    assert httpx.get(f"{watched.address}/readyz", trust_env=False).json()["model"] == new.record.digest


def newest(live):
    return live.hub.read(lambda c: experts.newest(c))


def snapshots(live):
    return live.hub.read(lambda c: c.all(select(snapshot).order_by(snapshot.c.version)))


def put_back(live, rows):
    def write(c, when):
        c.run(delete(snapshot))
        for row in rows:
            c.insert(snapshot, **row)

    live.hub.write(write)


@pytest.mark.parametrize("fault", ["signature", "rolled back", "rewritten"])
def test_a_snapshot_that_is_not_right_is_refused_and_the_old_one_serves_on(live, watched, fault):
    rows, served = snapshots(live), watched.live.now.fingerprint
    body = json.loads(rows[-1]["signed"])["body"]

    def write(c, when):
        if fault == "rolled back":
            return c.run(delete(snapshot).where(snapshot.c.version == rows[-1]["version"]))
        key = load_key(live.hub.home.key_path("admin" if fault == "signature" else "hub"))
        changed = experts.Snapshot.model_validate(body | {"parent": "0" * 64})
        return c.run(update(snapshot).where(snapshot.c.version == rows[-1]["version"]).values(signed=sign(changed, key).model_dump_json()))

    live.hub.write(write)
    failures = watched.metric("elmwood_adoption_failures_total")
    try:
        assert not watched.follower.look()
    finally:
        put_back(live, rows)
    assert watched.metric("elmwood_adoption_failures_total") == failures + 1
    said = {"signature": "only", "rolled back": "rolled back", "rewritten": "history was rewritten"}[fault]
    assert said in watched.live.adopted.trouble
    assert watched.complete()["system_fingerprint"] == served
    assert not watched.follower.look()
    assert not watched.live.adopted.trouble


def test_damaged_bytes_are_refused_until_they_are_whole(live, watched):
    live.more()
    (added,) = {one["expert"] for one in json.loads(newest(live)["signed"])["body"]["experts"]} - set(watched.live.now.cards)
    path = Store(live.hub.home.store).path(f"sha256:{adapter_of(live, added)}")
    whole, count = path.read_bytes(), len(watched.live.now.cards)
    path.chmod(0o644)
    path.write_bytes(whole[: len(whole) // 2] + b"!" + whole[len(whole) // 2 + 1 :])
    try:
        assert not watched.follower.look()
        assert "other bytes than its digest" in watched.live.adopted.trouble
    finally:
        path.write_bytes(whole)
    assert len(watched.live.now.cards) == count
    assert watched.follower.look()
    assert added in watched.live.now.cards


def adapter_of(live, digest):
    from elmwood.hub.tables import submission

    return live.hub.read(lambda c: c.value(select(submission.c.adapter).where(submission.c.expert == digest)))


def test_many_snapshots_later_the_chain_leads_back(live, watched):
    """Two snapshots between two looks; a question without news is answered with 304."""
    members = list(watched.live.now.cards)
    for digest in members[:2]:
        live.hub.write(lambda c, when, one=digest: experts.retire_all(c, [one], "other", when, live.hub.office))
    assert watched.follower.look()
    assert set(watched.live.now.cards) == set(members[2:])
    with closing(Hub(live.url)) as hub:
        assert hub.get("/v1/snapshot", **{"If-None-Match": watched.following.tag}).status == 304


def test_a_server_starts_with_the_last_snapshot_while_the_hub_is_away(watched):
    again = Following(watched.following.url, watched.following.store)
    again.url = "http://127.0.0.1:9"  # nothing listens there
    told = []
    assert again.begin(tell=told.append) == watched.live.now.record.digest
    assert "cannot be reached" in told[0]
