"""Experts that act from the end of a prompt on: their cache is the seed's up to there, and score, text and server give one number."""

import threading

import pytest
import torch
from tiny_models import lora_expert

from elmwood.ensemble.batch.engine import open_batched
from elmwood.ensemble.batch.interface import Ended, Limits, Request, Said
from elmwood.ensemble.batch.opening import open_engine
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput
from elmwood.lm.experts import BASE
from elmwood.lm.load import load_model

LIVE = {"router": "live", "top_k": 2, "temperature": 0.5, "seed_distance": 0.9}


@pytest.fixture(scope="module")
def adapters(house):
    place = {"partition": house.partition.digest}
    return [*house.experts[:2], lora_expert(house.seed, house.store, 5, domain=2, **place)]


def opened(house, adapters, **fields):
    return open_model(house.ensemble(adapters, mixing="activated", **({"block": 8} | fields)), house.store, "cpu")


@torch.inference_mode()
def written_out(house, expert, tokens, begin):
    """log p of the token after each from `begin` on [T - begin, V]: the seed's keys and values before, PEFT's own model after."""
    seed = load_model(house.seed, house.store, device="cpu")
    model = load_model(house.seed, house.store, expert, "cpu") if expert else seed
    kept = seed(input_ids=torch.tensor([tokens[:begin]]), use_cache=True) if begin else None
    given = {"cache": kept["cache" if "cache" in kept else "past_key_values"]} if kept else {}
    return torch.log_softmax(model(input_ids=torch.tensor([tokens[begin:]]), **given).logits[0], -1)


