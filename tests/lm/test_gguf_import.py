"""GGUF files become seeds that say what the original says, or are refused for the key or tensor that is not understood."""

import json
import re
import struct

import numpy as np
import pytest
import torch
from tiny_configs import SMALL, some_tokens
from tiny_models import louder, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from elmwood.errors import BadSeed
from elmwood.lm.files import seed_folder, tokenizer
from elmwood.lm.load import import_seed, load_model, save_folder

gguf = pytest.importorskip("gguf")
from elmwood.lm.importing.gguf_rotary import llama3, llama3_divisors  # noqa: E402
from elmwood.merge.export.gguf import write_gguf  # noqa: E402

BASE = {**SMALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
UNTIED = {**BASE, "tie_word_embeddings": False}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


def scaled(rope_type, **how):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **how}}


LLAMA3 = scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = scaled("yarn", factor=4.0, original_max_position_embeddings=16)
CONFIGS = {
    "llama": LlamaConfig(**UNTIED, rms_norm_eps=1e-3),
    "tied": LlamaConfig(**BASE, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 777.0}),
    "llama3": LlamaConfig(**UNTIED, **LLAMA3),
    "linear": LlamaConfig(**UNTIED, **scaled("linear", factor=4.0)),
    "biases": LlamaConfig(**UNTIED, attention_bias=True, mlp_bias=True),
    "wide heads": LlamaConfig(**UNTIED, head_dim=16),
    "mistral": MistralConfig(**UNTIED, sliding_window=None),
    "mixtral": MixtralConfig(**UNTIED, num_local_experts=4),
    "qwen2": Qwen2Config(**UNTIED),
    "qwen3": Qwen3Config(**UNTIED, head_dim=16),
    "qwen3_moe": Qwen3MoeConfig(**UNTIED, **EXPERTS, head_dim=16),
    "olmo2": Olmo2Config(**UNTIED),
}


