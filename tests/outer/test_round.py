"""The rules of a star, by hand and as a state machine: whatever machines do, every granted token ends exactly once."""

import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elmwood.outer import round
from elmwood.outer.gates import WRONGS
from elmwood.outer.round import Refused, Ruling, State, Terms, Wait, Worker
from elmwood.outer.step import OUTER
from elmwood.records import Recipe, Star, Version

SEED = "1" * 64
STAR = Star(
    name="s", seed=SEED, corpus="2" * 64, recipe=Recipe(steps=400, batch=2, length=8), steps=10, parts=5, form="int8", outer=OUTER
)  # fmt: skip
TERMS = Terms(least=2, grace_s=20, beat_s=10, progress_s=100)
KEYS = [f"ed25519:{n:064x}" for n in range(6)]
SIZE = 100


def blob(text):
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def new(keys=KEYS):
    return State(head="3" * 64, workers={key: Worker(name=key[-1]) for key in keys})


def upload(state, key, id, content=""):
    state = round.begin_upload(state, key, id, SIZE, SIZE)
    return round.keep_part(state, key, id, 0, SIZE, blob(content or id))


def offer(state, key, id, now=0.0):
    state = upload(state, key, id)
    return round.propose(state, STAR, key, id, state.grants[id].base, blob(id))


def version_of(state, fates, how="mean"):
    both = tuple(sorted((*fates, *state.doors), key=lambda fate: fate.proposal))
    return Version(star=STAR.digest, number=state.number + 1, parent=state.head, weights=blob(f"{state.number}"), how=how, fates=both,
                   lost=state.lost)  # fmt: skip


def decided(state, rulings=None, guilty=()):
    fates = round.fates(state, {one.id: (rulings or {}).get(one.id, Ruling()) for one in round.round_of(state)})
    return round.decide(state, version_of(state, fates), 1.0, guilty), {fate.proposal: fate for fate in fates}


def test_a_round():
    state, ids = new(), {}
    for key in KEYS[:3]:
        state, held = round.grant(state, STAR, TERMS, key, 0.0)
        ids[key] = held.id
        assert round.grant(state, STAR, TERMS, key, 1.0)[1] == held  # asked again: the same
    assert len({held.part for held in state.grants.values()}) == 3
    state = offer(state, KEYS[0], ids[KEYS[0]])
    assert round.grant(state, STAR, TERMS, KEYS[0], 2.0)[1] == Wait("decided-soon")
    assert not round.close(state, STAR, TERMS, 2.0).closing
    state = offer(state, KEYS[1], ids[KEYS[1]])
    state = round.close(state, STAR, TERMS, 3.0)  # the quorum is there
    assert not round.close(state, STAR, TERMS, 22.9).closing
    state = round.close(state, STAR, TERMS, 23.0)
    assert state.closing == (ids[KEYS[0]], ids[KEYS[1]])
    state = offer(state, KEYS[2], ids[KEYS[2]])  # too late for this round
    state, fates = decided(state, {ids[KEYS[1]]: Ruling("harm")})
    assert [fate.code for fate in fates.values()] == ["", "harm"]
    assert (state.number, state.applied, state.rejected) == (1, STAR.tokens, {"harm": STAR.tokens})
    assert state.workers[KEYS[1]].probation == round.QUARANTINE
    state, held = round.grant(state, STAR, TERMS, KEYS[4], 30.0)  # a newcomer
    assert isinstance(held, round.Grant)
    assert (held.base, state.workers[KEYS[4]].probation) == (1, 1)
    state = round.close(offer(state, KEYS[4], held.id), STAR, TERMS, 31.0)  # nobody else is at work: no grace
    assert len(state.closing) == 2
    state, fates = decided(state)
    assert [(fate.base, fate.code) for fate in fates.values()] == [(0, ""), (1, "probation")]
    assert state.workers[KEYS[4]].probation == 0


def test_what_is_not_allowed_changes_nothing():
    state, held = round.grant(new(), STAR, TERMS, KEYS[0], 0.0)
    for code, call in {
        "unknown-key": lambda: round.grant(state, STAR, TERMS, "ed25519:" + "f" * 64, 0.0),
        "no-grant": lambda: round.beat(state, TERMS, KEYS[1], held.id, 1, 0.0),
        "form": lambda: round.begin_upload(state, KEYS[0], held.id, SIZE + 1, SIZE),
        "offset": lambda: round.keep_part(state, KEYS[0], held.id, 0, 1),
        "no-upload": lambda: round.propose(state, STAR, KEYS[0], held.id, 0, blob("other")),
        "wrong-version": lambda: round.decide(state, Version(star=STAR.digest, number=2, weights=blob("")), 1.0),
    }.items():
        with pytest.raises(Refused) as refused:
            call()
        assert refused.value.code == code


def test_a_wrong_base_is_never_merged():
    """T7: it ends at the door, and the next version says so."""
    state, held = round.grant(new(), STAR, TERMS, KEYS[0], 0.0)
    state = round.propose(upload(state, KEYS[0], held.id), STAR, KEYS[0], held.id, 1, blob(held.id))
    assert (state.pending, state.grants, state.rejected) == ((), {}, {"wrong-base": STAR.tokens})
    assert state.doors[0].code == "wrong-base"


