"""GGUF files: every value where llama.cpp looks, vocabularies, adapters, and what would be computed otherwise.

D values of a head
"""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map
from safetensors.torch import load_file
from tiny_merges import SMALL, TEXT, llama_cpp_logits, logits, spoil
from tiny_models import SHAPE, louder, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
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

from elmwood.errors import BadInput, Damaged
from elmwood.lm.load import save_folder
from elmwood.merge.export.folder import export
from elmwood.merge.export.gguf import write_gguf
from elmwood.merge.export.gguf_vocabulary import SPLITS, pre_tokenizer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=128),
    "biases": LlamaConfig(**SMALL, attention_bias=True),
    "linear": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3 | {"rope_theta": 10000.0}),
    "window": MistralConfig(**SMALL, head_dim=32, sliding_window=32),
    "olmo2": Olmo2Config(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3),
    "qwen3moe": Qwen3MoeConfig(**SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True),
}
READABLE = ("llama", "qwen2", "qwen3")  # what transformers' own reader of these files reads whole


def folder_of(config, folder):
    torch.manual_seed(0)
    model = louder(AutoModelForCausalLM.from_config(config), 5.0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.2 * torch.randn_like(weight)
    save_folder(model, tiny_tokenizer(), folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_holds_every_number_where_llama_cpp_looks(name, tmp_path):
    folder = folder_of(CONFIGS[name], tmp_path)
    write_gguf(folder, folder / "model.gguf", name="tiny")
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
            value = turn(value, 4, 4 if ".q_proj" in key else 2)
        assert np.array_equal(value, tensor.numpy()), key
    assert set(found) - seen == ({"rope_freqs.weight"} if name == "llama3" else set())
    kept = reader.fields[f"{MODEL_ARCH_NAMES[architecture]}.context_length"].contents()
    assert kept == (32 if name == "window" else 64)
    if name in READABLE:
        assert torch.equal(logits(folder, gguf_file="model.gguf"), logits(folder))
        read = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        assert read(TEXT)["input_ids"] == tiny_tokenizer().encode(TEXT).ids
    if find_spec("llama_cpp"):
        tokens = tiny_tokenizer().encode(TEXT).ids
        theirs, cut = llama_cpp_logits(folder / "model.gguf", tokens)
        assert cut == tokens
        torch.testing.assert_close(theirs, logits(folder), atol=5e-3, rtol=0)  # it computes in half precision here and there


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
    if find_spec("llama_cpp"):
        tokens = tiny_tokenizer().encode(TEXT).ids
        whole, over = llama_cpp_logits(files["gguf"], tokens)[0], llama_cpp_logits(files["seed"], tokens, files["gguf-adapter"])[0]
        torch.testing.assert_close(over, whole, atol=2e-2, rtol=0)
    with pytest.raises(BadInput, match="use_dora"):
        export(experts["dora"], store, tmp_path / "dora", "gguf-adapter")


def test_numbers_outside_a_dtype_are_seen(tmp_path):
    folder = folder_of(CONFIGS["llama"], tmp_path)
    spoil(folder, lambda found: found["model.layers.0.mlp.up_proj.weight"].fill_(1e5))
    with pytest.raises(Damaged, match="outside the range of F16"):
        write_gguf(folder, folder / "model.gguf", name="tiny", dtype="F16")


UNREACHED = {
    "opt models": OPTConfig(vocab_size=SHAPE.vocabulary, hidden_size=32, ffn_dim=48, num_attention_heads=4, num_hidden_layers=1),
    "type 'yarn'": LlamaConfig(**SMALL, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    "sum to one": Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=False),
    "gelu": LlamaConfig(**SMALL, hidden_act="gelu"),
    "no place for": LlamaConfig(**SMALL, mlp_bias=True),
}


@pytest.mark.parametrize("complaint", UNREACHED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(complaint, tmp_path):
    folder = folder_of(UNREACHED[complaint], tmp_path)
    if complaint == "no place for":
        spoil(folder, lambda found: found.update({"model.layers.0.mlp.novel.weight": torch.zeros(2)}))
    with pytest.raises(BadInput, match=complaint):
        write_gguf(folder, folder / "model.gguf", name="tiny")


def byte_level(*first, use_regex=True):
    made = tiny_tokenizer()
    made.pre_tokenizer = pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])
    return json.loads(made.to_str())


def test_how_text_is_cut_has_a_name():
    assert pre_tokenizer(json.loads(tiny_tokenizer().to_str())) == "gpt-2"
    assert pre_tokenizer(byte_level(pre_tokenizers.Digits(individual_digits=True))) == "smollm"
    for pattern, name in SPLITS.items():
        assert pre_tokenizer(byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"), use_regex=False)) == name
    for other in (byte_level(pre_tokenizers.Digits()), byte_level(pre_tokenizers.Split(Regex("a"), "isolated"), use_regex=False)):
        with pytest.raises(BadInput, match="no name"):
            pre_tokenizer(other)


def sentencepiece(words):
    """BPE that falls back to bytes, as Llama 2 and Mistral have it."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator([words] * 3, trainers.BpeTrainer(vocab_size=SHAPE.vocabulary, special_tokens=special, show_progress=False))
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [one for one in spec["added_tokens"] if one["id"] < 3]
    return Tokenizer.from_str(json.dumps(spec))


def test_a_vocabulary_that_falls_back_to_bytes(tmp_path):
    folder = folder_of(LlamaConfig(**SMALL | {"bos_token_id": 1, "eos_token_id": 2}), tmp_path)
    words = sentencepiece("the cat sat on the mat and sailed over the sea again and again")
    words.save(str(folder / "tokenizer.json"))
    write_gguf(folder, folder / "model.gguf", name="tiny", begins=True)
    texts = ["the cat sat", "again — 海 the mat", "sea  over"]
    read = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    fields = GGUFReader(folder / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents()
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [2, 3, 3, 6]
    for text in texts:
        assert read(text, add_special_tokens=False)["input_ids"] == words.encode(text).ids
    if find_spec("llama_cpp"):
        from llama_cpp import Llama

        model = Llama(str(folder / "model.gguf"), vocab_only=True, verbose=False)
        assert [model.tokenize(text.encode(), add_bos=True) for text in texts] == [[1, *words.encode(text).ids] for text in texts]
        model.close()
