"""Small configs of several architectures, and tokens, that the tests of models share."""

import torch
from tiny_models import SHAPE
from transformers import (
    Gemma3TextConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

SMALL = {"vocab_size": SHAPE.vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}

GROUPED = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


CONFIGS = {
    "opt": OPTConfig(**SMALL, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=16),
    "mistral": MistralConfig(**SMALL, **GROUPED, sliding_window=5),
    "qwen3": Qwen3Config(**SMALL, **GROUPED),
    "gemma3": Gemma3TextConfig(**SMALL, **GROUPED, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
}


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, SHAPE.vocabulary, shape, generator=torch.Generator().manual_seed(sum(shape)))
