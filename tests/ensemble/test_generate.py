"""Text from any LM."""

import pytest
import torch
from tiny_models import SHAPE

from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import open_model
from elmwood.errors import BadInput


def test_the_same_settings_write_the_same_text(house):
    lm = open_model(house.ensemble(top_k=2), house.store)

    def write(**fields):
        return list(generate(lm, house.tokenizer, "the sea", max_tokens=12, **fields))

    assert write(rng_seed=1) == write(rng_seed=1)
    assert write(rng_seed=1) != write(rng_seed=2)
    assert write(temperature=0) == write(temperature=0, rng_seed=5) == write(top_p=1e-9)
    assert all(sum(step.weights.values()) == pytest.approx(1) for step in write())


class Parrot:
    """An LM that says given tokens, whatever it has read."""

    context, vocabulary, separator, stops = 64, SHAPE.vocabulary, 0, frozenset([0])

    def __init__(self, says):
        self.says = says

    def score(self, tokens_BT):
        raise NotImplementedError

    def start(self):
        return self

    def extend(self, tokens_T, cache):
        self.shares = {"parrot": 1.0}
        logp_V = torch.full((SHAPE.vocabulary,), -50.0)
        logp_V[self.says.pop(0)] = 0
        return logp_V, self


def test_pieces_are_whole_characters_and_join_to_the_text(house):
    said = "naïve — 海猫 ok"
    ids = house.tokenizer.encode(said).ids
    assert any(len(house.tokenizer.encode(letter).ids) > 1 for letter in said)
    steps = list(generate(Parrot([*ids, 0, 5]), house.tokenizer, "", max_tokens=99))
    assert "".join(step.text for step in steps) == said
    assert [step.token for step in steps] == [*ids, 0]
    assert not any("\ufffd" in step.text for step in steps)
    unfinished = house.tokenizer.encode("€").ids[:1]
    assert [step.text for step in generate(Parrot(unfinished), house.tokenizer, "", max_tokens=1)] == ["\ufffd"]
    assert next(generate(Parrot([SHAPE.vocabulary - 1]), house.tokenizer, "", max_tokens=1)).text == ""  # a row no token uses


def test_text_ends_where_the_context_does(house):
    prompt = "".join(house.tokenizer.id_to_token(5) for _ in range(60))
    assert len(list(generate(Parrot([7] * 99), house.tokenizer, prompt, max_tokens=99))) == 64 - 61
    for wrong, complaint in (({"prompt": prompt * 2}, "reads 64"), ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p")):
        with pytest.raises(BadInput, match=complaint):
            next(generate(Parrot([7]), house.tokenizer, **({"prompt": ""} | wrong)))
