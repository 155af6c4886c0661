"""The engine for any LM: echo, generation and the table give one number, cancelled requests end, candidates are forced and excluded."""

import threading

import pytest

from elmwood.ensemble.batch.interface import Busy, Ended, Limits, Request, Said
from elmwood.ensemble.batch.turns import Turns
from elmwood.ensemble.generate import generate
from elmwood.ensemble.guide import Guide
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput

ROUTED = {"top_k": 2, "seed_distance": 0.9}
KINDS = {
    "seed": lambda house: house.seed,
    "expert": lambda house: house.experts[2],
    "centroid": lambda house: house.ensemble(**ROUTED),
    "live": lambda house: house.ensemble(router="live", temperature=0.5, **ROUTED),
    "bounded": lambda house: house.ensemble(bounded=(house.experts[0].digest,), aggregation="median", **ROUTED),
    "weights": lambda house: house.ensemble(house.experts[:2], mixing="weights", block=8, top_k=2),
}


class Heard:
    """The events of a request."""

    def __init__(self, engine, request, after=None):
        self.events, self.ended, self.after = [], threading.Event(), after
        self.engine, self.told = engine, threading.Event()
        self.number = engine.submit(request, self)
        self.told.set()

    def __call__(self, event):
        self.events.append(event)
        if len(self.events) == self.after:
            assert self.told.wait(30)
            self.engine.cancel(self.number)
        if isinstance(event, Ended):
            self.ended.set()

    def wait(self):
        assert self.ended.wait(60)
        return [event for event in self.events if isinstance(event, Said)], self.events[-1]


@pytest.fixture
def opened(request, house):
    engine = Turns(open_model(KINDS[request.param](house), house.store))
    yield engine
    engine.close()


@pytest.mark.parametrize("opened", KINDS, indirect=True)
def test_echo_generation_and_table_say_one_number(opened, house):
    tokens = tuple(house.tokens[:24])
    table = opened.lm.score([tokens])[0].tolist()[1:]
    plain = Heard(opened, Request(tokens, 0, echo=True))
    full = Heard(opened, Request(tokens, 6, echo=True, logprobs=3, temperature=0.7, rng_seed=5))
    assert [said.logprob for said in plain.wait()[0]] == pytest.approx(table, abs=1e-5)
    assert plain.events[-1] == Ended("length")
    said, ended = full.wait()
    prompt, made = [one for one in said if one.prompt], [one for one in said if not one.prompt]
    assert [one.token for one in prompt] == list(tokens[1:])
    assert [one.logprob for one in prompt] == pytest.approx(table, abs=1e-5)
    for one in said:
        assert [value for _, value in one.top] == sorted((value for _, value in one.top), reverse=True)
        assert sum(one.weights.values()) == pytest.approx(1)
        assert set(one.weights) <= {*opened.experts, "seed"}
    steps = list(generate(opened.lm, house.tokenizer, tokens, max_tokens=6, temperature=0.7, rng_seed=5))
    assert [(one.token, one.logprob) for one in made] == [(step.token, pytest.approx(step.logprob, abs=1e-5)) for step in steps]
    assert [one.stop for one in made] == [step.token in opened.stops for step in steps]
    assert ended.reason == ("stop" if made[-1].stop else "length")


@pytest.mark.parametrize("opened", ["centroid"], indirect=True)
def test_a_request_can_be_cancelled_at_each_token(opened, house):
    for after in range(1, 8):
        said, ended = Heard(opened, Request(tuple(house.tokens[:9]), 40, stops=frozenset()), after).wait()
        assert (len(said), ended.reason) == (after, "cancelled")
    opened.cancel(10**6)
    counts = opened.counts()
    assert (counts.waiting, counts.running, counts.rows) == (0, 0, 0)


@pytest.mark.parametrize("opened", ["centroid", "bounded", "weights"], indirect=True)
def test_candidates_are_forced_and_excluded(opened, house):
    tokens = tuple(house.tokens[:16])
    first, second = opened.experts[:2]

    def table(**words):
        said, _ = Heard(opened, Request(tokens, 0, echo=True, logprobs=1, **words)).wait()
        return [one.logprob for one in said], set().union(*(one.weights for one in said))

    store = house.store
    alone, used = table(only=(second,))
    assert used == {second}
    if second not in getattr(opened.lm, "bounded", ()) and not hasattr(opened.lm, "aggregate"):
        assert alone == pytest.approx(open_model(store.load(second), store).score([tokens])[0, 1:].tolist(), abs=1e-5)
    assert table(only=("seed",))[0] == pytest.approx(open_model(house.seed, store).score([tokens])[0, 1:].tolist(), abs=1e-5)
    assert first not in table(without=(first,))[1]
    assert table(only=opened.experts[:2])[1] <= {first, second}
    for wrong in ({"only": ("nobody",)}, {"only": (first,), "without": (first,)}):
        with pytest.raises(BadInput):
            opened.submit(Request(tokens, 1, **wrong), print)


@pytest.mark.parametrize("opened", ["seed"], indirect=True)
def test_what_cannot_be_read_is_refused(opened, house):
    fits = tuple(house.tokens[:4])
    for wrong in (
        Request((), 1), Request(fits * 16, 1), Request((10**6,), 1), Request((-1,), 1), Request(fits, 1, temperature=-1.0),
        Request(fits, 1, top_p=0.0), Request(fits, -1), Request(fits * 17, 0, echo=True),
    ):  # fmt: skip
        with pytest.raises(BadInput):
            opened.submit(wrong, print)
    said, ended = Heard(opened, Request(fits * 15, 1000, stops=frozenset())).wait()
    assert (len(said), ended.reason) == (opened.context - 60, "length")
    said, _ = Heard(opened, Request((*fits * 16, 1), 0, echo=True)).wait()
    assert len(said) == opened.context


def test_the_queue_is_bounded_and_an_engine_drains(house):
    engine = Turns(open_model(house.seed, house.store), Limits(queue=2, running=1))
    request, blocked, free = Request((0, 1, 2), 8, stops=frozenset()), threading.Event(), threading.Event()

    def hold(event):
        blocked.set()
        assert free.wait(60)

    engine.submit(request, hold)
    assert blocked.wait(60)
    waiting = [Heard(engine, request) for _ in range(2)]
    with pytest.raises(Busy, match="wait already"):
        engine.submit(request, print)
    assert engine.counts().waiting == 2
    free.set()
    engine.close(drain_s=60)
    assert [heard.wait()[1].reason for heard in waiting] == ["length", "length"]
    with pytest.raises(Busy, match="closes"):
        engine.submit(request, print)


def test_the_guide_weighs_as_the_engine_does(house):
    ensemble = house.ensemble(**ROUTED)
    guide, lm = Guide(ensemble, house.store), open_model(ensemble, house.store)
    places, (_, text) = guide.look(house.tokens), lm.extend(house.tokens, lm.start())
    assert {place.name: place.weight for place in places if place.weight} == pytest.approx(dict(text.shares))
    assert len(places) == 4
    assert [place.weight for place in places] == sorted((place.weight for place in places), reverse=True)
    assert all(place.domain is not None for place in places if place.digest != "seed")
