"""GGUF files: every value where llama.cpp looks, its own log-probabilities, adapters, and what would be computed otherwise.

D values of a head
"""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, GGUFWriter, dequantize, get_tensor_name_map
from llama_server import Llama
from safetensors.torch import load_file
from tiny_merges import SMALL, TEXT, folder_of, logits, spoil
from tiny_models import SHAPE, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from elmwood.errors import BadInput, Damaged, ElmwoodError
from elmwood.merge.export.folder import export
from elmwood.merge.export.gguf import write_gguf
from elmwood.merge.export.gguf_config import read_config, write_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=128),
    "biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "linear": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3 | {"rope_theta": 10000.0}),
    "window": MistralConfig(**SMALL, head_dim=32, sliding_window=32),
    "yarn": LlamaConfig(**SMALL, rope_parameters=YARN),
    "yarn of its own strength": Qwen2Config(**SMALL, rope_parameters=YARN | {"attention_factor": 1.3}),
    "heads": LlamaConfig(**SMALL | {"num_key_value_heads": 1}, head_dim=32, rms_norm_eps=1e-2),
    "layers with a window": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=32, max_window_layers=1),
    "olmo2": Olmo2Config(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3),
    "qwen3moe": Qwen3MoeConfig(**SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True),
}
READABLE = ("llama", "qwen2", "qwen3")  # what transformers' own reader of these files reads whole


def assert_equal_in_llama_cpp(folder, context=64):
    """llama.cpp's log-probabilities are those of transformers, as far as the context reaches."""
    tokens_T = (tiny_tokenizer().encode(TEXT).ids * 3)[: context - 1]
    with torch.inference_mode():
        theirs_TV = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([tokens_T])).logits[0]
    assert Llama(folder / "model.gguf").differs(tokens_T, theirs_TV) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_holds_every_number_where_llama_cpp_looks(name, tmp_path):
    folder = folder_of(CONFIGS[name], tmp_path)
    notes = write_gguf(folder, folder / "model.gguf", name="tiny")
    reader = GGUFReader(folder / "model.gguf")
    architecture = {one: key for key, one in MODEL_ARCH_NAMES.items()}[reader.fields["general.architecture"].contents()]
    names = get_tensor_name_map(architecture, 2)
    found = {one.name: dequantize(one.data, one.tensor_type).reshape(*reversed(one.shape.tolist())) for one in reader.tensors}
    turn, expected = LlamaTensorProcessor()._reverse_permute_weights, load_file(folder / "model.safetensors")
    seen = set()
    for key, tensor in expected.items():
        head, _, tail = key.partition(".experts.")
        expert, _, part = tail.partition(".")
        there = names.get_name(f"{head}.experts.{part}" if tail else key, try_suffixes=(".weight", ".bias"))
        seen.add(there)
        value = found[there][int(expert)] if tail else found[there]
        if architecture is MODEL_ARCH.LLAMA and (".q_proj" in key or ".k_proj" in key):
            value = turn(value, 4, 4 if ".q_proj" in key else CONFIGS[name].num_key_value_heads)
        assert np.array_equal(value, tensor.numpy()), key
    assert set(found) - seen == ({"rope_freqs.weight"} if name == "llama3" else set())
    kept = reader.fields[f"{MODEL_ARCH_NAMES[architecture]}.context_length"].contents()
    assert (kept, [note[:27] for note in notes]) == ((32, ["Its context is 32 tokens, w"]) if "window" in name else (64, []))
    if name in READABLE:
        assert torch.equal(logits(folder, gguf_file="model.gguf"), logits(folder))
        read = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        assert read(TEXT)["input_ids"] == tiny_tokenizer().encode(TEXT).ids
    assert_equal_in_llama_cpp(folder, kept)


@pytest.mark.parametrize(("dtype", "error"), [("f32", 0.0), ("f16", 2**-11), ("bf16", 2**-8)])
def test_a_gguf_file_of_a_folded_expert_in_any_dtype(dtype, error, experts, seed, store, tmp_path):
    export(experts["lora"], store, tmp_path / "dense", "transformers")
    export(experts["lora"], store, tmp_path / "out", "gguf", dtype.upper())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.gguf"]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for name, tensor in load_file(tmp_path / "dense" / "model.safetensors").items():
        assert ((read[name] - tensor).abs() <= error * tensor.abs() + (1e-7 if error else 0)).all(), name


