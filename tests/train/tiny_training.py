"""Small recipes, models and packed documents that the tests of training share."""

import numpy as np
import torch
import transformers

from elmwood.corpus.tokens import Packed
from elmwood.records import Recipe, Shape

SHAPE = Shape(layers=2, width=32, heads=2, feed_forward=64, vocabulary=300, context=64)

SEED_RECIPE = Recipe(steps=6, batch=4, length=32, learning_rate=3e-3)

FULL = Recipe(steps=12, batch=4, length=32, learning_rate=1e-3)

LORA = Recipe(method="lora", rank=4, steps=12, batch=4, length=32, learning_rate=1e-2)


def packed_of(*sizes: int) -> Packed:
    """Documents whose tokens are all different: the separator 0, then 1, 2, 3 …"""
    starts = np.cumsum([0, *sizes[:-1]])
    tokens = np.arange(1, sum(sizes) + 1, dtype=np.uint16)
    tokens[starts] = 0
    return Packed(tokens, starts.astype(np.int64), 0)


def tiny(kind: str, **extra) -> transformers.PreTrainedModel:
    """A random model of another architecture, dropout off, weights large enough that attention matters."""
    config = transformers.AutoConfig.for_model(kind, **extra)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 64,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
OPT |= {"word_embed_proj_dim": 32, "dropout": 0.0}

BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}

MODELS = {"llama": LLAMA, "qwen3": LLAMA | {"head_dim": 16}, "gemma2": LLAMA | {"head_dim": 16}, "gpt2": GPT2, "opt": OPT, "bloom": BLOOM}
