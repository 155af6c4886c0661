"""The engine of rows: the same numbers as an ensemble that reads one text at a time, whoever reads beside it."""

import threading

import pytest
from tiny_models import lora_expert

from elmwood.ensemble.batch.engine import open_batched
from elmwood.ensemble.batch.interface import Ended, Limits, Request, Said
from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import open_model

LIVE = {"router": "live", "top_k": 2, "temperature": 0.5, "seed_distance": 0.9}
KINDS = {
    "seed": lambda house: house.seed,
    "expert": lambda house: house.experts[0],
    "full": lambda house: house.experts[2],
    "centroid": lambda house: ensemble(house, top_k=2),
    "sparse": lambda house: ensemble(house, top_k=2, router="sparse", seed_distance=1.9),
    "live": lambda house: ensemble(house, **LIVE),
    "listed": lambda house: ensemble(house, **LIVE | {"top_k": 1}, every=8, shortlist=2, margin=0.02),
    "sticky": lambda house: ensemble(house, **LIVE | {"top_k": 1}, every=8, margin=0.1, far=1.4),
    "sure": lambda house: ensemble(house, **LIVE, memory=2.0, every=4, sure=0.6),
    "sure, by distance": lambda house: ensemble(house, top_k=2, temperature=0.05, seed_distance=0.9, every=4, sure=0.8),
    "posterior": lambda house: ensemble(house, top_k=4, router="posterior", temperature=4.0, seed_distance=0.5),
    "bounded": lambda house: ensemble(house, bounded=(house.experts[0].digest,), aggregation="median", top_k=2),
}
SIZES = (3, 20, 9, 31, 1, 14)  # tokens of prompts


def adapters(house):
    """Three adapters: the house's two, and one in the place of its full expert."""
    if not hasattr(house, "third"):
        house.third = lora_expert(house.seed, house.store, 2, domain=2, partition=house.partition.digest)
    return [*house.experts[:2], house.third]


def ensemble(house, **fields):
    return house.ensemble(adapters(house), **fields)


