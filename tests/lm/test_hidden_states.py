"""Hidden states of a seed, as the embedder of that name uses them."""

import pytest
import torch
from tiny_configs import CONFIGS
from tiny_models import config_seed

from elmwood.errors import BadInput
from elmwood.lm.files import tokenizer
from elmwood.lm.hidden_states import open_hidden_states
from elmwood.lm.load import load_model


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3"])
def test_states_are_those_of_each_token_and_look_back_only(kind, store, seed):
    one = seed if kind == "llama" else config_seed(CONFIGS[kind], store)
    states, words = open_hidden_states(one.digest, store), tokenizer(one, store)
    texts = ["the cat sat on the mat 海", "", "the cat", "the sea " * 60]
    found = states(texts)
    body = load_model(one, store).base_model
    for text, (state_WH, end_W) in zip(texts, found, strict=True):
        encoded = words.encode(text)
        assert len(state_WH) == len(end_W) == len(encoded.ids)
        if text:
            assert end_W[-1] == len(text)
            with torch.inference_mode():
                first = body(input_ids=torch.tensor([[one.separator, *encoded.ids[: one.context - 1]]])).last_hidden_state[0, 1:]
            torch.testing.assert_close(torch.from_numpy(state_WH[: len(first)]), first.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0][0][: len(found[2][0])], found[2][0], atol=1e-4, rtol=1e-4)
    with pytest.raises(BadInput, match="import that seed first"):
        open_hidden_states("0" * 64, store)
