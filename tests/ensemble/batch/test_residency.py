"""Slots and the schedule: laws, without a model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from elmwood.ensemble.batch.residency import Residency
from elmwood.ensemble.batch.schedule import OVERTAKEN, Job, Room, admit, divide

DIGESTS = st.sampled_from("abcdefgh")


class Residents(RuleBasedStateMachine):
    """Experts come and go in three places and two slots; `memory` and `numbers` hold what places and slots hold."""

    def __init__(self):
        super().__init__()
        self.now = Residency(places=3, slots=2)
        self.queue, self.memory, self.numbers, self.seats = [], {}, {}, []

    @rule(digest=DIGESTS)
    def want(self, digest):
        known = set(self.now.place)
        state = self.now.want(digest, lambda name, place: self.queue.append((name, place)))
        if state == "full":
            assert all(one in self.now.loading or self.now.pins.get(one) for one in self.now.place)
        gone = known - set(self.now.place)
        assert not any(one in self.now.pins or one in self.now.loading for one in gone)

    @rule(digest=DIGESTS)
    def want_soon(self, digest):
        known = dict(self.now.place)
        self.now.early(digest, lambda name, place: self.queue.append((name, place)))
        assert known.items() <= self.now.place.items(), "nobody is evicted for it"

    @precondition(lambda self: self.queue)
    @rule(refused=st.booleans())
    def load(self, refused):
        digest, place = self.queue.pop(0)
        assert self.now.place[digest] == place, "a place is never given away while it is loading"
        self.memory[place] = digest
        self.now.loaded(digest, "damaged" if refused else "")

    @rule(digest=DIGESTS)
    def sit(self, digest):
        if digest not in self.now.place or digest in self.now.loading:
            return
        self.now.pin(digest)
        seat = self.now.seat(digest)
        if seat is None:
            self.now.unpin(digest)
            assert len({one.slot for one in self.seats}) == 2
            return
        if seat.fresh:
            self.numbers[seat.slot] = self.memory[self.now.place[digest]]
        self.seats.append(seat)

    @precondition(lambda self: self.seats)
    @rule(data=st.data())
    def rise(self, data):
        seat = self.seats.pop(data.draw(st.integers(0, len(self.seats) - 1)))
        self.now.leave(seat)
        self.now.unpin(seat.digest)

    @invariant()
    def who_sits_has_the_numbers_of_its_own_expert(self):
        for seat in self.seats:
            assert self.now.holds(seat)
            assert self.numbers[seat.slot] == seat.digest
        assert len(set(self.now.place.values())) == len(self.now.place)
        assert sorted([*self.now.free, *self.now.place.values()]) == [0, 1, 2]
        assert not set(self.now.refused) & set(self.now.place)


TestResidents = Residents.TestCase
TestResidents.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_slot_that_went_to_another_is_told_apart():
    now = Residency(places=2, slots=1)
    for digest in "ab":
        now.want(digest, lambda *_: None)
        now.loaded(digest)
    first = now.seat("a")
    now.leave(first)
    second = now.seat("b")
    assert (first.slot, second.slot) == (0, 0)
    assert (now.holds(first), now.holds(second)) == (False, True)
    now.leave(second)
    third = now.seat("a")
    assert not now.holds(first), "the same expert in the same slot again is another generation"
    assert third.fresh


@given(left=st.lists(st.integers(0, 50), max_size=8), budget=st.integers(0, 100))
def test_a_budget_is_divided_fairly(left, budget):
    share = divide(left, budget)
    assert sum(share) == min(budget, sum(left))
    assert all(0 <= one <= most for one, most in zip(share, left, strict=True))
    short = [one for one, most in zip(share, left, strict=True) if one < most]
    assert not short or max(share, default=0) <= min(short) + 1, "nobody has more than one who wanted more"


JOBS = st.lists(st.tuples(st.sets(DIGESTS, max_size=3), st.integers(1, 3), st.integers(1, 100), st.integers(0, OVERTAKEN)), max_size=8).map(
    lambda jobs: [Job(n, frozenset(experts), rows, tokens, overtaken) for n, (experts, rows, tokens, overtaken) in enumerate(jobs)]
)


@given(jobs=JOBS, room=st.builds(Room, *[st.integers(0, n) for n in (5, 8, 200, 4)], st.sets(DIGESTS, max_size=2).map(frozenset)))
def test_who_is_admitted_fits_and_nobody_starves(jobs, room):
    chosen = [jobs[n] for n in admit(jobs, room)]
    assert len(chosen) <= room.requests
    assert sum(job.rows for job in chosen) <= room.rows
    assert sum(job.tokens for job in chosen) <= room.tokens
    assert len(frozenset().union(*(job.experts for job in chosen)) - room.seated) <= room.slots
    assert [job.number for job in chosen] == sorted(job.number for job in chosen)
    tired = next((job.number for job in jobs if job.overtaken == OVERTAKEN and job not in chosen), None)
    assert tired is None or all(job.number < tired for job in chosen)


@pytest.mark.parametrize("waiting", [1, 5])
def test_in_an_empty_house_the_first_begins(waiting):
    jobs = [Job(n, frozenset("ab"), 2, 10) for n in range(waiting)]
    assert admit(jobs, Room(2, 4, 100, 2, frozenset())) == [0, 1][:waiting]
