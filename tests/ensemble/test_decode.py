"""Decoding in place, which a GPU does, against text that is extended token by token: the same tokens, probabilities and shares."""

from itertools import cycle, groupby

import pytest
import torch
from tiny_models import SHAPE, config_seed
from transformers import GPT2Config, MistralConfig, OPTConfig, Qwen3Config

from elmwood.ensemble.decode import Rule, pick, reads_in_place
from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import open_model
from elmwood.lm.experts import BASE

PROMPT = "the captain sailed. def path(open)"
MODELS = {
    "seed": lambda house: house.seed,
    "adapter": lambda house: house.experts[0],
    "full": lambda house: house.experts[2],
    "uniform": lambda house: house.ensemble(router="uniform", top_k=3),
    "nearest": lambda house: house.ensemble(top_k=1),
    "live": lambda house: house.ensemble(router="live", top_k=1, seed_distance=0.9),
    "posterior": lambda house: house.ensemble(router="posterior", top_k=2, temperature=5.0),
}


def both_ways(lm, house, prompt=PROMPT, most=24, **settings):
    """Text extended token by token, and decoded in place twice: the second time in the memory of the first."""
    return [
        list(generate(lm, house.tokenizer, prompt, max_tokens=most, stops=frozenset(), in_place=here, **settings))
        for here in (False, True, True)
    ]


def check_alike(placed, plain):
    assert [step.token for step in placed] == [step.token for step in plain]
    for one, other in zip(placed, plain, strict=True):
        assert one.text == other.text
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert one.weights == pytest.approx(other.weights, abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_in_place_says_what_extending_says(house, name):
    lm = open_model(MODELS[name](house), house.store, "cpu")
    for settings in ({"temperature": 0.0}, {"rng_seed": 1}, {"rng_seed": 2, "top_p": 0.9}):
        plain, placed, again = both_ways(lm, house, **settings)
        check_alike(placed, plain)
        assert placed == again


@pytest.mark.parametrize("name", ["nearest", "live"])
def test_candidates_that_join_read_what_they_missed(house, name, monkeypatch):
    """A text that goes from topic to topic, whatever the model would rather say."""
    lm = open_model(MODELS[name](house), house.store, "cpu")
    said = house.tokenizer.encode("sea sea def def def sea sea harbour captain jardin ").ids[:63]
    for module in ("decode", "generate"):
        forced = cycle(said)
        monkeypatch.setattr(f"elmwood.ensemble.{module}.pick", lambda *_, forced=forced: torch.tensor([next(forced)]))
    plain, placed, again = both_ways(lm, house, "", len(said))
    check_alike(placed, plain)
    assert placed == again
    asked = [run for run, _ in groupby(frozenset(step.weights) for step in plain)]
    assert len(asked) > len(set(asked)) > 1  # some leave, and come back


def test_two_texts_at_once_do_not_meet(house):
    lm = open_model(house.ensemble(router="uniform", top_k=3), house.store, "cpu")
    alone = [list(generate(lm, house.tokenizer, text, max_tokens=6, in_place=True)) for text in ("the sea", "def path")]
    both = zip(*(generate(lm, house.tokenizer, text, max_tokens=6, in_place=True) for text in ("the sea", "def path")), strict=True)
    assert list(both) == list(zip(*alone, strict=True))


SMALL = {"vocab_size": SHAPE.vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
GROUPED = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
KINDS = {  # whether they are read in place: not where attention slides
    "opt": (OPTConfig(**SMALL, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=16), True),
    "gpt2": (GPT2Config(vocab_size=SHAPE.vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64), True),
    "qwen3": (Qwen3Config(**SMALL, **GROUPED), True),
    "mistral": (MistralConfig(**SMALL, **GROUPED, sliding_window=5), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_any_kind_decode_in_place_or_are_read_as_before(kind, house):
    config, in_place = KINDS[kind]
    lm = open_model(config_seed(config, house.store), house.store, "cpu")
    with torch.inference_mode():
        assert reads_in_place(lm.experts.body(BASE), 2) == in_place
    plain, placed, _ = both_ways(lm, house, most=12)
    check_alike(placed, plain)


def test_chances_choose_tokens_in_proportion():
    logp_V = torch.tensor([0.5, 0.2, 0.3]).log()
    chosen = [int(pick(logp_V, Rule(1.0, 1.0), torch.tensor(n / 1000))) for n in range(1000)]
    assert [chosen.count(token) for token in range(3)] == pytest.approx([500, 200, 300], abs=1)
    assert {int(pick(logp_V, Rule(1.0, 0.7), torch.tensor(n / 100))) for n in range(100)} == {0, 2}
    assert int(pick(logp_V, Rule(0.0, 1.0), torch.tensor(0.99))) == 0
