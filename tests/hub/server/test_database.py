"""The writer: groups, savepoints, order and readers beside it; the log and the ledger."""

import threading

import pytest
from sqlalchemy import func, select, update

from elmwood.errors import Damaged
from elmwood.hub import events
from elmwood.hub.actions.request import Moment, Request, perform
from elmwood.hub.database import Unavailable
from elmwood.hub.messages import Done
from elmwood.hub.migrations import revision, upgrade
from elmwood.hub.rules import Refusal
from elmwood.hub.tables import event, nonce

COUNT = select(func.count()).select_from(nonce)


def test_a_write_that_raises_is_undone_alone_and_the_others_of_its_group_stay(database):
    held = threading.Event()
    first = database.submit(lambda c: held.wait(10))  # the others wait together behind it

    def insert(number):
        def write(c):
            c.insert(nonce, key="k", nonce=str(number), expires=0)
            events.log(c, "test", str(number), 0)
            if number % 3 == 0:
                raise ValueError(number)
            return number

        return database.submit(write)

    futures = [insert(number) for number in range(10)]
    held.set()
    assert first.result()
    assert [future.exception() is None for future in futures] == [number % 3 != 0 for number in range(10)]
    assert database.read(lambda c: c.value(COUNT)) == 6
    assert database.read(events.check_log) == 6


def test_a_group_runs_once_unless_one_of_it_fails_after_a_change(database):
    ran, held = [], threading.Event()

    def ask(number, refuses=None):
        known = Request("k", f"{number:032x}", 0, "", "")

        def act(c, caller):
            ran.append(number)
            if refuses:
                c.insert(nonce, key="made", nonce=str(number), expires=0) if refuses == "late" else None
                raise Refusal(409, "no", "no")
            return Done()

        return lambda c: perform(c, known, act, Moment(0.0, 0.0), new=True)

    def group(*writes):
        held.clear()
        first = database.submit(lambda c: held.wait(10) and None)
        futures = [database.submit(one) for one in writes]
        held.set()
        assert first.result() is None
        return [type(future.result()).__name__ for future in futures]

    assert group(ask(0), ask(1, "early"), ask(2)) == ["Reply", "Refusal", "Reply"]
    assert ran == [0, 1, 2]
    assert group(ask(3), ask(4, "late"), ask(5)) == ["Reply", "Refusal", "Reply"]
    assert ran[3:] == [3, 4, 3, 4, 5]
    assert database.read(lambda c: c.value(COUNT)) == 6  # nonces of all, and nothing of what was refused
    assert group(ask(5)) == ["Refusal"]  # a replay


def test_a_reader_sees_what_was_durable_when_it_began_and_a_closed_database_takes_nothing(database):
    def both(c):
        before = c.value(COUNT)
        database.write(lambda w: w.insert(nonce, key="k", nonce="1", expires=0))
        return before, c.value(COUNT)

    assert database.read(both) == (0, 0)
    assert database.read(lambda c: c.value(COUNT)) == 1
    database.close()
    with pytest.raises(Unavailable):
        database.write(lambda c: None)


def test_the_chain_shows_every_change_and_every_gap(database):
    for number in range(5):
        database.write(lambda c, number=number: events.log(c, "lease.granted", f"subject-{number}", 7, token=number))
    rows = database.read(lambda c: [dict(row) for row in c.all(select(event).order_by(event.c.number))])
    assert events.check_chain(rows) == (5, rows[-1]["hash"])
    for place in range(5):
        changes = [{"facts": '{"token": 9}'}, {"subject": "other"}, {"at": 8}, {"kind": "x"}, {"number": 9}]
        for change in changes:
            with pytest.raises(Damaged, match="event"):
                events.check_chain([row | change if n == place else row for n, row in enumerate(rows)])
        if place < 4:
            with pytest.raises(Damaged):
                events.check_chain(rows[:place] + rows[place + 1 :])
    database.write(lambda c: c.run(update(event).where(event.c.number == 5).values(hash="0" * 64)))
    with pytest.raises(Damaged):
        database.read(events.check_log)


def test_an_upgraded_database_is_upgraded_again_without_a_change(database):
    upgrade(database.url)
    assert revision(database.url) == "0002"
