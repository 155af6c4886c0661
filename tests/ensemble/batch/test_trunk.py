"""Adapters in the last layers alone: the layers below read each text once for all its experts, and every number is as without sharing."""

import threading
from contextlib import contextmanager

import pytest
from tiny_models import lora_expert

from elmwood.ensemble.batch.engine import open_batched
from elmwood.ensemble.batch.interface import Ended, Limits, Request, Said
from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import open_model
from elmwood.lm.adapters.trunk import stack_of

LAST = {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}
LIVE = {"router": "live", "top_k": 2, "temperature": 0.5, "seed_distance": 0.9}
KINDS = {
    "centroid": {"top_k": 3},
    "live": LIVE,
    "bounded": {"top_k": 2, "aggregation": "median"},
    "activated": LIVE | {"mixing": "activated", "block": 8},
}


@pytest.fixture(scope="module")
def late(house):
    """Experts with adapters in the second of two layers."""
    place = {"partition": house.partition.digest, "settings": LAST}
    return [lora_expert(house.seed, house.store, n, domain=n, **place) for n in range(3)]


def ask(engine, request):
    events, ended = [], threading.Event()

    def hear(event):
        events.append(event)
        if isinstance(event, Ended):
            ended.set()

    engine.submit(request, hear)
    return events, ended


@contextmanager
def counted(model):
    """Tokens that each layer reads."""
    tokens = [0] * len(stack_of(model)[1])

    def count(number):
        return lambda module, given, named, made: tokens.__setitem__(number, tokens[number] + given[0].shape[:2].numel())

    hooks = [layer.register_forward_hook(count(n), with_kwargs=True) for n, layer in enumerate(stack_of(model)[1])]
    yield tokens
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_side_by_side_are_as_each_alone(kind, house, late):
    fields = KINDS[kind] | ({"bounded": (late[0].digest,)} if kind == "bounded" else {})
    record = house.ensemble(late, **fields)
    lm, engine = open_model(record, house.store), open_batched(record, house.store, limits=Limits(slots=3, rows=12, running=3))
    assert engine.steps.reader.trunk.depth == 1
    sizes = (3, 20, 9, 20, 1, 14)  # one is asked for twice: the second reads on from what was kept
    rule = {"temperature": 0.8, "stops": frozenset()}
    asked = [ask(engine, Request(tuple(house.tokens[:size]), 10, rng_seed=size, echo=size == 14, **rule)) for size in sizes]
    for size, (events, ended) in zip(sizes, asked, strict=True):
        assert ended.wait(120)
        assert events[-1] == Ended("length")
        said = [event for event in events if isinstance(event, Said)]
        steps = list(generate(lm, house.tokenizer, house.tokens[:size], max_tokens=10, rng_seed=size, **rule))
        made = [event for event in said if not event.prompt]
        assert [event.token for event in made] == [step.token for step in steps]
        assert [event.logprob for event in made] == pytest.approx([step.logprob for step in steps], abs=1e-5)
        if size == 14:
            table = lm.score([house.tokens[:size]])[0, 1:].tolist()
            assert [event.logprob for event in said if event.prompt] == pytest.approx(table, abs=1e-5)
    assert engine.steps.reader.trunk.texts == {}
    engine.close()


def test_the_trunk_reads_a_token_once(house, late):
    """Layers of the trunk read the tokens of a text, the last layer those of its three rows."""
    engine = open_batched(house.ensemble(late, router="uniform", top_k=3), house.store)
    _, ended = ask(engine, Request(tuple(house.tokens[16:32]), 1, stops=frozenset()))
    assert ended.wait(60)  # all three are loaded now: rows whose adapters come at different times are read in several passes
    with counted(engine.steps.reader.model) as tokens:
        _, ended = ask(engine, Request(tuple(house.tokens[:16]), 1, stops=frozenset()))
        assert ended.wait(60)
    engine.close()
    assert tokens == [16, 48]


def test_who_joins_late_reads_the_last_layers_only(house, late):
    engine = open_batched(house.ensemble(late, router="uniform", top_k=3), house.store)
    first, second = late[0].digest, late[1].digest
    for only in ((first,), (second,)):  # the second finds what the first had the trunk read
        with counted(engine.steps.reader.model) as tokens:
            _, ended = ask(engine, Request(tuple(house.tokens[:32]), 1, only=only, stops=frozenset()))
            assert ended.wait(60)
        assert tokens == ([32, 32] if only == (first,) else [1, 32])  # one idle token: a pass has no fewer
    engine.close()


def test_adapters_in_the_first_layer_share_nothing(house):
    engine = open_batched(house.ensemble(house.experts[:2], top_k=2), house.store)
    assert engine.steps.reader.trunk is None
    engine.close()


def test_layers_that_are_told_other_things_read_apart(house, late, monkeypatch):
    """A model that reads otherwise when its trunk is shared does not share it."""
    from elmwood.ensemble.batch import passes

    monkeypatch.setattr(passes, "cut", lambda value, part, whole: value)
    engine = open_batched(house.ensemble(late, top_k=3), house.store)
    assert engine.steps.reader.trunk is None
    engine.close()