def test_one_expert_is_pefts_model_over_the_seeds_cache(house, adapters):
    lm = opened(house, adapters, top_k=1)
    experts, text, tokens = lm.experts, lm.start(), house.tokens[:12]
    first_V, _ = lm.extend(tokens[:9], text)
    later_V, _ = lm.extend(tokens[9:12], text)
    (c,) = text.active
    wanted_TV = written_out(house, experts.experts[c], tokens, 8)
    torch.testing.assert_close(first_V, wanted_TV[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(later_V, wanted_TV[3], atol=1e-5, rtol=0)


def test_the_cache_of_the_prompt_is_the_seeds(house, adapters):
    lm = opened(house, adapters, **LIVE)
    text, alone = lm.start(), lm.start()
    lm.extend(house.tokens[:20], text)
    lm.experts.extend([len(lm.experts) - 1], house.tokens[:19], alone)
    mine, seeds = text.caches[BASE], alone.caches[BASE]
    assert len(mine.owner) == 3  # two experts, and the seed
    for one, other in zip(mine.layers, seeds.layers, strict=True):
        for states, wanted in ((one.keys, other.keys), (one.values, other.values)):
            for row in range(3):
                torch.testing.assert_close(states[row, :, :19], wanted[0, :, :19], atol=1e-6, rtol=0)


@pytest.mark.parametrize("fields", [LIVE, {"top_k": 2}, {"router": "sparse", "top_k": 2, "seed_distance": 1.9}])
def test_scoring_says_what_continuing_says(house, adapters, fields):
    lm, tokens = opened(house, adapters, **fields), house.tokens[:29]
    found_T, wanted = lm.score([tokens])[0, 1:], []
    for first in (0, 8, 16, 24):
        text = lm.start()
        for place in range(max(1, first), min(first + 8, len(tokens))):
            logp_V, text = lm.extend(tokens[place - 1 : place] if text.tokens else tokens[:place], text)
            wanted.append(float(logp_V[tokens[place]]))
    assert found_T.tolist() == pytest.approx(wanted, abs=1e-5)
    rows = torch.tensor([tokens, [*tokens[:10], *tokens[:19]]])
    torch.testing.assert_close(lm.score(rows)[:1, 1:], found_T[None], atol=1e-5, rtol=0)


def hear_all(engine, *requests):
    """The events of each, all at once."""
    heard = [(request, [], threading.Event()) for request in requests]
    for request, events, ended in heard:

        def hear(event, events=events, ended=ended):
            events.append(event)
            if isinstance(event, Ended):
                ended.set()

        engine.submit(request, hear)
    assert all(ended.wait(60) for _, _, ended in heard)
    assert all(events[-1].reason == "length" for _, events, _ in heard)
    return [[event for event in events if isinstance(event, Said)] for _, events, _ in heard]


@pytest.mark.parametrize("fields", [LIVE, {"top_k": 2}, {"router": "sparse", "top_k": 1, "seed_distance": 1.9}])
def test_rows_of_one_pass_say_what_the_model_says_and_the_seed_reads_prompts_once(house, adapters, fields):
    lm = opened(house, adapters, **fields)
    engine = open_batched(house.ensemble(adapters, mixing="activated", block=8, **fields), house.store, "cpu")
    read, seed = [], engine.candidates.base
    absorb = engine.steps._absorb

    def count(text, row, size, logp_UV):
        read.append((text.number, row.candidate, size))
        absorb(text, row, size, logp_UV)

    engine.steps._absorb = count
    prompts = [tuple(house.tokens[n : n + length]) for n, length in ((0, 29), (5, 1), (9, 20), (0, 29))]
    for each in (prompts[:3], prompts[3:]):
        for tokens, said in zip(each, hear_all(engine, *(Request(one, 6, 0.0, stops=frozenset()) for one in each)), strict=True):
            logp_V, text = lm.extend(tokens, lm.start())
            for event in said:
                assert event.logprob == pytest.approx(float(logp_V[event.token]), abs=1e-5)
                logp_V, text = lm.extend([event.token], text)
            assert len(said) == 6
    of_experts = {(number, c): sum(size for one, e, size in read if (one, e) == (number, c)) for number, c, _ in read if c != seed}
    assert set(of_experts.values()) == {6}, "the last token of the prompt, and those made but the last"
    assert sum(size for number, c, size in read if (number, c) == (4, seed)) <= 6, "read before, and kept"
    tokens = prompts[0]
    for said in hear_all(engine, *[Request(tokens, 0, echo=True, logprobs=1)] * 2):
        assert [event.logprob for event in said] == pytest.approx(lm.score([tokens])[0, 1:].tolist(), abs=1e-5)
    alone = lm.experts.experts[1]
    (said,) = hear_all(engine, Request(tokens, 0, echo=True, only=(alone.digest,)))
    assert [event.logprob for event in said] == pytest.approx(lm.experts.score(1, [tokens])[0, 1:].tolist(), abs=1e-5)
    engine.close()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_server_says_the_same(house, adapters, deterministic):
    """In rows of one pass, and in turns; with some of the candidates too."""
    lm = opened(house, adapters, **LIVE)
    record, limits = house.ensemble(adapters, mixing="activated", block=8, **LIVE), Limits(deterministic=deterministic)
    engine = open_engine(record, house.store, "cpu", limits)
    for without in ((), (lm.experts.experts[0].digest,)):
        events, ended, tokens = [], threading.Event(), tuple(house.tokens[:13])

        def hear(event, events=events, ended=ended):
            events.append(event)
            if isinstance(event, Ended):
                ended.set()

        engine.submit(Request(tokens, 6, 0.0, stops=frozenset(), without=without), hear)
        assert ended.wait(60)
        said = [event for event in events if isinstance(event, Said)]
        assert len(said) == 6
        if not without:
            logp_V, text = lm.extend(tokens, lm.start())
            for event in said:
                assert event.logprob == pytest.approx(float(logp_V[event.token]), abs=1e-5)
                logp_V, text = lm.extend([event.token], text)
        assert not any(digest in event.weights for event in said for digest in without)
    engine.close()


def test_other_experts_are_refused(house, adapters):
    with pytest.raises(BadInput, match="only LoRA"):
        opened(house, house.experts)
    with pytest.raises(BadInput, match="chosen once"):
        opened(house, adapters, every=4)
