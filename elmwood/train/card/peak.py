"""How much of a device a run uses: model FLOPs utilisation (MFU, arXiv:2204.02311, appendix B)."""

import time
from functools import cache
from typing import Any

import torch

# dense bf16 products with float32 sums, operations per second, by the makers' data sheets; the first name that occurs in the device's
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "A800": 312e12, "A10G": 70e12, "A40": 150e12, "L40S": 362e12, "L4": 121e12, "A6000": 155e12, "RTX 5090": 210e12, "RTX 4090": 165e12,
    "RTX 4080": 98e12, "RTX 3090": 71e12, "MI300X": 1307e12, "MI250X": 383e12,
}  # fmt: skip


SQUARE = 512  # of the matrices whose product is timed on a CPU


def find_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float | None:
    """Operations per second; on a CPU of a product of matrices, in `dtype` with this process's threads. None for a card not listed."""
    if device.type == "cpu":
        return measure_peak(torch.get_num_threads(), dtype)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


@cache
def measure_peak(threads: int, dtype: torch.dtype) -> float:
    """Operations per second of the best of five products, with so many threads as there are now: some milliseconds, once a process."""
    one, times = torch.ones(SQUARE, SQUARE, dtype=dtype), []
    for _ in range(5):
        began = time.perf_counter()
        one @ one
        times.append(time.perf_counter() - began)
    return 2 * SQUARE**3 / min(times)


def flops_per_token(model: Any, length: int) -> float:
    """Six for each weight that multiplies, and 12 · layers · width of all heads · length for attention, as if it were not causal.

    So much is counted for adapters too, which need the gradient of no matrix, and for packed rows, where less is attended to.
    """
    text = model.config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    embedded = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embedded
    sizes = {id(weight): weight.numel() for weight in model.parameters() if weight.ndim >= 2 and (tied or weight is not embedded)}
    return 6 * sum(sizes.values()) + 12 * text.num_hidden_layers * width * length


def find_share(model: Any, length: int, dtype: torch.dtype = torch.float32) -> float | None:
    """Seconds of the device's peak that a token takes; times tokens per second it is the MFU. None where no peak is known."""
    if not hasattr(model.config.get_text_config(), "num_attention_heads"):
        return None
    peak = find_peak(next(model.parameters()).device, dtype)
    return None if peak is None else flops_per_token(model, length) / peak
