"""Adapters in the last layers alone, one text at a time: the layers below read once for all experts, and all numbers are PEFT's."""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny_models import lora_expert

from elmwood.corpus.tokens import Packed, windows
from elmwood.ensemble.decode import Rule, decode
from elmwood.ensemble.mixture import open_model
from elmwood.lm.adapters.trunk import stack_of
from elmwood.lm.experts import BASE, Experts
from elmwood.lm.load import load_model
from elmwood.study.page import summary

LAST = {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def late(house):
    place = {"partition": house.partition.digest, "settings": LAST}
    made = [lora_expert(house.seed, house.store, n, domain=n, **place) for n in range(3)]
    return [house.add(one.model_copy(update={"recipe": one.recipe.model_copy(update={"late": 0.5})})) for one in made]


@pytest.fixture(scope="module")
def experts(house, late):
    return Experts(house.seed, late, house.store, "cpu")


@pytest.fixture(scope="module")
def peft(house, experts):
    """log p of PEFT's own models, the seed's last, of the house's text [E, T, V]."""
    models = [load_model(house.seed, house.store, expert, "cpu") for expert in experts.experts]
    models.append(load_model(house.seed, house.store, device="cpu"))
    with torch.inference_mode():
        return torch.stack([torch.log_softmax(one(torch.tensor([house.tokens])).logits[0], -1) for one in models])


@contextmanager
def counted(model):
    """Tokens that each layer reads, of all rows."""
    tokens = [0] * len(stack_of(model)[1])

    def count(number):
        return lambda module, given: tokens.__setitem__(number, tokens[number] + given[0].shape[:2].numel())

    hooks = [layer.mlp.register_forward_pre_hook(count(n)) for n, layer in enumerate(stack_of(model)[1])]
    yield tokens
    for hook in hooks:
        hook.remove()


def test_four_candidates_read_a_text_with_one_trunk(house, experts, peft):
    """The seed is the fourth. One joins when the text has grown."""
    text, tokens = experts.start(), house.tokens
    model = experts.body(BASE).model
    with torch.inference_mode():
        experts.cache(BASE, text)  # what a cache holds is tried once
    with counted(model) as read:
        first_AV, _ = experts.extend([0, 2, 3], tokens[:9], text)
        grown_AV, _ = experts.extend([0, 2, 3], tokens[9:10], text)
    assert read == [10, 30]
    joined_AV, _ = experts.extend([0, 1, 2, 3], tokens[10:14], text)
    torch.testing.assert_close(first_AV, peft[[0, 2, 3], 8], atol=1e-5, rtol=0)
    torch.testing.assert_close(grown_AV, peft[[0, 2, 3], 9], atol=1e-5, rtol=0)
    torch.testing.assert_close(joined_AV, peft[:, 13], atol=1e-5, rtol=0)


def test_many_experts_score_windows_with_one_trunk(house, experts, peft):
    stream = np.array([*house.tokens[:40], *house.tokens[:21]], np.int64)
    cut = windows(Packed(stream, np.array([0, 40]), 0), 16)
    read_WE = np.ones((len(cut.rows_WL), 4), bool)
    read_WE[0, 1] = False
    with torch.inference_mode(), counted(experts.body(BASE).model) as read:
        each_NE = experts.score_each(cut, read_WE, lambda done: None)
    apart = [experts.score_windows(e, cut, np.arange(len(cut.rows_WL)), lambda done: None).numpy() for e in range(4)]
    apart_NE = np.column_stack(apart)
    apart_NE[: cut.count_W[0], 1] = 0
    np.testing.assert_allclose(each_NE, apart_NE, atol=1e-5)
    own = torch.tensor(house.tokens[1:16])
    torch.testing.assert_close(torch.from_numpy(each_NE[:15, 0]), peft[0, :15].gather(1, own[:, None])[:, 0], atol=1e-5, rtol=0)
    assert 3 * read[0] < read[1]


@pytest.mark.parametrize("router", [{"router": "live", "top_k": 2, "temperature": 0.5, "seed_distance": 0.9}, {"top_k": 3}])
def test_decoding_in_place_says_what_the_table_says(house, late, router):
    lm = open_model(house.ensemble(late, **router), house.store)
    assert lm.experts.body(BASE).fork.depth == 1
    tokens, chance = house.tokens[:11], itertools.cycle([0.3, 0.8, 0.1]).__next__
    drawn = list(decode(lm, tokens, 12, Rule(0.8, 1.0), chance))
    whole = [*tokens, *(one.token for one in drawn)]
    assert [one.logprob for one in drawn] == pytest.approx(lm.score([whole])[0, 11:].tolist(), abs=1e-5)


def test_show_says_where_the_adapters_are(late):
    assert summary(late[0]).startswith("lora in the last 50% of the layers, domain 0")
