"""Shapes of published models, for seeds trained from scratch: configs of transformers, without their weights. Free of torch."""

from pathlib import Path
from typing import Any

from elmwood.errors import BadInput
from elmwood.lm.checkpoint import read_json

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True}
_SMOL = _LLAMA | {"max_position_embeddings": 8192, "rope_theta": 100000.0, "vocab_size": 49152}
_LLAMA_3 = _LLAMA | {
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "vocab_size": 128256, "head_dim": 64,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_PYTHIA = {
    "model_type": "gpt_neox", "rotary_pct": 0.25, "max_position_embeddings": 2048, "use_parallel_residual": True,
    "tie_word_embeddings": False, "vocab_size": 50304,
}  # fmt: skip
# dropout as published is 0.1 for both; a seed reads little text twice, and needs none
_GPT2 = {"model_type": "gpt2", "n_positions": 1024, "vocab_size": 50257, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_OPT = {"model_type": "opt", "max_position_embeddings": 2048, "vocab_size": 50272, "dropout": 0.0, "do_layer_norm_before": True}

SHAPES: dict[str, dict[str, Any]] = {  # name -> config as published, dropout aside; the vocabulary becomes that of the corpus' tokenizer
    "SmolLM2-135M": _SMOL | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                             "num_key_value_heads": 3, "initializer_range": 1 / 24},
    "SmolLM2-360M": _SMOL | {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
                             "num_key_value_heads": 5},
    "Llama-3.2-1B": _LLAMA_3 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                                "num_key_value_heads": 8},
    "Qwen2.5-0.5B": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
                     "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "vocab_size": 151936},
    "Pythia-70M": _PYTHIA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8},
    "Pythia-160M": _PYTHIA | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "Pythia-410M": _PYTHIA | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "GPT-2": _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "OPT-125M": _OPT | {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                        "word_embed_proj_dim": 768},
    "OPT-1.3B": _OPT | {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
                        "word_embed_proj_dim": 2048},
}  # fmt: skip


def names_shape(name: str) -> bool:
    """Whether this is the name of a shape or of a config's file."""
    return name.endswith(".json") or name.lower() in {one.lower() for one in SHAPES}


def find_shape(name: str) -> dict[str, Any]:
    """The config of a published model. Raises BadInput."""
    known = {one.lower(): one for one in SHAPES}
    if name.lower() not in known:
        raise BadInput(f"--like {name}: no such shape; choose among {', '.join(SHAPES)}, or give a config.json with --config")
    return SHAPES[known[name.lower()]]


def read_shape(path: str | Path) -> dict[str, Any]:
    """The config in a JSON file, or in the folder of a model. Raises BadInput, BadSeed."""
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise BadInput(f"--config {path}: there is no such file; give a config.json of transformers, or a shape with --like")
    return read_json(file)


def with_vocabulary(settings: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The config with a vocabulary of this size, whose token 0 is the separator; no other token is special."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    inner = settings.get("text_config")
    if isinstance(inner, dict):
        return settings | ids | {"text_config": inner | ids | {"vocab_size": vocabulary}}
    return settings | ids | {"vocab_size": vocabulary}
