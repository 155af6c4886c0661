"""A star with real machines over HTTP: it trains, its chain is computed again to the same bytes, and what is sent is accounted for."""

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file
from star_world import STEPS, VERSIONS, all_take_part, new_world, serving

from elmwood.hub.app import create_app
from elmwood.hub.star import worker
from elmwood.hub.star.app import create_app as star_app
from elmwood.hub.star.home import check_chain, seed_of
from elmwood.hub.star.judging import judge_with_losses
from elmwood.hub.star.worker import fetch_base, opened
from elmwood.outer.settle import blobs_of
from elmwood.records import Version
from elmwood.store import Store, hash_file
from tests.hub.served import serve_app
from tests.hub.server.world import open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run of two machines, judged by losses."""
    world = new_world(tmp_path_factory.mktemp("star"))
    home = world.home(judge_with_losses(world.star, world.store))
    with serving(home) as url:
        ended = all_take_part(url, world.machines)
        state, chain = home.keeper.read(), home.keeper.chain()
    return world, ended, state, chain


def test_a_run_ends_with_every_token_accounted_for(run):
    world, ended, state, chain = run
    assert state.number == VERSIONS == len(chain) - 1
    assert state.granted == state.applied + sum(state.rejected.values()) + state.gone == 2 * VERSIONS * world.star.tokens
    assert [one.applied for one in ended] == [VERSIONS * world.star.tokens] * 2
    assert world.star.tokens == STEPS * 4 * 32


def test_the_chain_is_computed_again_to_the_same_bytes(run):
    world, _, _, chain = run
    found = check_chain(world.star, chain, world.store)
    assert [one.good for one in found] == [True] * (VERSIONS + 1)
    assert found[1].said == "mean of 2 of 2 proposals"
    versions = [world.store.load(digest, Version) for digest in chain]
    assert len({one.weights for one in versions}) == VERSIONS + 1
    for kind in ("weights", "velocity", "error", "step"):
        forged = versions[1].model_copy(update={kind: getattr(versions[2], kind)})
        world.store.add(forged)
        assert [one.good for one in check_chain(world.star, [chain[0], forged.digest], world.store)] == [True, False]


def test_the_newest_version_is_a_seed_with_a_lower_loss(run):
    world, _, _, chain = run
    newest = world.store.load(chain[-1], Version)
    seed = world.store.load("tiny/newest")
    assert seed == seed_of(world.star, newest, world.store)
    judge = judge_with_losses(world.star, world.store)
    from elmwood.outer.settle import Base

    first = world.store.load(chain[0], Version)
    before = judge(Base(first, world.store.get(first.weights), None))
    assert before.losses(world.store.get(newest.weights)).mean() < before.losses(world.store.get(first.weights)).mean() - 0.05


def test_a_star_stands_in_a_hubs_app(tmp_path):
    """At /star, beside the hub's own routes; what its machines sign has no /star in it."""
    hub, world = open_run(tmp_path / "hub", 3), new_world(tmp_path, versions=1)
    home, app = world.home(), create_app(hub)
    app.mount("/star", star_app(home))
    home.start()
    try:
        with serve_app(app) as url:
            ended = all_take_part(f"{url}/star", world.machines)
            assert httpx.get(f"{url}/readyz").json()["state"] == "ready"
    finally:
        home.close()
        hub.close()
    assert [one.applied for one in ended] == [world.star.tokens] * 2


def watch(machine):
    """What the machine of a test asks for, in the order it asks, without queries."""
    asked, stream = [], machine.hub.stream

    def watched(method, target, *rest, **options):
        asked.append(target)
        return stream(method, target, *rest, **options)

    machine.hub.stream = watched
    return asked


@pytest.fixture(scope="module")
def joined(run):
    """A machine that comes after the end of the run, and what it asks for."""
    world = run[0]
    with serving(world.home()) as url, opened(url, Store(world.store.root.parent / "late"), world.machines[0].key) as machine:
        yield machine, watch(machine)


@pytest.fixture
def late(run, joined):
    """The same with no version but the seed, and the versions."""
    machine, asked = joined
    asked.clear()
    for path in (machine.local.folder / "versions").glob("blobs/sha256/*/*"):
        path.unlink()
    return machine, asked, [run[0].store.load(digest, Version) for digest in run[3]]


def blobs_asked_for(asked):
    return ["sha256:" + target.rpartition("/")[2] for target in asked if target.startswith("/v1/blobs/")]


def test_whoever_has_an_earlier_version_fetches_steps(late):
    """About a byte of a parameter for each; then nothing, of a version that is here."""
    machine, asked, versions = late
    for number, behind in ((1, 1), (3, 2), (3, 0)):
        asked.clear()
        path = fetch_base(versions[number], machine)
        assert blobs_asked_for(asked) == [one.step for one in versions[number - behind + 1 : number + 1]]
        assert f"sha256:{hash_file(path)}" == versions[number].weights
        assert list((machine.local.folder / "versions").glob("blobs/sha256/*/*")) == [path]


def test_who_is_too_far_behind_fetches_whole_weights(late, monkeypatch):
    machine, asked, versions = late
    monkeypatch.setattr(worker, "FEWER", 2)
    path = fetch_base(versions[3], machine)
    assert blobs_asked_for(asked) == [versions[3].weights]
    assert f"sha256:{hash_file(path)}" == versions[3].weights


@pytest.mark.parametrize("damage", ["cut", "another", "not-finite"])
def test_a_step_that_gives_other_bytes_is_refused_and_the_weights_are_fetched_whole(damage, late, monkeypatch):
    machine, asked, versions = late
    fetch = worker.fetch_blob

    def damaged(blob, hub, store):
        path = fetch(blob, hub, store)
        if blob == versions[1].step:
            raw = bytearray(path.read_bytes())
            raw = {"cut": raw[:-1], "another": raw[:-4] + np.float32(0.5).tobytes(), "not-finite": raw[:-4] + b"\xff" * 4}[damage]
            path.write_bytes(raw)
        return path

    monkeypatch.setattr(worker, "fetch_blob", damaged)
    path = fetch_base(versions[1], machine)
    assert blobs_asked_for(asked) == [versions[1].step, versions[1].weights]
    assert f"sha256:{hash_file(path)}" == versions[1].weights


def test_a_version_of_which_nothing_was_merged_is_its_parent(late):
    """Where a round was undone there is no step, and nothing is fetched."""
    machine, asked, versions = late
    fetch_base(versions[2], machine)
    asked.clear()
    undone = Version(star=versions[2].star, number=3, parent=versions[2].digest, how="none", **blobs_of(versions[2], None, False))
    assert f"sha256:{hash_file(fetch_base(undone, machine))}" == versions[2].weights
    assert asked == []


def test_machines_keep_what_was_left_out_and_nothing_else(run):
    world = run[0]
    for machine in world.machines:
        folder = next((machine.store.root / "star").iterdir())
        error = load_file(folder / "error.safetensors")
        largest = max(float(np.abs(value).max()) for value in error.values())
        assert 0 < largest < 1e-3  # int8 leaves half a step of each block
        assert not list(folder.glob("whole-*")) + list(folder.glob("sent-*"))
        assert len(list(folder.glob("versions/blobs/sha256/*/*"))) == 1  # of the weights of all versions
