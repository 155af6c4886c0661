"""What comes down from a hub is checked before it is named; what goes up to a model hub is what its interface takes."""

import inspect
import os
from contextlib import closing

import pytest
from huggingface_hub import HfApi
from live_hub import draft, live_hub
from small_run import RECIPE, changed
from test_volunteer import AGREED, verify

from elmwood.errors import BadInput, Damaged
from elmwood.hub.actions import experts
from elmwood.hub.client.gate import WEIGHTS
from elmwood.hub.client.http import Hub
from elmwood.hub.client.join import join, train_grant
from elmwood.hub.client.pull import fetch_snapshot, mirror, pull
from elmwood.hub.client.state import open_folder
from elmwood.hub.client.transfer import fetch_blob
from elmwood.hub.messages import RunManifest
from elmwood.hub.signing import Forged, open_signed
from elmwood.records import Expert, Forest, Merged
from elmwood.store import Store
from elmwood.study.merging import merge


@pytest.fixture(scope="module")
def filled(run, tmp_path_factory):
    """A hub with two experts, trained by one volunteer."""
    folder = tmp_path_factory.mktemp("filled")
    with live_hub(draft(run, RECIPE), run.store, "filled") as live:
        for _ in range(2):
            found = join(live.url, Store(folder / "volunteer"), options=AGREED, sleep=lambda seconds: verify(live, folder))
            assert [one.state for one in found] == ["accepted"]
        yield live, folder


def test_a_merge_of_what_was_pulled_and_a_retired_expert_is_gone_from_the_next(filled, tmp_path):
    live, _ = filled
    mine = Store(tmp_path / "user")
    first = pull(live.url, mine, name="shared")
    merge(["shared/expert/"], store=mine, method="average", name="merged")
    assert len(mine.load("merged", Merged).contributions) == 2
    gone = first.snapshot.experts[0]
    retire(live, gone.expert)
    second = pull(live.url, mine, name="shared")
    assert second.snapshot.version > first.snapshot.version
    assert f"shared/expert/{gone.domain}" not in mine.names()
    assert gone.expert not in mine.load("shared/forest", Forest).experts
    assert len(pull(live.url, mine, name="before", version=first.snapshot.version).snapshot.experts) == 2


def retire(live, expert):
    live.hub.write(lambda c, when: experts.retire_all(c, [expert], "other", when, live.hub.office))


def test_bytes_that_are_not_their_digest_are_fetched_again_and_then_refused(filled, tmp_path):
    live, _ = filled
    mine = Store(tmp_path / "user")
    with closing(Hub(live.url)) as hub:
        damage_and_fetch(live, hub, mine)


def damage_and_fetch(live, hub, mine):
    manifest_blob = live.signed.body["licences"]["data"]
    path = Store(live.hub.home.store).path(manifest_blob)
    whole = path.read_bytes()
    path.chmod(0o644)
    try:
        path.write_bytes(whole[:-1] + b"!")
        with pytest.raises(Damaged, match="2 times"):
            fetch_blob(manifest_blob, hub, mine)
    finally:
        path.write_bytes(whole)
    part = mine.work(f"fetch-{manifest_blob[7:39]}") / "part"
    part.write_bytes(whole[:5])  # of a fetch that was cut
    assert fetch_blob(manifest_blob, hub, mine).read_bytes() == whole


def test_a_snapshot_of_another_key_or_an_older_one_is_refused(filled, tmp_path):
    live, _ = filled
    mine = Store(tmp_path / "user")
    pulled = pull(live.url, mine)
    place, manifest = open_folder(live.url, mine), open_signed(live.signed, RunManifest)
    with closing(Hub(live.url)) as hub:
        with pytest.raises(Forged):
            fetch_snapshot(hub, manifest.model_copy(update={"hub_key": manifest.root_key}), place)
        place.change(snapshot=pulled.snapshot.version + 1)
        with pytest.raises(BadInput, match="rolled back"):
            fetch_snapshot(hub, manifest, place)


