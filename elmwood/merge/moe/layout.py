"""Dense architectures and the mixtures of experts they become: configs, and the tensor names that loaders expect on disk.

A class fills in what a config leaves out, and the classes of a mixture fill in other things than those of its dense parent: rotary
base, epsilon of the norms, normalisation of the top-k weights, token ids. So everything is spelled out here.

E experts, H width, I width of a feed-forward layer
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from elmwood.errors import BadInput, BadSeed
from elmwood.weights.tensors import StoredTensor

PARTS = ("gate_proj", "up_proj", "down_proj")
FEED_FORWARD = re.compile(r"(?P<layer>.*\.layers\.(?P<number>\d+))\.mlp\.(?P<part>gate_proj|up_proj|down_proj)\.weight")

# what transformers' dense classes take where config.json is silent
COMMON: dict[str, Any] = {
    "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "tie_word_embeddings": False, "attention_dropout": 0.0,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "rope_theta": 10000.0, "num_key_value_heads": None, "head_dim": None,
}  # fmt: skip
LLAMA = COMMON | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
MISTRAL = COMMON | {
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 8,
    "sliding_window": 4096,
}  # fmt: skip
QWEN3 = COMMON | {
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False,
}  # fmt: skip
OLMO2 = COMMON | {
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "pad_token_id": 1, "eos_token_id": 50279, "attention_bias": False,
}  # fmt: skip
DROPPED = ("mlp_bias", "pretraining_tp", "auto_map", "layer_types", "max_window_layers")  # of the dense classes alone


class Family(NamedTuple):
    """A dense architecture and its mixture."""

    silent: Mapping[str, Any]  # what the dense class takes where its config says nothing
    architecture: str  # of the mixture
    model_type: str
    block: str  # the module that holds gate and experts
    names: tuple[str, str, str]  # of gate_proj, up_proj, down_proj in an expert
    experts: str  # the config's word for their number
    fixed: Mapping[str, Any]  # further settings of the mixture


MIXTRAL = ("MixtralForCausalLM", "mixtral", "block_sparse_moe", ("w1", "w3", "w2"), "num_local_experts")
NORMALISED = {"norm_topk_prob": True}  # without it a mixture of copies is weaker than what was copied
FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA, *MIXTRAL, {"sliding_window": None}),
    "mistral": Family(MISTRAL, *MIXTRAL, {}),
    "qwen3": Family(
        QWEN3, "Qwen3MoeForCausalLM", "qwen3_moe", "mlp", PARTS, "num_experts",
        NORMALISED | {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "sliding_window": None},
    ),
    "olmo2": Family(OLMO2, "FlexOlmoForCausalLM", "flex_olmo", "mlp", PARTS, "num_experts", NORMALISED),
}  # fmt: skip


def family_of(config: Mapping[str, Any]) -> Family:
    """Raises BadSeed where there is no standard mixture for an architecture, or none with one of its settings."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise BadSeed(
            f"no standard mixture has {kind!r} layers; {', '.join(sorted(FAMILIES))} seeds have one: use an ensemble or a merge instead"
        )
    family = FAMILIES[kind]
    unknown = ["mlp_bias", "use_sliding_window", "quantization_config", *([] if "attention_bias" in family.silent else ["attention_bias"])]
    if wrong := next((name for name in unknown if config.get(name)), None):
        raise BadSeed(f"{wrong} is on in this seed, and {family.architecture} has no such thing: use an ensemble or a merge instead")
    return family


def mixed_config(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    """The config.json of a mixture, from that of its seed. Raises BadSeed, BadInput."""
    family = family_of(config)
    if not 1 <= top_k <= experts:
        raise BadInput(f"top-{top_k} of {experts} experts: choose between 1 and {experts}")
    said = {**family.silent, **config}
    said = {key: value for key, value in said.items() if not key.startswith("_") and key not in DROPPED}
    said["num_key_value_heads"] = said["num_key_value_heads"] or said["num_attention_heads"]
    said["head_dim"] = said["head_dim"] or said["hidden_size"] // said["num_attention_heads"]
    rope = said.get("rope_parameters") or {"rope_type": "default", **(said.get("rope_scaling") or {}), "rope_theta": said["rope_theta"]}
    said |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}  # the second is what older loaders read
    said |= {"architectures": [family.architecture], "model_type": family.model_type, **family.fixed}
    said |= {family.experts: experts, "num_experts_per_tok": top_k, "output_router_logits": False}
    if family.model_type == "qwen3_moe":
        said["moe_intermediate_size"] = said["intermediate_size"]
    return said


class Cell(NamedTuple):
    """One tensor of a mixture and what it comes from."""

    name: str
    source: str  # the seed's tensor; for a gate, the name of its layer
    expert: int | None  # None: shared by all
    shape: tuple[int, ...]
    dtype: str
    gate: bool = False


def cells(family: Family, tensors: Mapping[str, StoredTensor], experts: int) -> list[Cell]:
    """Every tensor of a mixture: gates first, then what is shared, then the experts layer by layer. Raises BadSeed."""
    gates: dict[str, Cell] = {}
    shared: list[Cell] = []
    split: list[Cell] = []
    for name, place in tensors.items():
        match = FEED_FORWARD.fullmatch(name)
        if not match:
            shared.append(Cell(name, name, None, place.shape, place.dtype))
            continue
        top = f"{match['layer']}.{family.block}"
        if match["part"] == "gate_proj":
            gates[match["layer"]] = Cell(f"{top}.gate.weight", match["layer"], None, (experts, place.shape[1]), place.dtype, True)
        part = family.names[PARTS.index(match["part"])]
        split += [Cell(f"{top}.experts.{e}.{part}.weight", name, e, place.shape, place.dtype) for e in range(experts)]
    if len(split) != 3 * experts * len(gates) or not gates:
        raise BadSeed("this seed has feed-forward layers without gate_proj, up_proj and down_proj: no standard mixture holds them")
    number = {layer: int(re.search(r"(\d+)$", layer)[1]) for layer in gates}  # type: ignore[index]  # FEED_FORWARD has seen a number
    split.sort(key=lambda cell: (number[cell.source.rpartition(".mlp.")[0]], cell.expert, cell.name))
    return [*(gates[layer] for layer in sorted(gates, key=number.__getitem__)), *shared, *split]
