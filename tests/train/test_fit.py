"""Predictions of memory and time, against what a run really keeps and takes."""

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from elmwood.errors import BadInput, BadSeed
from elmwood.lm.load import new_model
from elmwood.records import Recipe, Shape
from elmwood.train.adapter import add_adapter
from elmwood.train.card.compiled import narrow_residuals
from elmwood.train.fit.formulas import activations, anatomy, components, trained_parameters
from elmwood.train.fit.predict import Machine, find_machine, fit, largest, machine_memory, verdict
from elmwood.train.loss import Abilities, loss

LLAMA = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 64, "dropout": 0.0}
DROPPED = {"gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}, "opt": {"dropout": 0.1}}
CONFIGS = {"llama": LLAMA, "qwen3": LLAMA | {"head_dim": 16}, "gpt2": GPT2, "opt": OPT}
CONFIGS |= {f"{kind} with dropout": CONFIGS[kind] | dropped for kind, dropped in DROPPED.items()}
ENDS = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
FULL = Recipe(steps=1, batch=4, length=32)
LORA = FULL.model_copy(update={"method": "lora", "rank": 4})
BODY = anatomy(transformers.AutoConfig.for_model("llama", **LLAMA | ENDS))


def built(kind: str, recipe: Recipe):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind.split()[0], **CONFIGS[kind] | ENDS))
    config = model.config
    return config, model if recipe.method == "full" else add_adapter(model, recipe, "base")


LATE = LORA.model_copy(update={"late": 0.34})
DORA = LORA.model_copy(update={"method": "dora"})


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("recipe", [FULL, LORA, LATE, DORA], ids=["full", "lora", "late", "dora"])
def test_counts_and_activations_are_those_of_the_model(kind, recipe):
    config, model = built(kind, recipe)
    body = anatomy(config)
    assert body.parameters + (0 if recipe.method == "full" else trained_parameters(body, recipe)) == sum(
        one.numel() for one in model.parameters()
    )
    assert trained_parameters(body, recipe) == sum(one.numel() for one in model.parameters() if one.requires_grad)
    head = 4 * 128 * 64 if recipe.method == "full" else 0  # the head's gradient, a component of its own
    assert 4 * activations(body, recipe) == pytest.approx(kept_by(model) - head, rel=0.25 if recipe.method == "dora" else 0.1)


def kept_by(model) -> int:
    """Bytes that a step's forward pass keeps beside the weights."""
    kept: dict[int, int] = {}
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 128, (4, 32))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model, Abilities("no", True), tokens, tokens, None)
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("recipe", [FULL, LORA], ids=["full", "lora"])
def test_activations_of_a_gpu_are_those_of_bf16(kind, recipe, monkeypatch):
    """As there: frozen weights in bf16; trained ones under autocast, whose list for CUDA (not that for CPUs) has layer norms in float32."""

    def whole(module, x):
        with torch.autocast("cpu", enabled=False):
            return functional.layer_norm(x.float(), module.normalized_shape, module.weight.float(), module.bias.float(), module.eps)

    if recipe.method == "full":
        monkeypatch.setattr(nn.LayerNorm, "forward", whole)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind] | ENDS)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = model if recipe.method == "full" else add_adapter(model.to(torch.bfloat16), recipe, "base")
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.method == "full"), narrow_residuals(model):
        kept = kept_by(model)
    body = anatomy(config)
    copies = 2 * body.matrices + 4 * 128 * 64 if recipe.method == "full" else 0  # of weights, and the head's gradient: other components
    assert 2 * activations(body, recipe, "cuda") == pytest.approx(kept - copies, rel=0.05)


@given(
    memory=st.integers(10**8, 10**10), batch=st.integers(1, 64), length=st.integers(2, 2048), lora=st.booleans(), rank=st.integers(1, 64)
)
@settings(max_examples=30, deadline=None)
def test_the_largest_that_fits_fits_and_one_more_does_not(memory, batch, length, lora, rank):
    recipe = Recipe(steps=1, batch=batch, length=length, method="lora" if lora else "full", rank=rank)
    answer = fit_quickly(recipe, memory)
    limits = {"batch": 1 << 16, "length": BODY.context, "rank": BODY.width}
    for what, most in answer.items():
        if most:
            assert size(recipe, what, most) <= memory * 1.001  # this process itself grows meanwhile
        if 0 < most < limits[what]:
            assert size(recipe, what, most + 1) > memory * 0.999


def fit_quickly(recipe: Recipe, memory: int) -> dict[str, int]:
    return {what: largest(BODY, recipe, Machine("cpu", memory, True), what) for what in ("batch", "length", "rank")}


def size(recipe: Recipe, what: str, value: int) -> int:
    return sum(components(BODY, recipe.model_copy(update={what: value}), "cpu").values())


@given(batch=st.integers(1, 64), length=st.integers(2, 512), rank=st.integers(1, 64))
def test_more_never_takes_less(batch, length, rank):
    recipe = Recipe(steps=1, batch=batch, length=length, rank=rank, method="lora")
    for what, value in {"batch": batch, "length": length, "rank": rank}.items():
        assert size(recipe, what, value + 1) > size(recipe, what, value) - 10**6


