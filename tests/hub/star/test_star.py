"""A star with real machines over HTTP: it trains, its chain is computed again to the same bytes, and what is sent is accounted for."""

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file
from star_world import STEPS, VERSIONS, all_take_part, new_world, serving

from elmwood.hub.app import create_app
from elmwood.hub.star.app import create_app as star_app
from elmwood.hub.star.home import check_chain, seed_of
from elmwood.hub.star.judging import judge_with_losses
from elmwood.records import Version
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


def test_machines_keep_what_was_left_out_and_nothing_else(run):
    world = run[0]
    for machine in world.machines:
        folder = next((machine.store.root / "star").iterdir())
        error = load_file(folder / "error.safetensors")
        largest = max(float(np.abs(value).max()) for value in error.values())
        assert 0 < largest < 1e-3  # int8 leaves half a step of each block
        assert not list(folder.glob("whole-*")) + list(folder.glob("sent-*"))
        assert len(list(folder.glob("versions/blobs/sha256/*/*"))) == 1  # of the weights of all versions
