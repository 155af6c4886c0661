"""What fits on which GPU: the recipe that trains most of a seed in its memory, for seeds of common shapes. Their configs are enough."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from elmwood.lm.pretrained import make_config
from elmwood.records import Recipe
from elmwood.train.fit.formulas import Anatomy, anatomy, components

MEMORY = (8, 12, 16, 24, 80)  # GB
FREE = 0.1  # share of a card, for what the formulas miss
LENGTH, ROWS, RANK = 2048, 8, 16
LLAMA = {"model_type": "llama", "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
SEEDS: dict[str, dict[str, Any]] = {  # name -> config, as published
    "0.1B (SmolLM2-135M)": LLAMA | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                                    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1B (Llama 3.2)": LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                               "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "3B (Llama 3.2)": LLAMA | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
                               "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7B (OPT-6.7B)": {"model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
                      "vocab_size": 50272, "word_embed_proj_dim": 4096},
    "13B (Llama 2)": LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
                              "num_key_value_heads": 40, "vocab_size": 32000},
}  # fmt: skip


class CardRecipe(NamedTuple):
    """A recipe and the bytes that it needs."""

    recipe: Recipe
    total: int


def recipes() -> Iterator[Recipe]:
    """From the recipe that trains most, fastest, to the one that needs least memory: all with 8 rows of 2,048 tokens, one row a pass."""
    base = Recipe(steps=1, batch=ROWS, accumulate=ROWS, length=LENGTH, rank=RANK)
    for method in ("full", "lora", "qlora"):
        for more in ({}, {"checkpointing": True}, {"checkpointing": True, "optimiser": "adamw8bit"}):
            yield base.model_copy(update={"method": method, **more})


def best(body: Anatomy, memory: int) -> CardRecipe | None:
    """The first of these recipes that fits a GPU with so many bytes and leaves a tenth free."""
    tried = (CardRecipe(recipe, sum(components(body, recipe, "cuda").values())) for recipe in recipes())
    return next((choice for choice in tried if choice.total <= (1 - FREE) * memory), None)


def gpu_table() -> list[tuple[str, list[CardRecipe | None]]]:
    """Each seed, and the recipe for each card."""
    found = []
    for name, config in SEEDS.items():
        body = anatomy(make_config(config))
        found.append((name, [best(body, memory * 10**9) for memory in MEMORY]))
    return found
