"""The verbs of a star that need no torch: a plan, keys, and the chain that a coordinator left."""

import json

import pytest
from typer.testing import CliRunner

from benches.star.kills import keys, new_star, offer, open_home
from elmwood import cli
from elmwood.cli.star import _named
from elmwood.errors import BadInput, UnknownName
from elmwood.hub.star.home import seed_of
from elmwood.outer import round
from elmwood.records import Star, Version
from elmwood.store import Store


def run(*words):
    found = CliRunner().invoke(cli.app, ["star", *words], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_a_star_is_planned_checked_and_taken(tmp_path):
    store = Store(tmp_path)
    star = new_star(store)
    at = ("--store", str(tmp_path))
    plan = json.loads(run("plan", "sea", "--seed", star.seed, "--corpus", star.corpus, "--tokens", "4000", "--steps", "3", "--json", *at))
    made = store.load("sea/star", Star)
    assert plan["digest"] == made.digest
    assert (made.recipe.length, made.recipe.steps % 3, made.tokens) == (8, 0, 3 * 8 * 8)
    home = open_home(made, store, 2)
    for key in keys(2):
        offer(home, key, home.write(lambda state, now, key=key: round.grant(state, made, home.terms, key, now)).id)
    assert home.tick()
    version = home.version()
    home.close()
    checked = json.loads(run("check", "sea", "--json", *at))
    assert [(one["number"], one["good"]) for one in checked] == [(0, True), (1, True)]
    run("take", "sea", "--name", "base-1", *at)
    assert store.load("base-1") == seed_of(made, version, store) == store.load("sea/newest")
    digits = json.loads(run("key", "--json", *at))["key"]
    assert run("key", *at).strip() == digits
    assert _named([f"anna={digits}"]) == {f"ed25519:{digits}": "anna"}


def test_a_changed_chain_is_seen(tmp_path):
    """A version that claims other weights than its proposals give."""
    from elmwood.hub.star.home import check_chain

    store = Store(tmp_path)
    star = new_star(store)
    home = open_home(star, store, 2)
    for key in keys(2):
        offer(home, key, home.write(lambda state, now, key=key: round.grant(state, star, home.terms, key, now)).id)
    home.tick()
    first, second = (store.load(digest, Version) for digest in home.keeper.chain())
    home.close()
    forged = second.model_copy(update={"weights": first.weights})
    store.add(forged)
    assert [one.good for one in check_chain(star, [first.digest, forged.digest], store)] == [True, False]


def test_what_is_wrong_is_said(tmp_path):
    store = Store(tmp_path)
    star = new_star(store)
    with pytest.raises(BadInput, match="NAME=KEY"):
        _named(["anna=12"])
    with pytest.raises(BadInput, match="--steps"):
        run("plan", "sea", "--seed", star.seed, "--corpus", star.corpus, "--tokens", "100", "--store", str(tmp_path))
    store.name("sea/star", store.add(star.model_copy(update={"name": "sea"})))
    with pytest.raises(UnknownName, match="begins it"):
        run("check", "sea", "--store", str(tmp_path))