def test_text_of_a_machine_that_is_gone_is_granted_again():
    state, held = round.grant(new(), STAR, TERMS, KEYS[0], 0.0)
    state = round.beat(state, TERMS, KEYS[0], held.id, 1, 29.0)
    assert round.expire(state, 59.0) == state
    sending = round.moved(state, TERMS, KEYS[0], held.id, 99.0)  # a part of its upload came: as good as a step
    assert round.expire(sending, 129.0) == sending
    assert not round.expire(sending, 129.1).grants
    gone = round.expire(state, 59.1)
    assert (gone.grants, gone.lost, gone.gone) == ({}, STAR.tokens, STAR.tokens)
    for at in range(0, 200, 10):  # beats without a further step
        state = round.beat(state, TERMS, KEYS[0], held.id, 1, float(at)) if state.grants else state
        state = round.expire(state, float(at))
    assert not state.grants
    assert held.first in [round.grant(gone, STAR, TERMS, KEYS[1], 60.0)[1].first]


class Machines(RuleBasedStateMachine):
    """Machines that take, beat, offer, vanish, lie about their base; a coordinator that decides as a judge says."""

    @initialize()
    def begin(self):
        self.state, self.now = new(), 0.0
        self.heads, self.applied, self.ended = [self.state.head], set(), {}
        self.slices = {}

    def held(self, key):
        return next((one for one in self.state.grants.values() if one.key == key), None)

    @rule(seconds=st.sampled_from([0.5, 5, 25, 40, 120]))
    def wait(self, seconds):
        self.now += seconds
        before = self.state
        self.state = round.expire(self.state, self.now)
        for id in before.grants.keys() - self.state.grants.keys():
            self.end(id, "lost")

    def end(self, id, how):
        assert id not in self.ended
        self.ended[id] = how

    @rule(key=st.sampled_from(KEYS))
    def take(self, key):
        self.state, made = round.grant(self.state, STAR, TERMS, key, self.now)
        if not isinstance(made, Wait):
            self.slices[made.id] = (made.part, made.first)
            assert made.id not in self.ended

    @rule(key=st.sampled_from(KEYS), step=st.integers(0, 10))
    def beat(self, key, step):
        if held := self.held(key):
            self.state = round.beat(self.state, TERMS, key, held.id, step, self.now)

    @rule(key=st.sampled_from(KEYS), lie=st.sampled_from([0, 0, 0, 1]))
    def propose(self, key, lie):
        if held := self.held(key):
            state = upload(self.state, key, held.id)
            before = len(state.doors)
            self.state = round.propose(state, STAR, key, held.id, held.base + lie, blob(held.id))
            for fate in self.state.doors[before:]:
                self.end(fate.proposal, fate.code)
            again = round.propose(self.state, STAR, key, held.id, held.base, blob(held.id)) if not lie and held.id in {
                one.id for one in self.state.pending} else self.state  # fmt: skip
            assert again == self.state

    @rule(key=st.sampled_from(KEYS))
    def leave(self, key):
        if held := self.held(key):
            self.state = round.give_back(self.state, key, held.id)
            self.end(held.id, "lost")

    @rule()
    def close(self):
        before = len(self.state.doors)
        self.state = round.close(self.state, STAR, TERMS, self.now)
        for fate in self.state.doors[before:]:
            self.end(fate.proposal, fate.code)

    @precondition(lambda self: self.state.closing)
    @rule(data=st.data())
    def decide(self, data):
        codes = {one.id: data.draw(st.sampled_from(["", "", "", *WRONGS])) for one in round.round_of(self.state)}
        doors = self.state.doors
        after, fates = decided(self.state, {id: Ruling(code) for id, code in codes.items()})
        for id, fate in fates.items():
            self.end(id, fate.code or "applied")
            if fate.fate == "applied":
                assert id not in self.applied
                assert self.state.number - fate.base <= STAR.outer.most_stale
                self.applied.add(id)
        assert all(fate.proposal in self.ended for fate in doors)
        self.state = after
        self.heads.append(after.head)

    @invariant()
    def every_token_ends_once(self):
        state = self.state
        open_now = sum(one.tokens for one in state.unended)
        assert state.granted == open_now + state.applied + sum(state.rejected.values()) + state.gone
        assert state.applied == STAR.tokens * len(self.applied)
        assert state.gone == STAR.tokens * sum(how == "lost" for how in self.ended.values())
        assert len(self.ended) + len(state.unended) == state.counted

    @invariant()
    def slices_are_disjoint(self):
        live = [self.slices[one.id] for one in self.state.unended] + [self.slices[id] for id, how in self.ended.items() if how != "lost"]
        assert len(set(live)) == len(live)

    @invariant()
    def one_chain(self):
        assert len(set(self.heads)) == len(self.heads) == self.state.number + 1


Machines.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestMachines = Machines.TestCase
