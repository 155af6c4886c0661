"""Reads the adapter_config.json of plain LoRA. Free of torch."""

import json
import math
import re
from pathlib import Path
from typing import Any

from elmwood.errors import BadInput

# settings of PEFT's LoRA that change more than W + scale * B A; each must be absent or off
_UNSUPPORTED: tuple[str, ...] = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save")
_UNSUPPORTED += ("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "velora_config")
_UNSUPPORTED += ("monteclora_config", "arrow_config", "kasa_config", "megatron_config")
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # other initial values of A and B change the base weights too


def read_settings(path: Path, dora: bool = False) -> dict[str, Any]:
    """An adapter_config.json of plain LoRA (or weight-decomposed, if `dora`). Raises BadInput for other kinds of adapter."""
    settings = json.loads(path.read_bytes())
    if settings.get("peft_type") != "LORA":
        raise BadInput(f"{path}: peft_type is {settings.get('peft_type')!r}; only LORA adapters can be experts: train one with LoRA")
    if used := [key for key in _UNSUPPORTED if settings.get(key) and not (dora and key == "use_dora")]:
        raise BadInput(f"{path} uses {', '.join(used)}; only W + scale * B A is supported here: train without it")
    if settings.get("bias", "none") != "none":
        raise BadInput(f"{path} trains biases ({settings['bias']!r}); adapters of one base share them: train with bias='none'")
    if settings.get("init_lora_weights") not in _PLAIN_STARTS:
        raise BadInput(
            f"{path}: init_lora_weights={settings['init_lora_weights']!r} changes the base weights: convert it to plain LoRA with PEFT"
        )
    return settings


def scale(settings: dict[str, Any], layer: str, rank: int) -> float:
    """The factor of B A: alpha / rank, or alpha / sqrt(rank) if rank-stabilised (arXiv:2312.03732)."""
    patterns = settings.get("alpha_pattern") or {}
    matching = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    alpha = next(matching, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
