"""A step on a pretended GPU: what it counts, and that it stays there."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from elmwood.records import Recipe
from elmwood.train import loop
from elmwood.train.adapter import add_adapter
from elmwood.train.fit.allocator import CachingAllocator
from elmwood.train.fit.formulas import anatomy, components
from elmwood.train.fit.predict import fit
from elmwood.train.fit.pretend import place, pretend
from elmwood.train.fit.rehearsal import rehearse

LLAMA = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64, "dropout": 0.0}
CONFIGS = {"llama": LLAMA, "qwen3": LLAMA | {"head_dim": 16}, "gpt2": GPT2, "opt": OPT}
ENDS = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
RECIPE = Recipe(steps=2, batch=4, length=256, rank=4)


def config(kind: str):
    return transformers.AutoConfig.for_model(kind, **CONFIGS[kind] | ENDS)


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_rehearsal_counts_what_the_formulas_count(kind, method):
    """The formulas' tensors were held against real models. The rest of a peak comes and goes within a layer."""
    recipe = RECIPE.model_copy(update={"method": method})
    found, said = rehearse(config(kind), recipe), components(anatomy(config(kind)), recipe, "cuda")
    copies = 2 * anatomy(config(kind)).matrices if method == "full" else 0  # autocast's come and go here
    assert 0 <= found["weights"] - (said["weights"] - copies) < 300_000  # each tensor is rounded up to 512 bytes
    assert 0 <= found["optimiser"] - said["optimiser"] < 300_000
    kept = said["activations"] + said["gradients"] + said["logits"] + copies
    assert 0.8 * kept < found["activations and gradients"] < 1.5 * kept


def test_checkpointing_and_fewer_bits_take_less():
    def total(**changes):
        return sum(rehearse(config("llama"), RECIPE.model_copy(update=changes)).values())

    assert total(method="lora", checkpointing=True) < total(method="lora") < total(method="full")
    assert total(method="full", optimiser="adamw8bit") < total(method="full")


def test_fit_rehearses_for_a_gpu_and_falls_back_where_a_model_looks_at_values(tmp_path, monkeypatch):
    config("llama").save_pretrained(tmp_path)
    recipe = RECIPE.model_copy(update={"method": "lora"})
    answer = fit(str(tmp_path), recipe, device="cuda", memory=8 * 10**9)
    assert answer.components == rehearse(config("llama"), recipe)
    assert answer.fits
    monkeypatch.setattr(transformers.LlamaModel, "forward", lambda self, *_, **__: self.embed_tokens.weight.sum().item())
    assert "activations" in fit(str(tmp_path), recipe, device="cuda", memory=8 * 10**9).components


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
        model = transformers.AutoModelForCausalLM.from_config(config("llama"))
        if method != "full":
            model = add_adapter(model, RECIPE.model_copy(update={"method": method}), "x")
    with pretend() as device:
        place(model, device)
        weights = {name: one for name, one in model.named_parameters() if one.requires_grad}
        optimizer = loop.adamw(weights, RECIPE)
        batch = loop.Batch(*(np.arange(32)[None] for _ in range(3)))
        value = loop.add_gradients(model, loop.Abilities("mask", True), batch, RECIPE)
        assert value.device == device
        assert all(one.grad.device == device for one in weights.values())
        loop.update_weights(optimizer, RECIPE, 0)
        assert {part.device.type for state in optimizer.state.values() for part in state.values()} == {device.type}


# ---- the allocator --------------------------------------------------------------------------------------------------


def test_segments_are_those_of_the_documented_sizes():
    """A small block's segment has 2 MB, a medium one's 20 MB, larger ones have their own."""
    for size, segment in ((1, 2 << 20), (1 << 20, 2 << 20), ((1 << 20) + 1, 20 << 20), ((10 << 20) + 1, 12 << 20)):
        allocator = CachingAllocator()
        allocator.allocate(size)
        assert allocator.reserved == segment
        allocator.allocate(size)
        assert allocator.reserved == (segment if size <= 8 << 20 else 2 * segment)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40 << 20)), max_size=60))
def test_what_was_freed_is_used_again_and_blocks_join(steps):
    allocator, held = CachingAllocator(), []
    for which, size in steps:
        if which < len(held):
            allocator.free(held.pop(which))
        else:
            held.append(allocator.allocate(size))
        assert allocator.allocated <= allocator.most <= allocator.reserved
    for number in held:
        allocator.free(number)
    assert allocator.allocated == 0
    segments = sum(block.size for block in allocator._blocks.values())
    assert segments == allocator.reserved
    assert all(block.before is None and block.after is None for block in allocator._blocks.values())  # whole segments again
