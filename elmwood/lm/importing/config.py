"""The config of a model made elsewhere: whether it is a causal LM of text, and how many positions it has."""

from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from elmwood.errors import BadSeed
from elmwood.lm.checkpoint import said
from elmwood.lm.pretrained import open_config

# fields that say how many positions a model was built for, in the order in which they are believed
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length", "context_length")
SHIFTED = ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text", "xmod")
UNLIMITED = 2048  # positions of a model that names none (ALiBi, recurrent): what BLOOM and Mamba were trained with


def read_config(folder: Path) -> Any:
    """The folder's config, which must be that of a causal LM of text in transformers. Raises BadSeed."""
    return check_causal(open_config(folder), folder)


def check_causal(config: Any, folder: object) -> Any:
    """The config found in `folder`, with the name of its class, if it is that of a causal LM of text. Raises BadSeed."""
    default = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = config.architectures or [default or "model without a language head"]
    name = named[0] if isinstance(named, list) and isinstance(named[0], str) else str(named)[:80]
    if name in _names(MODEL_MAPPING_NAMES.get(config.model_type)):  # saved from the trunk; the weights tell whether the head is tied
        name = default or name
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)  # BERT as published
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or masked or config.is_encoder_decoder:
        raise BadSeed(
            f"{folder} holds a {said(name)}: a seed is a causal LM (LlamaForCausalLM, OPTForCausalLM, …) that predicts the next token"
        )
    if default and name != default:  # transformers goes by the type, other programs by the name, and merges by both
        raise BadSeed(
            f"{folder}: its config.json says model_type {config.model_type}, which is a {default}, and architectures {name}: "
            "they are those of two models; correct the one that is wrong"
        )
    parts = (part for part in config.sub_configs if part != "text_config")  # those without a type are parts of the language model (MPT)
    if others := sorted(part for part in parts if getattr(getattr(config, part, None), "model_type", "")):
        raise BadSeed(
            f"{folder} holds a {name} that reads more than text ({', '.join(others)}): "
            "save its language model alone, as the causal LM of its text_config, and import that"
        )
    config.architectures = [name]
    return config


def _names(found: Any) -> tuple[str, ...]:
    return (found,) if isinstance(found, str) else tuple(found or ())


def context_of(config: Any) -> int | None:
    """The positions a model was built for; None where its config names none."""
    text = config.get_text_config()
    found = (getattr(text, field, None) for field in POSITIONS)
    most = next((value for value in found if isinstance(value, int) and value > 1), None)
    # these count their positions from the padding token's id on
    return most - text.pad_token_id - 1 if most and text.model_type in SHIFTED and text.pad_token_id is not None else most
