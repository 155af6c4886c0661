"""Tiny checkpoints of many architectures, storage forms and tokenizers, with random weights: the rows of `architectures`."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from elmwood.corpus.tokens import train_tokenizer
from elmwood.lm.load import save_folder

VOCABULARY, CONTEXT = 320, 128
TEXTS = [f"Tree {n} grows {n * n} leaves, and its {n}th branch holds {n + 7} birds — or ménagerie 海." for n in range(24)]


class Case(NamedTuple):
    """A row of the matrix."""

    kind: str  # transformers' model_type
    settings: Mapping[str, Any] = {}
    form: Callable[[Path], None] | None = None  # changes the files of the checkpoint
    words: Callable[[], Tokenizer] | None = None  # its tokenizer, by default a byte-level one
    dtype: torch.dtype = torch.float32


# ---- configs ----------------------------------------------------------------------------------------------------

BASE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
ROPE3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def rope(**said: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **said}}


ARCHITECTURES: dict[str, Case] = {
    "Llama 1": Case("llama", {"num_key_value_heads": 4}),
    "Llama 2": Case("llama", rope(rope_type="linear", factor=4.0)),
    "Llama 3": Case("llama", {**rope(**ROPE3), "tie_word_embeddings": True}),
    "Llama with yarn": Case("llama", rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)),
    "Mistral": Case("mistral", {"sliding_window": 16}),
    "Mixtral": Case("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2": Case("qwen2"),
    "Qwen2-MoE": Case("qwen2_moe", {**FEW, "shared_expert_intermediate_size": 32}),
    "Qwen3": Case("qwen3"),
    "Qwen3-MoE": Case("qwen3_moe", {**FEW, "norm_topk_prob": True}),
    "Qwen3-Next": Case("qwen3_next", {
        **FEW, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    }),
    "Gemma": Case("gemma"),
    "Gemma 2": Case("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "Gemma 3": Case("gemma3_text", {**WINDOWS, "query_pre_attn_scalar": 8}),
    "Phi": Case("phi", {"num_key_value_heads": 4}),
    "Phi-3": Case("phi3", {"sliding_window": 16}),
    "Phi-3.5-MoE": Case("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "OPT-125M": Case("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "OPT-350M": Case("opt", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "GPT-1": Case("openai-gpt", GPT),
    "GPT-2": Case("gpt2", GPT),
    "GPT-Neo": Case("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16}),
    "GPT-J": Case("gptj", {**GPT, "rotary_dim": 4}),
    "GPT-NeoX": Case("gpt_neox"),
    "GPT-BigCode": Case("gpt_bigcode", GPT),
    "GPT-OSS": Case("gpt_oss", {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "CodeGen": Case("codegen", {**GPT, "rotary_dim": 4}),
    "CTRL": Case("ctrl", {**GPT, "dff": 64}),
    "BLOOM": Case("bloom", {"n_layer": 2, "n_head": 4}),
    "MPT": Case("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT}),
    "Falcon": Case("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "Falcon with ALiBi": Case("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False}),
    "Falcon-H1": Case("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
    "OLMo": Case("olmo"),
    "OLMo-2": Case("olmo2"),
    "OLMo-3": Case("olmo3", WINDOWS),
    "OLMoE": Case("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "StarCoder2": Case("starcoder2", {"sliding_window": 16}),
    "StableLM": Case("stablelm"),
    "Granite": Case("granite", {"logits_scaling": 8.0, "residual_multiplier": 0.3, "embedding_multiplier": 12.0}),
    "Granite-MoE": Case("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Cohere": Case("cohere"),
    "Cohere 2": Case("cohere2", WINDOWS),
    "SmolLM3": Case("smollm3", {"no_rope_layers": [1, 0]}),
    "DeepSeek-V2": Case("deepseek_v2", {**LATENT, "head_dim": 8}),
    "DeepSeek-V3": Case("deepseek_v3", {**LATENT, "head_dim": 8}),
    "dots.llm1": Case("dots1", {"n_shared_experts": 1, **{key: LATENT[key] for key in LATENT if not re.search("lora|qk|v_head", key)}}),
    "GLM": Case("glm"),
    "GLM-4": Case("glm4"),
    "EXAONE 4": Case("exaone4", WINDOWS),
    "Nemotron": Case("nemotron"),
    "Persimmon": Case("persimmon"),
    "Helium": Case("helium"),
    "ERNIE 4.5": Case("ernie4_5"),
    "Hunyuan": Case("hunyuan_v1_dense"),
    "Seed-OSS": Case("seed_oss"),
    "Apertus": Case("apertus"),
    "Arcee": Case("arcee"),
    "BitNet": Case("bitnet"),
    "Llama 4": Case("llama4_text", {
        "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "attention_chunk_size": 16,
        "interleave_moe_layer_step": 2,
    }),
    "MiniMax": Case("minimax", {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 16}),
    "XGLM": Case("xglm", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}),
    "BioGPT": Case("biogpt"),
    "BERT as a decoder": Case("bert", {"is_decoder": True}),
    "LFM2": Case("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "RecurrentGemma": Case("recurrent_gemma", {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3}),
    "Jamba": Case("jamba", {
        "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "use_mamba_kernels": False, "mamba_d_state": 8,
    }),
    "Bamba": Case("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}),
    "Mamba": Case("mamba", {"state_size": 8}),
    "Mamba-2": Case("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2}),
    "RWKV": Case("rwkv", {"attention_hidden_size": 32, "context_length": CONTEXT}),
}  # fmt: skip


def config(case: Case) -> Any:
    """The config of a row: the sizes above, as far as the architecture has such fields."""
    known = AutoConfig.for_model(case.kind).to_dict()
    base = {key: value for key, value in BASE.items() if key in known or (key.endswith("_token_id") or case.kind == "gemma")}
    return AutoConfig.for_model(case.kind, **base | dict(case.settings))


# ---- storage forms ----------------------------------------------------------------------------------------------


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Other tensors in the file of a checkpoint."""
    save_file({name: one.contiguous().clone() for name, one in how(load_file(folder / "model.safetensors")).items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip


def without(prefix: str) -> Callable[[Path], None]:
    """Names as the trunk alone saves them."""
    return lambda folder: change(folder, lambda found: {name.removeprefix(prefix): one for name, one in found.items()})


def with_more(**more: torch.Tensor) -> Callable[[Path], None]:
    """Tensors that are no parameters of the model."""
    return lambda folder: change(folder, lambda found: found | {name.replace("__", "."): one for name, one in more.items()})


def shard(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink()


def with_head(folder: Path) -> None:
    """A tied model whose file holds the head as well."""
    change(folder, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"]})


def mix_dtypes(folder: Path) -> None:
    """Norms in float32, matrices in bf16 and float16."""
    change(folder, lambda found: {
        name: one.to(torch.float32 if one.dim() < 2 else torch.bfloat16 if n % 2 else torch.float16)
        for n, (name, one) in enumerate(sorted(found.items()))
    })  # fmt: skip


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


MASKS = {f"transformer__h__{n}__attn__bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril() for n in range(2)}
TURNS = {f"model__layers__{n}__self_attn__rotary_emb__inv_freq": torch.ones(4) for n in range(2)}
VALUE = {"v_head__summary__weight": torch.ones(1, 32), "v_head__summary__bias": torch.ones(1)}
TIED = {"tie_word_embeddings": True}

FORMS: dict[str, Case] = {
    "GPT-2 with hub names": Case("gpt2", GPT, without("transformer.")),
    "GPT-2 with stored masks": Case("gpt2", GPT, with_more(**MASKS)),
    "OPT-6.7B: names of the trunk": Case("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, without("model.")),
    "OPT-350M: names of the trunk": Case(
        "opt", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, without("model.")
    ),
    "BLOOM with hub names": Case("bloom", {"n_layer": 2, "n_head": 4}, without("transformer.")),
    "Llama in shards": Case("llama", {}, shard),
    "Llama, tied": Case("llama", TIED),
    "Llama, tied, with a stored head": Case("llama", TIED, with_head),
    "Llama with stored frequencies": Case("llama", {}, with_more(**TURNS)),
    "Llama with a value head": Case("llama", {}, with_more(**VALUE)),
    "Llama in bf16": Case("llama", {}, dtype=torch.bfloat16),
    "Llama in float16": Case("llama", {}, dtype=torch.float16),
    "Llama in three dtypes": Case("llama", {}, mix_dtypes, dtype=torch.bfloat16),
    "Llama, pickled only": Case("llama", {}, pickle_only),
}  # fmt: skip


# ---- tokenizers -------------------------------------------------------------------------------------------------


def byte_level() -> Tokenizer:
    return train_tokenizer(TEXTS, VOCABULARY)


def tiktoken_like() -> Tokenizer:
    """Byte-level BPE cut by a pattern, words that are whole tokens taken first: Llama 3, Qwen."""
    made = byte_level()
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made.pre_tokenizer = pre_tokenizers.Sequence([  # type: ignore[assignment]
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return _with(made, lambda spec: spec["model"].update(ignore_merges=True))


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def sentencepiece_bpe() -> Tokenizer:
    """BPE that falls back to bytes: Llama 2, Mistral, Gemma."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return _with(made, lambda spec: spec.update(added_tokens=[one for one in spec["added_tokens"] if one["id"] < len(SPECIAL)]))


def sentencepiece_unigram() -> Tokenizer:
    """Unigram pieces with bytes beside them: XGLM, ALBERT's kind."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])  # type: ignore[assignment]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXTS, trainer)

    def add_bytes(spec: dict[str, Any]) -> None:
        spec["model"]["vocab"] += [[one, -20.0] for one in BYTES]
        spec["model"]["byte_fallback"] = True

    return _with(made, add_bytes)


def word_pieces() -> Tokenizer:
    """BERT's."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    made.decoder = decoders.WordPiece()  # type: ignore[assignment]
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=["[UNK]"], show_progress=False))
    return made


def _with(made: Tokenizer, update: Callable[[dict[str, Any]], None]) -> Tokenizer:
    spec = json.loads(made.to_str())
    update(spec)
    return Tokenizer.from_str(json.dumps(spec))


TOKENIZERS: dict[str, Case] = {
    "Tokenizer: byte-level BPE": Case("llama"),
    "Tokenizer: byte-level BPE, tiktoken's pattern": Case("llama", words=tiktoken_like),
    "Tokenizer: sentencepiece BPE, bytes": Case("llama", words=sentencepiece_bpe),
    "Tokenizer: sentencepiece Unigram, bytes": Case("llama", words=sentencepiece_unigram),
    "Tokenizer: WordPiece": Case("llama", words=word_pieces),
}
CASES = ARCHITECTURES | FORMS | TOKENIZERS


# ---- as it comes from elsewhere -----------------------------------------------------------------------------------


def make_checkpoint(case: Case, folder: Path) -> None:
    """A folder as it would come from elsewhere, with weights large enough to disagree."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config(case), dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0) if weight.dim() > 1 else weight.add_(0.1 * torch.randn_like(weight))
    folder.mkdir(parents=True)
    save_folder(model.to(case.dtype), (case.words or byte_level)(), folder)
    if case.form:
        case.form(folder)
