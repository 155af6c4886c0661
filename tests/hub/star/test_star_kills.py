"""The coordinator of a star is killed at any step, stands still while another takes over, or is told lies: the chain is one."""

import numpy as np
import pytest
from sqlalchemy import select

from benches.star.kills import TERMS, keys, kills, new_star, offer, open_home
from elmwood.hub.star.home import Home
from elmwood.hub.star.keeper import Deposed, leader
from elmwood.outer import round
from elmwood.store import Store


def test_killed_at_any_step_it_makes_one_chain(tmp_path):
    """T1: a few of the 300 of benches/star/kills.py."""
    found = kills(tmp_path, 10)
    assert found["versions"] > 2
    assert found["replayed"] == found["versions"] + 1


def test_killed_on_postgresql_it_makes_one_chain(tmp_path, new_database):
    found = kills(tmp_path, 4, database=new_database)
    assert found["replayed"] == found["versions"] + 1 > 1


def test_a_leader_that_stood_still_is_refused(tmp_path):
    """T2: while it was stopped past its lead another took over; when it wakes, nothing that it writes is kept, also of a decision."""
    store, now = Store(tmp_path), [1000.0]
    star = new_star(store)
    first = Home(star, store, TERMS, keys(2), clock=lambda: now[0], hold=10, holder="first")
    for key in keys(2):
        offer(first, key, first.write(lambda state, at, key=key: round.grant(state, star, TERMS, key, at)).id)
    with pytest.raises(Deposed, match="first"):
        Home(star, store, TERMS, keys(2), clock=lambda: now[0], hold=10, holder="second")
    stopped = []

    def stop(place):
        """In the middle of a decision, past its lead."""
        if place == "stepped" and not stopped:
            stopped.append(place)
            now[0] += 11
            second = Home(star, store, TERMS, keys(2), clock=lambda: now[0], hold=10, holder="second")
            assert second.tick()
            stopped.append(second.keeper.read())
            second.keeper.database.close()

    first.at = stop
    with pytest.raises(Deposed, match="epoch 1, now is 2"):
        first.tick()
    assert first.keeper.read() == stopped[1]
    assert first.keeper.read().number == 1 == len(first.keeper.chain()) - 1
    now[0] += 11  # nobody leads: its own lead is over all the same
    with pytest.raises(Deposed):
        first.keeper.renew()
    first.close()


def test_a_lead_without_a_sign_of_life_ends(tmp_path):
    store, now = Store(tmp_path), [0.0]
    home = Home(new_star(store), store, TERMS, keys(2), clock=lambda: now[0], hold=10, holder="one")
    now[0] = 9.0
    home.keeper.renew()
    now[0] = 18.0
    home.keeper.renew()
    now[0] = 28.1
    with pytest.raises(Deposed, match="no sign of life"):
        home.tick()
    assert home.keeper.lead() == 2
    assert not home.tick()
    home.close()
    assert home.keeper.epoch == 2
    row = open_home(home.star, store, 2)
    assert row.keeper.database.read(lambda c: c.value(select(leader.c.epoch))) == 3
    row.close()


def test_what_was_sent_is_not_published(tmp_path):
    """Deltas and held-out text stay with the coordinator."""
    home = open_home(new_star(Store(tmp_path)), Store(tmp_path), 2)
    for key in keys(2):
        offer(home, key, home.write(lambda state, at, key=key: round.grant(state, home.star, TERMS, key, at)).id)
    deltas = [one.blob for one in home.keeper.read().pending]
    assert home.tick()
    assert not home.public & set(deltas)
    assert home.version().weights in home.public
    assert np.isfinite(home.keeper.read().norm)
    home.close()


def test_what_was_applied_is_not_applied_again_under_another_name(tmp_path):
    """Also by a process that was started since."""
    store = Store(tmp_path)
    star, drawn = new_star(store), None
    for _ in range(2):
        home = open_home(star, store, 3)
        held = [home.write(lambda state, at, key=key: round.grant(state, star, TERMS, key, at)).id for key in keys(3)]
        for key, id in zip(keys(3), held, strict=True):
            offer(home, key, id, drawn if id == held[1] else None)
        assert home.tick()
        drawn = held[0]
        fates = home.version().fates
        home.close()
    assert [fate.code for fate in fates] == ["", "copy", ""]
