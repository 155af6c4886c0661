"""Tests on a pretended GPU, for a process in which no backward pass ran before: `test_rehearsal` starts it."""

import numpy as np
import pytest
import torch
import transformers

from elmwood.records import Recipe
from elmwood.train import loop
from elmwood.train.adapter import add_adapter
from elmwood.train.card.path import fast_path
from elmwood.train.fit.pretend import place, pretend

LLAMA = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
ENDS = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
RECIPE = Recipe(steps=2, batch=4, length=256, rank=4)


def test_tensors_of_two_devices_do_not_meet_and_autocast_narrows():
    with pretend() as device:
        x, weight = torch.empty(4, 8, device=device), torch.nn.Parameter(torch.empty(3, 8, device=device))
        with torch.autocast(device.type, torch.bfloat16):
            y = torch.nn.functional.linear(x, weight)
            assert y.dtype == torch.bfloat16
            assert torch.nn.functional.layer_norm(y, (3,)).dtype == torch.float32
        y.sum().backward()
        assert weight.grad.device == device
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4, 8)


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_a_step_stays_on_the_device_and_asks_for_no_value(method):
    """A value that is asked for would stop the GPU in every step; fake tensors refuse."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **LLAMA | ENDS))
        if method != "full":
            model = add_adapter(model, RECIPE.model_copy(update={"method": method}), "x")
    with pretend() as device:
        place(model, device)
        weights = {name: one for name, one in model.named_parameters() if one.requires_grad}
        optimizer = loop.adamw(weights, RECIPE)
        batch = loop.Batch(*(np.arange(32)[None] for _ in range(3)))
        with fast_path(model, RECIPE, loop.Abilities("documents", True)) as able:
            value = loop.add_gradients(model, able, batch, RECIPE)
        assert value.device == device
        assert all(one.grad.device == device for one in weights.values())
        loop.update_weights(optimizer, RECIPE, 0)
        assert {part.device.type for state in optimizer.state.values() for part in state.values()} == {device.type}