def test_fit_needs_only_a_config(tmp_path):
    transformers.AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"], **LLAMA | ENDS).save_pretrained(tmp_path)
    answer = fit(str(tmp_path), FULL)
    assert sum(answer.components.values()) == answer.total
    assert answer.fits
    assert answer.verdict.startswith("fits")
    assert answer.tokens_per_second > 0
    assert set(answer.largest) == {"batch", "length"}
    small = fit(str(tmp_path), FULL.model_copy(update={"batch": 4096}), memory=answer.total * 2)
    assert not small.fits
    passes = int(re.search(r"--accumulate (\d+) would", small.verdict)[1])
    assert fit(str(tmp_path), FULL.model_copy(update={"batch": 4096, "accumulate": passes}), memory=answer.total * 2).fits
    assert fit(str(tmp_path), FULL, memory=10**6).verdict.endswith("or a machine with more memory")
    long = fit(str(tmp_path), LORA.model_copy(update={"length": 4096, "together": 2}), memory=10**15, device="cuda")  # by the formulas
    assert not long.fits
    assert long.verdict.endswith("choose --length 2048")


def test_a_device_that_is_not_here_needs_its_memory_named():
    assert find_machine("cpu", None) == Machine("cpu", machine_memory("cpu"), True)
    assert find_machine("cuda", 8).memory == 8
    with pytest.raises(BadInput, match="cpu and cuda"):
        find_machine("mps", 8)
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--memory 12GB"):
            find_machine("cuda", None)


def test_a_seven_billion_model_is_predicted_without_its_weights(tmp_path):
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
    transformers.AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"], **shape).save_pretrained(tmp_path)
    full, lora = (fit(str(tmp_path), Recipe(steps=1, batch=1, length=2048, method=method)) for method in ("full", "lora"))
    assert full.parameters == pytest.approx(6.74e9, rel=0.01)
    assert lora.trained == pytest.approx(40e6, rel=0.01)  # rank 16 on all linear layers
    assert full.total > full.parameters * 16 > lora.total > lora.parameters * 2


SMALL = {"rank": 16, "optimiser": "adamw8bit", "checkpointing": True, "late": 0.5}


@pytest.mark.parametrize("change", [{"accumulate": 2}, *({what: value} for what, value in SMALL.items() if what != "rank")], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_should_take_less_takes_less(change, device):
    recipe = LORA.model_copy(update={"rank": 64, "batch": 64, "length": 256})
    before, after = (sum(components(BODY, one, device).values()) for one in (recipe, recipe.model_copy(update=change)))
    assert after < before


def test_experts_together_take_more_than_one_and_less_than_apart():
    recipe = LORA.model_copy(update={"rank": 64, "length": 256})
    one, eight = (sum(components(BODY, recipe.model_copy(update={"together": count}), "cuda").values()) for count in (1, 8))
    assert one < eight < 8 * one


@pytest.mark.parametrize("memory", [3, 8, 12, 30, 300])
def test_the_cheapest_change_fits(tmp_path, memory):
    """Whatever is advised is advised rightly: its options, typed, fit."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
    body = anatomy(transformers.AutoConfig.for_model("llama", **shape))
    recipe = Recipe(steps=1, batch=8, length=2048)
    total = sum(components(body, recipe, "cuda").values())
    said = verdict(body, recipe, Machine("cuda", memory * 10**9, False), total, {})
    if memory in (3, 300):
        assert said.startswith("fits") if memory == 300 else said.endswith("or a machine with more memory")
        return
    words = re.search(r"; (--.*) would", said)[1].split()
    values = [*words[1:], "--"]
    change = {one[2:]: True if value.startswith("--") else value for one, value in zip(words, values, strict=True) if one.startswith("--")}
    changed = Recipe.model_validate(recipe.model_dump() | change)
    assert sum(components(body, changed, "cuda").values()) <= memory * 10**9


def test_two_steps_are_held_against_the_prediction(tmp_path, forked):
    transformers.AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"], **LLAMA | ENDS).save_pretrained(tmp_path)
    words = ["fit", str(tmp_path), "--measure", "--batch", "4", "--length", "64", "--json"]
    answer = json.loads(forked("from elmwood.cli import main; main()", *words, cwd=tmp_path).stdout)  # which starts one for the steps
    measured = answer["measured"]
    assert measured["predicted"] == answer["total"] - answer["components"]["process"] + measured["held"]
    assert measured["predicted"] == pytest.approx(measured["peak"], rel=0.1)
    assert answer["measured"]["tokens_per_second"] > 0


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(BadSeed, match="config"):
        fit(str(tmp_path), FULL)


MEASURE = """
import json, sys, tempfile
from pathlib import Path
import numpy as np
from elmwood.corpus.tokens import Packed
from elmwood.lm.load import new_model
from elmwood.records import Recipe, Shape
from elmwood.train import loop
from elmwood.train.card import precision
from elmwood.train.fit.formulas import anatomy, components
shape, recipe = Shape.model_validate_json(sys.argv[1]), Recipe.model_validate_json(sys.argv[2])
config = new_model(shape.model_copy(update={"layers": 1})).config
config.num_hidden_layers = shape.layers
predicted = components(anatomy(config), recipe, "cpu")
tokens = np.random.default_rng(0).integers(1, shape.vocabulary, 50_000).astype("u2")
packed = Packed(tokens, np.arange(0, 50_000, 100), 0)
precision.uses_bf16 = lambda device: False  # predictions for CPUs are of float32; one with AMX keeps less
loop.run(new_model(shape), packed, recipe, Path(tempfile.mkdtemp()), lambda **_: None)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss would be the parent's
print(json.dumps([sum(predicted.values()), peak * 1024]))
"""


def test_the_peak_of_a_real_run():
    shape = Shape(layers=3, width=128, heads=4, feed_forward=352, vocabulary=2048, context=256)
    recipe = Recipe(steps=2, batch=12, length=256)
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, shape.model_dump_json(), recipe.model_dump_json()]
    predicted, measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert predicted == pytest.approx(measured, rel=0.1)
    assert new_model(shape).num_parameters() == anatomy(new_model(shape).config).parameters
