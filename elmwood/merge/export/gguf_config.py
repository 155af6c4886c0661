"""config.json as the keys of a GGUF file. What is not understood here is refused, since llama.cpp would compute something else.

D values of a head
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType

from elmwood.errors import BadInput
from elmwood.lm.pretrained import open_config
from elmwood.merge.export.gguf_vocabulary import CURE

# transformers' model_type -> llama.cpp's architecture
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "mixtral": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3, "qwen3_moe": MODEL_ARCH.QWEN3MOE, "olmo2": MODEL_ARCH.OLMO2,
}  # fmt: skip

# What is understood of a config: what goes into the file or is checked below,
UNDERSTOOD = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id", "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "quantization_config",
}  # fmt: skip
# and what has no say in a forward pass. Any other setting of the class must be what the class takes by default,
SILENT = {
    "architectures", "model_type", "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype",
    "initializer_range", "use_cache", "attention_dropout", "pretraining_tp", "router_aux_loss_coef", "router_jitter_noise",
    "output_router_logits", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type",
    "is_encoder_decoder", "chunk_size_feed_forward", "auto_map",
}  # fmt: skip
# and these, which other classes compute with, must say nothing in one that does not.
FOREIGN = {
    "embedding_multiplier": 1, "residual_multiplier": 1, "attention_multiplier": None, "logits_scaling": 1, "logit_scale": 1,
    "scale_emb": 1, "scale_depth": None, "dim_model_base": None, "query_pre_attn_scalar": None, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "clip_qkv": None, "partial_rotary_factor": 1, "use_qk_norm": False, "qk_layernorm": False,
    "alibi": False, "parallel_attn": False,
}  # fmt: skip
# the settings of a kind of rotary positions, beside its base
ROTARY = {
    "default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor"),
}  # fmt: skip


def read_config(folder: Path) -> tuple[Any, MODEL_ARCH]:
    """The config of a transformers folder, and its architecture in llama.cpp. Raises BadInput where llama.cpp would compute otherwise."""
    config: Any = open_config(folder)
    if config.model_type not in ARCHITECTURES:
        raise BadInput(f"{config.model_type} models are not within reach of this exporter (it knows {', '.join(ARCHITECTURES)}): {CURE}")
    if getattr(config, "quantization_config", None):
        raise BadInput(f"{folder}: the weights are quantised (quantization_config): export a checkpoint in f32, f16 or bf16")
    _check_settings(config)
    if config.hidden_act not in ("silu", "swish"):
        raise _otherwise(config, "hidden_act", "silu")
    if getattr(config, "attention_bias", False) and config.model_type != "llama":
        raise _otherwise(config, "attention_bias", "none")
    if config.model_type == "qwen3_moe":
        if not config.norm_topk_prob and config.num_experts_per_tok < config.num_experts:
            raise BadInput(
                "norm_topk_prob is false, and llama.cpp always lets the weights of a token's experts sum to one: there it differs"
            )
        if config.decoder_sparse_step != 1 or config.mlp_only_layers:
            raise BadInput(f"some layers have no experts (decoder_sparse_step, mlp_only_layers): {CURE}")
    return config, ARCHITECTURES[config.model_type]


def _check_settings(config: Any) -> None:
    """Raises BadInput for a setting that this exporter does not understand."""
    said, plain = config.to_dict(), type(config)().to_dict()
    for name in sorted(said.keys() - UNDERSTOOD - SILENT):
        usual = plain.get(name, FOREIGN.get(name, said[name]))
        if said[name] is not None and said[name] != usual:
            raise _otherwise(config, name, usual)
    if strange := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise BadInput(f"config.json: layer_types has {sorted(strange)[0]!r}, which this exporter does not know: {CURE}")


def _otherwise(config: Any, name: str, there: Any) -> BadInput:
    return BadInput(
        f"config.json: {name} is {getattr(config, name)!r}, and llama.cpp's {config.model_type} computes with {there!r}; "
        "use --format transformers"
    )


def write_config(writer: GGUFWriter, config: Any) -> tuple[np.ndarray | None, list[str]]:
    """Sizes and positions; for Llama 3 the divisor of each rotary frequency [D / 2]. And sentences for the card. Raises BadInput."""
    heads, head = config.num_attention_heads, head_width(config)
    # llama.cpp attends to everything in these architectures; as far as a window reaches that is the same
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    context = min(config.max_position_embeddings, window or config.max_position_embeddings)
    short = f"Its context is {context} tokens, where the sliding window of the original begins: llama.cpp has none in this architecture."
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if config.model_type == "qwen3_moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    return _write_rotary(writer, config), [short] if context < config.max_position_embeddings else []


def head_width(config: Any) -> int:
    """D."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write_rotary(writer: GGUFWriter, config: Any) -> np.ndarray | None:
    """The base, and how positions are stretched. Raises BadInput."""
    said = {name: value for name, value in config.rope_parameters.items() if value is not None}
    kind = said.get("rope_type", "default")
    if kind not in ROTARY or (kind == "llama3" and ARCHITECTURES[config.model_type] is not MODEL_ARCH.LLAMA):
        raise BadInput(f"rotary positions of type {kind!r} in {config.model_type} are not within reach of this exporter: {CURE}")
    usual = {"partial_rotary_factor": 1.0, "truncate": True, "beta_fast": 32, "beta_slow": 1, "type": kind}
    for name in said.keys() - {"rope_type", "rope_theta", *ROTARY[kind]}:
        if said[name] != usual.get(name):
            raise BadInput(f"rotary positions of type {kind!r} with {name} {said[name]!r} are not within reach of this exporter: {CURE}")
    writer.add_rope_freq_base(said["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(said["factor"])
    elif kind == "yarn":
        factor, before = said["factor"], said["original_max_position_embeddings"]
        louder = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0  # what llama.cpp multiplies by, as transformers does by default
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(before)
        writer.add_rope_scaling_attn_factors(said.get("attention_factor", louder) / louder)
    elif kind == "llama3":
        width = head_width(config)
        frequency_N = said["rope_theta"] ** -(np.arange(0, width, 2) / width)
        turns_N = said["original_max_position_embeddings"] * frequency_N / (2 * np.pi)  # of each pair within the original context
        low, high = said["low_freq_factor"], said["high_freq_factor"]
        smooth_N = np.clip((turns_N - low) / (high - low), 0, 1)
        return (1 / (smooth_N + (1 - smooth_N) / said["factor"])).astype(np.float32)
    return None