def test_an_adapter_for_llama_cpp_adds_what_the_folded_one_has_more(experts, seed, store, tmp_path):
    for form in ("gguf", "gguf-adapter"):
        export(experts["lora"], store, tmp_path / form, form)
    export(seed, store, tmp_path / "seed", "gguf")
    files = {name: tmp_path / name / "model.gguf" for name in ("seed", "gguf", "gguf-adapter")}
    found = {name: {one.name: np.array(one.data) for one in GGUFReader(path).tensors} for name, path in files.items()}
    for name, folded in found["gguf"].items():
        if f"{name}.lora_a" in found["gguf-adapter"]:
            a_RI, b_OR = (found["gguf-adapter"].pop(f"{name}.lora_{end}").astype(np.float64) for end in "ab")
            np.testing.assert_allclose(found["seed"][name] + b_OR @ a_RI / len(a_RI), folded, atol=1e-6)
        else:
            assert np.array_equal(folded, found["seed"][name])
    assert not found["gguf-adapter"]
    export(experts["lora"], store, tmp_path / "dense", "transformers")
    assert Llama(files["seed"], files["gguf-adapter"]).differs(tiny_tokenizer().encode(TEXT).ids, logits(tmp_path / "dense")) < 1e-4
    with pytest.raises(BadInput, match="weight-decomposed"):
        export(experts["dora"], store, tmp_path / "dora", "gguf-adapter")


def test_numbers_outside_a_dtype_are_seen(tmp_path):
    folder = folder_of(CONFIGS["llama"], tmp_path)
    spoil(folder, lambda found: found["model.layers.0.mlp.up_proj.weight"].fill_(1e5))
    with pytest.raises(Damaged, match="outside the range of F16"):
        write_gguf(folder, folder / "model.gguf", name="tiny", dtype="F16")


STORED = {
    "its own head": lambda found: found.update({"lm_head.weight": torch.randn_like(found["model.embed_tokens.weight"])}),
    "the embedding twice": lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"].clone()}),
    "a buffer": lambda found: found.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
}


@pytest.mark.parametrize("what", STORED)
def test_what_else_is_stored_is_used_or_left_out_as_in_transformers(what, tmp_path):
    folder = folder_of(CONFIGS["llama"], tmp_path)
    spoil(folder, STORED[what])
    write_gguf(folder, folder / "model.gguf", name="tiny")
    assert ("output.weight" in {one.name for one in GGUFReader(folder / "model.gguf").tensors}) == (what == "its own head")
    assert_equal_in_llama_cpp(folder)


def rotary(kind, **settings):
    return {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, **settings}


UNREACHED = {
    "opt models": OPTConfig(vocab_size=SHAPE.vocabulary, hidden_size=32, ffn_dim=48, num_attention_heads=4, num_hidden_layers=1),
    "granite models": GraniteConfig(**SMALL),
    "type 'dynamic'": LlamaConfig(**SMALL, rope_parameters=rotary("dynamic")),
    "type 'longrope'": LlamaConfig(**SMALL, rope_parameters=rotary("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8)),
    "type 'llama3' in qwen3": Qwen3Config(**SMALL, rope_parameters=LLAMA3 | {"rope_theta": 1e4}),
    "beta_slow 2.0": LlamaConfig(**SMALL, rope_parameters=rotary("yarn", beta_slow=2.0)),
    "mscale": LlamaConfig(**SMALL, rope_parameters=rotary("yarn", mscale=0.7, mscale_all_dim=0.5)),
    "attention_bias is True": Qwen3Config(**SMALL, attention_bias=True),
    "sum to one": Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=False),
    "gelu": LlamaConfig(**SMALL, hidden_act="gelu"),
}


@pytest.mark.parametrize("complaint", UNREACHED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(complaint, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(UNREACHED[complaint].to_dict()))  # before any tensor is looked at
    with pytest.raises(BadInput, match=complaint):
        read_and_write_config(tmp_path)


def read_and_write_config(folder):
    config, _ = read_config(folder)
    write_config(GGUFWriter(folder / "model.gguf", "llama"), config)


SAID = {
    "scale_emb": 12,
    "final_logit_softcapping": 30.0,
    "attention_multiplier": 0.5,
    "logits_scaling": 8.0,
    "partial_rotary_factor": 0.5,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


@pytest.mark.parametrize("name", SAID)
def test_a_setting_that_changes_the_computation_is_refused_by_name(name, tmp_path):
    for value, allowed in ((SAID[name], False), (None, True)):
        (tmp_path / "config.json").write_text(json.dumps(LlamaConfig(**SMALL).to_dict() | {name: value, "unsloth_version": "1"}))
        with nullcontext() if allowed else pytest.raises(ElmwoodError, match="quantised" if name == "quantization_config" else name):
            read_and_write_config(tmp_path)


TENSORS = {
    "model.layers.0.mlp.novel.weight": ("llama", torch.zeros(2)),
    "v_head.summary.weight": ("llama", torch.zeros(1, 64)),
    "lm_head.bias": ("qwen2", torch.zeros(SHAPE.vocabulary)),
    "model.layers.0.self_attn.o_proj.bias": ("qwen3", torch.zeros(64)),
    "lm_head.weight": ("qwen2", None),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_llama_cpp_has_no_place_for_or_lacks_is_refused_by_name(name, tmp_path):
    config, value = TENSORS[name]
    folder = folder_of(CONFIGS[config], tmp_path)
    spoil(folder, (lambda found: found.pop(name)) if value is None else (lambda found: found.update({name: value})))
    with pytest.raises(BadInput, match=name):
        write_gguf(folder, folder / "model.gguf", name="tiny")
    assert not (folder / "model.gguf").exists()
