"""In which precision a model is multiplied: bf16 where the device does that faster."""

from typing import Any

import torch

from elmwood.train.loss import base_model

LEAST_WIDTH = 96  # width of a model from which a CPU with matrix units is faster in bf16 (docs/log/training.md)
SHORT = 256  # tokens of a row up to which attention in bf16 is slower there than in float32


def uses_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16: GPUs, and CPUs with matrix units for it (AMX).

    bf16 instructions of AVX-512 are faster than fp32 too (docs/training.md) but not used: all predictions and measurements are for fp32.
    """
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return device.type != "cpu" or bool(able.get("amx_bf16"))


def autocasts(model: Any, device: torch.device) -> bool:
    """Whether float32 weights are multiplied in bf16."""
    wide = device.type != "cpu" or base_model(model).get_input_embeddings().weight.shape[1] >= LEAST_WIDTH
    return uses_bf16(device) and wide and not is_narrow(model)


def autocast(model: Any, device: torch.device) -> torch.autocast:
    """Multiply float32 weights in bf16, where the device does that faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=autocasts(model, device))


def is_narrow(model: Any) -> bool:
    """Whether a model's frozen weights are in fewer bits than float32: its activations are then, and nothing needs autocast."""
    return base_model(model).get_input_embeddings().weight.dtype != torch.float32