class Recorded:
    """Calls that HfApi would take."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(**given):
            inspect.signature(getattr(HfApi, name)).bind(None, **given)
            self.calls.append((name, given, sorted(os.listdir(given["folder_path"])) if "folder_path" in given else []))

        return call


def test_a_mirror_has_a_repository_for_each_expert_with_its_card(filled, tmp_path):
    live, _ = filled
    mine, api = Store(tmp_path / "user"), Recorded()
    pulled = pull(live.url, mine)
    made = mirror(f"{pulled.name}/ensemble", "someone", mine, api=api)
    assert [one.record for one in made] == list(mine.load(pulled.ensemble.forest, Forest).experts)
    assert [name for name, _, _ in api.calls] == ["create_repo", "upload_folder"] * len(made)
    assert all(given["private"] for name, given, _ in api.calls if name == "create_repo")
    for name, _, found in api.calls:
        if name == "upload_folder":
            assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(found)


# ---- text of one's own, pauses, liars -------------------------------------------------------------------------------


def test_text_of_ones_own_trains_a_domain_that_comes_without(run, tmp_path):
    from topics import SENTENCES, some_sentences

    folder = tmp_path / "mine"
    folder.mkdir()
    for n, text in enumerate(some_sentences(SENTENCES, 30, 16, ("abcdef", "ghijkl", "mnopqr"))):
        if n % 3 == 1:
            (folder / f"{n}.txt").write_text(text)
    with live_hub(draft(run, RECIPE, with_text=False), run.store, "without") as live:
        store = Store(tmp_path / "volunteer")
        options = AGREED._replace(text=(str(folder),))
        (found,) = join(live.url, store, options=options, sleep=lambda seconds: verify(live, tmp_path))
        assert found.state == "accepted"
        expert = live.hub.read(lambda c: c.value(_record(found.expert)))
        assert Expert.model_validate_json(expert).data == ()  # the hub knows of no text
        none, told = [], []
        none = join(live.url, Store(tmp_path / "other"), options=AGREED._replace(until_full=True), tell=told.append)
        assert none == []
        assert told[-1].phase == "idle"


def _record(digest):
    from sqlalchemy import select

    from elmwood.hub.tables import record

    return select(record.c.body).where(record.c.digest == digest)


def test_a_pause_that_was_asked_for_ends_when_it_is_taken_back(run, tmp_path):
    with live_hub(draft(run, RECIPE), run.store, "paused") as live:
        store, told = Store(tmp_path / "volunteer"), []
        place = open_folder(live.url, store)

        def tell(one):
            told.append(one.phase)
            if one.phase == "training" and one.step == 5 and "paused" not in told:
                place.paused.touch()

        def sleep(seconds):
            (lease,) = live.hub.read(lambda c: c.all(_leases()))
            if place.paused.exists():
                assert lease["state"] == "paused"
                place.paused.unlink()
            else:
                verify(live, tmp_path)

        (found,) = join(live.url, store, options=AGREED, tell=tell, sleep=sleep)
        assert told.count("paused") == 1
        assert found.state == "accepted"


def _leases():
    from sqlalchemy import select

    from elmwood.hub.tables import lease

    return select(lease.c.state)


def test_a_liar_is_refused_with_the_reason_and_the_domain_opens_again(run, tmp_path):
    def backwards(grant, fetched, folder, on_step):
        honest = train_grant(grant, fetched, folder, on_step)
        expert = run.experts[0].model_copy(update={"files": {**run.experts[0].files, WEIGHTS: run.store.put(honest)}})
        return run.store.get(changed(expert, run.store, lambda name, a, b: (a, -b)).files[WEIGHTS])

    with live_hub(draft(run, RECIPE, domains=(0,)), run.store, "liar") as live:
        told = []
        (found,) = join(live.url, Store(tmp_path / "liar"), options=AGREED, train=backwards, tell=told.append,
                        sleep=lambda seconds: verify(live, tmp_path))  # fmt: skip
        assert (found.state, found.code, found.credit) == ("rejected", "no-gain", 0)
        assert "FAILED" in told[-1].text
        assert "train all steps" in told[-1].text
        (found,) = join(live.url, Store(tmp_path / "honest"), options=AGREED, sleep=lambda seconds: verify(live, tmp_path))
        assert (found.state, found.domain) == ("accepted", 0)
        assert found.credit > 0