def build(config, folder):
    torch.manual_seed(5)
    model = louder(AutoModelForCausalLM.from_config(config).eval(), 4.0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
    save_folder(model, tiny_tokenizer(), folder)
    return model


def says(model):
    with torch.inference_mode():
        return model(some_tokens(2, 60)).logits.log_softmax(-1)


def same(seed, model, store):
    torch.testing.assert_close(says(load_model(seed, store, device="cpu")), says(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CONFIGS)
def test_what_the_exporter_writes_is_read_back(case, tmp_path, store):
    model = build(CONFIGS[case], tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", name="x", dtype="F32")
    seed = import_seed(str(tmp_path / "model.gguf"), store)
    same(seed, model, store)
    assert seed.context == 64
    if case != "mistral":  # a Llama to llama.cpp, and without a window the same
        assert seed.architecture == model.config.architectures[0]
    assert tokenizer(seed, store).to_str() == tiny_tokenizer().to_str()
    assert json.loads((seed_folder(seed, store) / "tokenizer_config.json").read_bytes())["eos_token"] == "<|endoftext|>"


def rewrite(path, out, keys=(), tensors=None, **more):
    """A GGUF file again, with other keys: (name, value, type)."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture" or field.name in more.get("without", ()):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(field.name, field.contents())
        else:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for name, value, kind in keys:
        writer.add_key_value(name, value, getattr(gguf.GGUFValueType, kind))
    for one in reader.tensors if tensors is None else tensors:
        writer.add_tensor(one.name, np.array(one.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A Llama, and its GGUF file."""
    folder = tmp_path_factory.mktemp("plain")
    build(CONFIGS["llama"], folder)
    write_gguf(folder, folder / "model.gguf", name="x", dtype="F32")
    return folder


def test_yarn_is_read(plain, tmp_path, store):
    keys = [("llama.rope.scaling.type", "yarn", "STRING"), ("llama.rope.scaling.factor", 4.0, "FLOAT32")]
    keys += [("llama.rope.scaling.original_context_length", 16, "UINT32")]
    rewrite(plain / "model.gguf", tmp_path / "yarn.gguf", keys)
    stretched = LlamaConfig(**UNTIED, rms_norm_eps=1e-3, **YARN)
    model = AutoModelForCausalLM.from_pretrained(plain, config=stretched, dtype=torch.float32)
    same(import_seed(str(tmp_path / "yarn.gguf"), store), model, store)


def test_the_parts_of_a_split_file_are_one_seed(plain, tmp_path, store):
    tensors = gguf.GGUFReader(plain / "model.gguf").tensors
    for number, part in enumerate((tensors[:9], tensors[9:])):
        keys = [("split.no", number, "UINT16"), ("split.count", 2, "UINT16"), ("split.tensors.count", len(tensors), "INT32")]
        rewrite(plain / "model.gguf", tmp_path / f"m-0000{number + 1}-of-00002.gguf", keys, part)
    seed = import_seed(str(tmp_path / "m-00002-of-00002.gguf"), store)
    same(seed, AutoModelForCausalLM.from_pretrained(plain), store)
    (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "alone.gguf")
    for name in ("alone", "m-00002-of-00002"):
        with pytest.raises(BadSeed, match="parts"):
            import_seed(str(tmp_path / f"{name}.gguf"), store)


STRANGE = {
    "the key logit_scale": ([("llama.logit_scale", 2.0, "FLOAT32")], ()),
    "positions of type 'longrope'": ([("llama.rope.scaling.type", "longrope", "STRING")], ()),
    "rope.scaling.yarn_ext_factor": ([("llama.rope.scaling.yarn_ext_factor", 0.5, "FLOAT32")], ()),
    "rope.dimension_count is 4": ([("llama.rope.dimension_count", 4, "UINT32")], ("llama.rope.dimension_count",)),
    "pre 'viking'": ([("tokenizer.ggml.pre", "viking", "STRING")], ("tokenizer.ggml.pre",)),
    "kind 'bert'": ([("tokenizer.ggml.model", "bert", "STRING")], ("tokenizer.ggml.model",)),
    "vocab_size is 7": ([("llama.vocab_size", 7, "UINT32")], ("llama.vocab_size",)),
}


@pytest.mark.parametrize("complaint", STRANGE)
def test_a_key_that_is_not_understood_is_refused(complaint, plain, tmp_path, store):
    keys, without = STRANGE[complaint]
    rewrite(plain / "model.gguf", tmp_path / "x.gguf", keys, without=without)
    with pytest.raises(BadSeed, match=complaint):
        import_seed(str(tmp_path / "x.gguf"), store)


def header(tensors, keys, rest=b""):
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys) + rest


def key(kind, form, *values):
    return struct.pack("<Q1sI" + form, 1, b"a", kind, *values)


ENDLESS = 1 << 60
LYING = {
    "more than 4194304 values": header(0, 1, key(9, "IQ", 0, ENDLESS)),
    "of type 9": header(0, 1, key(9, "IQ", 9, 5)),
    "keys and 0 tensors": header(0, ENDLESS),
    "0 keys and": header(ENDLESS, 0),
    "a text of it has": header(0, 1, key(8, "Q", ENDLESS)),
    "is cut short": header(0, 1, key(9, "IQ", 0, 1000)),
    "of type 99": header(0, 1, key(99, "")),
    "dimensions": header(1, 0, struct.pack("<Q1sI", 1, b"t", 1 << 30)),
    "begins like no": b"GGUF" + bytes(20),
    "zero power of two": header(0, 1, struct.pack("<Q17sII", 17, b"general.alignment", 4, 0)),
}


@pytest.mark.parametrize("complaint", LYING)
def test_a_header_that_lies_is_refused_before_the_library_reads_it(complaint, tmp_path, store):
    (tmp_path / "x.gguf").write_bytes(LYING[complaint])
    with pytest.raises(BadSeed, match=complaint):
        import_seed(str(tmp_path / "x.gguf"), store)


def test_tensors_too_few_or_too_many_are_refused(plain, tmp_path, store):
    tensors = gguf.GGUFReader(plain / "model.gguf").tensors
    rewrite(plain / "model.gguf", tmp_path / "few.gguf", (), [one for one in tensors if one.name != "blk.1.ffn_up.weight"])
    with pytest.raises(BadSeed, match=r"no tensor for model\.layers\.1\.mlp\.up_proj"):
        import_seed(str(tmp_path / "few.gguf"), store)
    rewrite(plain / "model.gguf", tmp_path / "many.gguf", (), [*tensors, tensors[-1]._replace(name="blk.0.attn_rot_embd.weight")])
    with pytest.raises(BadSeed, match=r"first blk\.0\.attn_rot_embd"):
        import_seed(str(tmp_path / "many.gguf"), store)
    (tmp_path / "cut.gguf").write_bytes((plain / "model.gguf").read_bytes()[:9000])
    with pytest.raises(BadSeed, match="damaged"):
        import_seed(str(tmp_path / "cut.gguf"), store)


ENDS = ("bos", "eos", "unknown", "padding")
WORDLESS = {  # what is wrong with its tokenizer -> the tokens that are in place of the last ones, the separator that is asked for
    "no token 'nope'": ((), "nope"),
    "no <|endoftext|>": (("</s>",), None),
    "ids up to": (("more",), 3),
}


@pytest.mark.parametrize("complaint", WORDLESS)
def test_refusals_of_a_tokenizer_name_the_file_that_was_given(complaint, plain, tmp_path, store):
    """Not the folder that it was converted into, which is gone by then."""
    more, separator = WORDLESS[complaint]
    words = [str(token) for token in gguf.GGUFReader(plain / "model.gguf").fields["tokenizer.ggml.tokens"].contents()]
    words = [*words, *more] if separator == 3 else [*more, *words[len(more) :]]
    keys = [("tokenizer.ggml.tokens", words, "ARRAY"), ("tokenizer.ggml.token_type", [1] * len(words), "ARRAY")]
    path = tmp_path / "given.gguf"
    rewrite(plain / "model.gguf", path, keys, without={name for name, *_ in keys} | {f"tokenizer.ggml.{one}_token_id" for one in ENDS})
    with pytest.raises(BadSeed, match=complaint) as caught:
        import_seed(str(path), store, separator=separator)
    assert str(caught.value).startswith(f"{path}: ")
    assert not re.search(r"/tmp\w{8}\b", str(caught.value))


# ---- architectures that only llama.cpp's own converter writes ----------------------------------------------------


def write_as_llama_cpp(model, folder, name, keys, tensor):
    """What convert_hf_to_gguf.py writes, as far as it matters: its names of tensors, with `tensor(there, value)` as it changes them."""
    names = gguf.get_tensor_name_map({there: arch for arch, there in gguf.MODEL_ARCH_NAMES.items()}[name], 2)
    words = json.loads(tiny_tokenizer().to_str())["model"]
    writer = gguf.GGUFWriter(folder / "model.gguf", name)
    for key, value in keys.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{name}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_types([3] + [1] * (len(words["vocab"]) - 1))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_eos_token_id(0)
    for key, value in model.state_dict().items():
        if key != "lm_head.weight":
            there = names.get_name(key, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(there, np.ascontiguousarray(tensor(there, value.numpy())))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


COMMON = {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48, "attention.head_count": 4}
GEMMA = COMMON | {
    "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 8,
    "attention.layer_norm_rms_epsilon": 1e-6,
}  # fmt: skip
CAPS = {"attn_logit_softcapping": 7.0, "final_logit_softcapping": 9.0}
FEW = {**BASE, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemma_keeps_its_windows_and_caps(name, tmp_path, store):
    if name == "gemma2":
        config, keys = Gemma2Config(**FEW, **CAPS), GEMMA | CAPS
    else:
        near = {"rope_type": "default", "rope_theta": 10000.0}
        rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": near}
        config = Gemma3TextConfig(**FEW, rope_parameters=rope, layer_types=["sliding_attention", "sliding_attention"])
        keys = GEMMA | {"rope.freq_base": 1e6, "rope.scaling.factor": 8.0}
    model = build(config, tmp_path)
    write_as_llama_cpp(model, tmp_path, name, keys, lambda there, value: value + 1 if there.endswith("norm.weight") else value)
    if name == "gemma3":
        rewrite(tmp_path / "model.gguf", tmp_path / "again.gguf", [("gemma3.rope.scaling.type", "linear", "STRING")])
        (tmp_path / "again.gguf").rename(tmp_path / "model.gguf")
    same(import_seed(str(tmp_path / "model.gguf"), store), model, store)


def test_gpt2_has_its_matrices_turned_back(tmp_path, store):
    model = build(GPT2Config(vocab_size=SMALL["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48), tmp_path)

    def turn(there, value):
        return value.T if there.endswith(("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")) else value

    write_as_llama_cpp(model, tmp_path, "gpt2", COMMON | {"attention.layer_norm_epsilon": 1e-5}, turn)
    same(import_seed(str(tmp_path / "model.gguf"), store), model, store)


# ---- words and rotary positions ----------------------------------------------------------------------------------

TEXTS = [
    "the cat sat on the mat", " leading space", "two  spaces", "12345 and 7", "tab\tand\nnewline\n\nend ", "it's we'll I'M",
    "naïve café 海 猫 🙂", "punct!!! ...—“q”", "1,234.5%", "camelCase_and_snake", "\r\nwindows", "a\u00a0b",
]  # fmt: skip


def sentencepiece_like():
    """As Llama 2's tokenizer.json."""
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False))
    spec = json.loads(words.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    words = Tokenizer.from_str(json.dumps(spec))
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return words


def byte_level(cut):
    words = tiny_tokenizer()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut == "smollm")
    regex = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    regex = regex if cut == "llama-bpe" else regex.replace("{1,3}", "")
    first = pre_tokenizers.Digits(individual_digits=True) if cut == "smollm" else pre_tokenizers.Split(Regex(regex), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    if cut == "qwen2":
        words.normalizer = normalizers.NFC()
    return words


@pytest.mark.parametrize("kind", ["sentencepiece", "smollm", "llama-bpe", "qwen2"])
def test_text_is_cut_as_by_the_original_tokenizer(kind, tmp_path, store):
    build(CONFIGS["llama"], tmp_path)
    words = sentencepiece_like() if kind == "sentencepiece" else byte_level(kind)
    words.save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} if kind == "sentencepiece" else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    write_gguf(tmp_path, tmp_path / "model.gguf", name="x")
    seed = import_seed(str(tmp_path / "model.gguf"), store)
    read = tokenizer(seed, store)
    assert seed.separator == (1 if kind == "sentencepiece" else 0)
    assert all("unk" not in piece for text in TEXTS for piece in words.encode(text).tokens)
    for text in TEXTS:
        assert read.encode(text, add_special_tokens=False).ids == words.encode(text, add_special_tokens=False).ids
        assert read.decode(read.encode(text).ids) == words.decode(words.encode(text).ids)


@pytest.mark.parametrize(
    ("low", "high", "original", "width"),
    [(1.0, 4.0, 8192, 64), (2.0, 5.0, 500, 32), (2.0, 9.0, 500, 64), (1.0, 4.0, 32, 8), (1.0, 1.1, 900, 8)],
)
def test_llama3_settings_follow_from_the_divisors(low, high, original, width, tmp_path):
    divisor_N = llama3_divisors(5e5, width, 32.0, low, high, original).astype(np.float32).astype(float)
    found = llama3(divisor_N, 5e5, width, tmp_path)
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    np.testing.assert_allclose(llama3_divisors(5e5, width, *(found[name] for name in names)), divisor_N, rtol=1e-5)
    with pytest.raises(BadSeed, match="not a Llama 3 scaling"):
        llama3(divisor_N[::-1], 5e5, width, tmp_path)