class Heard:
    """The events of a request; `then` is called with each."""

    def __init__(self, engine, request, then=None):
        self.events, self.ended, self.then, self.told = [], threading.Event(), then, threading.Event()
        self.number = engine.submit(request, self)
        self.told.set()

    def __call__(self, event):
        self.events.append(event)
        if self.then:
            assert self.told.wait(30)
            self.then(self)
        if isinstance(event, Ended):
            self.ended.set()

    def wait(self):
        assert self.ended.wait(120)
        return [event for event in self.events if isinstance(event, Said)], self.events[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_side_by_side_are_as_each_alone(kind, house, monkeypatch):
    monkeypatch.setattr("elmwood.domains.route.EARLY", 4)  # texts are short here
    record = KINDS[kind](house)
    lm, engine = open_model(record, house.store), open_batched(record, house.store)
    rule = {"temperature": 0.8, "stops": frozenset()}
    heard = [Heard(engine, Request(tuple(house.tokens[:size]), 10, rng_seed=size, echo=size == 14, **rule)) for size in SIZES]
    for size, one in zip(SIZES, heard, strict=True):
        said, ended = one.wait()
        steps = list(generate(lm, house.tokenizer, house.tokens[:size], max_tokens=10, rng_seed=size, **rule))
        made = [event for event in said if not event.prompt]
        assert [event.token for event in made] == [step.token for step in steps]
        assert [event.logprob for event in made] == pytest.approx([step.logprob for step in steps], abs=1e-5)
        assert [sorted(event.weights.values()) for event in made] == [
            pytest.approx(sorted(step.weights.values()), abs=1e-5) for step in steps
        ]
        assert ended == Ended("length")
        if size == 14:
            table = lm.score([house.tokens[:size]])[0, 1:].tolist()
            assert [event.logprob for event in said if event.prompt] == pytest.approx(table, abs=1e-5)
    counts = engine.counts()
    engine.close()
    assert (counts.mismatches, counts.failed) == (0, 0)
    assert engine.counts()[:4] == (0, 0, 0, 0.0)


def test_ten_experts_take_turns_in_three_slots(house):
    """S1: experts come and go while texts grow, each text is as it would be alone, and no slot is ever another's."""
    base = adapters(house)
    record = house.ensemble(twelve(house), top_k=1)
    lm, engine = open_model(record, house.store), open_batched(record, house.store, limits=Limits(slots=3, rows=8, running=6))
    texts = [(0, *house.tokenizer.encode(words).ids) for words in ("the captain", "def path", "le jardin")]
    chosen = [(text, (one.digest,)) for text in texts for one in record_experts(engine, house)[:6]]
    heard = [Heard(engine, Request(text, 6, 0.0, only=only, stops=frozenset())) for text, only in chosen]
    assert {one.wait()[1] for one in heard} == {Ended("length")}
    for (text, (digest,)), one in zip(chosen, heard, strict=True):
        alone = open_model(house.store.load(digest), house.store) if digest in {e.digest for e in base} else None
        if alone:
            steps = generate(alone, house.tokenizer, text, max_tokens=6, temperature=0, stops=frozenset())
            assert [event.token for event in one.wait()[0]] == [step.token for step in steps]
    counts = engine.counts()
    engine.close()
    assert counts.loads == 6
    assert (counts.mismatches, counts.failed, counts.resident) == (0, 0, 3)
    assert lm.stops == engine.stops


def twelve(house):
    """Adapters with digests of their own."""
    base = adapters(house)
    return [*base, *(house.add(one.model_copy(update={"contributor": str(n)})) for one in base for n in range(3))]


def test_texts_that_want_more_experts_than_there_are_slots_take_turns(house):
    """Their candidates change on the way, and one may have to make room for another; each is as it would be alone."""
    record = house.ensemble(twelve(house), router="live", top_k=2, temperature=0.5)
    lm, engine = open_model(record, house.store), open_batched(record, house.store, limits=Limits(slots=2, rows=7, running=3))
    texts = [house.tokens[:size] for size in (3, 12, 30)]
    heard = [Heard(engine, Request(tuple(text), 12, 0.0, stops=frozenset())) for text in texts]
    for text, one in zip(texts, heard, strict=True):
        said, ended = one.wait()
        steps = list(generate(lm, house.tokenizer, text, max_tokens=12, temperature=0, stops=frozenset()))
        assert [event.token for event in said] == [step.token for step in steps]
        assert [event.logprob for event in said] == pytest.approx([step.logprob for step in steps], abs=1e-5)
        assert ended == Ended("length")
    counts = engine.counts()
    engine.close()
    assert (counts.mismatches, counts.failed, counts.resident) == (0, 0, 2)


def record_experts(engine, house):
    return [house.store.load(digest) for digest in engine.experts]


def test_a_cancelled_request_leaves_nothing_behind(house):
    """S3: cancelled at any token, its rows and slots are free within a step."""
    engine = open_batched(ensemble(house, **LIVE), house.store)
    request = Request(tuple(house.tokens[:9]), 40, stops=frozenset())
    for after in range(1, 8):
        one = Heard(engine, request, lambda one, after=after: len(one.events) == after and engine.cancel(one.number))
        said, ended = one.wait()
        assert (len(said), ended) == (after, Ended("cancelled"))
        assert (engine.steps.running, engine.steps.residency.seated, len(engine.steps.free)) == ([], frozenset(), engine.limits.rows)
        assert not engine.steps.residency.pins
    engine.close()


def test_a_text_that_begins_as_another_reads_on_from_there(house):
    """Hits of the prefix cache say what misses say; the same beginning under another expert is another's."""
    record = ensemble(house, **LIVE)
    cold, warm = (open_batched(record, house.store) for _ in range(2))
    texts = [tuple(house.tokens[:30]), tuple(house.tokens[:30]), (*house.tokens[:24], 5, 6, 7), tuple(house.tokens[:40])]
    for text in texts:
        said = [Heard(engine, Request(text, 5, 0.0, stops=frozenset())).wait()[0] for engine in (warm, cold)]
        assert [one.token for one in said[0]] == [one.token for one in said[1]]
        assert [one.logprob for one in said[0]] == pytest.approx([one.logprob for one in said[1]], abs=1e-5)
        cold.steps.prefixes.kept.clear()
    assert cold.steps.prefixes.hits == 0
    assert warm.steps.prefixes.hits >= 3
    found = warm.steps.prefixes
    assert found.size == sum(kept.size for kept in found.kept.values())
    digests = {digest for digest, _ in found.kept}
    assert digests <= {*warm.experts, "seed"}
    assert len(digests) > 1
    for engine in (cold, warm):
        engine.close()


def test_a_deterministic_engine_says_the_same_bytes_whoever_asks_beside(house):
    """With neighbours of any number, and after others; not so without the mode, where numbers agree within rounding."""
    engine = open_batched(ensemble(house, **LIVE), house.store, limits=Limits(deterministic=True))
    request = Request(tuple(house.tokens[:20]), 8, 0.8, stops=frozenset())
    alone = Heard(engine, request).wait()
    for neighbours in (1, 5):
        heard = [Heard(engine, Request(tuple(house.tokens[:size]), 12, rng_seed=size, stops=frozenset())) for size in SIZES[:neighbours]]
        assert Heard(engine, request).wait() == alone
        assert {one.wait()[1] for one in heard} == {Ended("length")}
    engine.close()
