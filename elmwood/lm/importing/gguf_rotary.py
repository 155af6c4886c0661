"""Rotary positions as a GGUF file says them, and as a config of transformers does.

N frequencies: half the size of a head
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elmwood.errors import BadSeed

CURE = "import the original checkpoint, from which the file was made"
SCALING = "rope.scaling."
# keys of scaled positions; those without a field must have their value
UNDERSTOOD = {
    "type": None, "factor": None, "original_context_length": None, "attn_factor": None, "yarn_attn_factor": None, "finetuned": None,
    "yarn_beta_fast": None, "yarn_beta_slow": None, "yarn_ext_factor": 1.0,
}  # fmt: skip
PUBLISHED = (1.0, 4.0, 8192)  # low and high factor and original context of every Llama 3.1 and 3.2


def rotary(path: Path, model_type: str, own: Mapping[str, Any], tensors: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The fields of a config that say how positions are turned. Raises BadSeed for what is not understood."""
    base = float(own.get("rope.freq_base", 10000.0))
    said = {key.removeprefix(SCALING): value for key, value in own.items() if key.startswith(SCALING)}
    if strange := sorted(key for key in said if key not in UNDERSTOOD or UNDERSTOOD[key] not in (None, said[key])):
        raise BadSeed(f"{path}: {SCALING}{strange[0]} ({said[strange[0]]}) is not understood, and changes what is computed: {CURE}")
    if strange := sorted(key for key in own if key.startswith("rope.freq_base_") and key != "rope.freq_base_swa"):
        raise BadSeed(f"{path}: {strange[0]} is not understood, and changes what is computed: {CURE}")
    kind = said.get("type", "linear" if "rope.scale_linear" in own else "none")
    factor = float(said.get("factor", own.get("rope.scale_linear", 1.0)))
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if kind == "linear" and factor != 1.0:
        found |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        found |= _yarn(path, said, factor)
    elif kind not in ("none", "linear"):
        raise BadSeed(f"{path}: rotary positions of type {kind!r} are not read here: {CURE}")
    if "rope_freqs.weight" in tensors:
        if found["rope_type"] != "default":
            raise BadSeed(f"{path}: rotary positions are scaled twice, by {kind} and by rope_freqs.weight: {CURE}")
        found |= llama3(np.array(tensors["rope_freqs.weight"].data, np.float64), base, width, path)
    if model_type == "gpt2":  # has learned positions
        return {}
    if model_type == "gemma3_text":  # windows have a base of their own
        near = {"rope_type": "default", "rope_theta": float(own.get("rope.freq_base_swa", 10000.0))}
        return {"rope_parameters": {"full_attention": found, "sliding_attention": near}}
    return {"rope_parameters": found}


def _yarn(path: Path, said: Mapping[str, Any], factor: float) -> dict[str, Any]:
    if not said.get("original_context_length"):
        raise BadSeed(f"{path}: {SCALING}type is yarn, and {SCALING}original_context_length is missing: {CURE}")
    times = float(said.get("yarn_attn_factor", said.get("attn_factor", 1.0)))
    return {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(said["original_context_length"]),
        "attention_factor": times * (0.1 * math.log(factor) + 1), "beta_fast": float(said.get("yarn_beta_fast", 32.0)),
        "beta_slow": float(said.get("yarn_beta_slow", 1.0)),
    }  # fmt: skip


def llama3_divisors(base: float, width: int, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """By how much each frequency is divided [N]: by 1 where it turns `high` times or more in the original context, `factor` below `low`."""
    frequency_N = base ** -(np.arange(0, width, 2) / width)
    smooth_N = np.clip((original * frequency_N / (2 * np.pi) - low) / (high - low), 0, 1)
    return 1 / (smooth_N + (1 - smooth_N) / factor)


def llama3(divisor_N: np.ndarray, base: float, width: int, path: Path) -> dict[str, Any]:
    """Settings of Llama 3's scaled positions that give these divisors of the frequencies. Raises BadSeed where none do.

    Over the frequency, 1 / divisor is a line between two ends. Where it leaves them is all that counts: the original context is taken
    as 8192 unless the published settings fit.
    """
    frequency_N, factor = base ** -(np.arange(0, width, 2) / width), float(divisor_N.max())
    if factor <= 1:
        return {}
    low, high, original = PUBLISHED
    if not _equal(llama3_divisors(base, width, factor, low, high, original), divisor_N):
        smooth_N = (1 / divisor_N - 1 / factor) / (1 - 1 / factor)
        between_N = (smooth_N > 1e-6) & (smooth_N < 1 - 1e-6)
        below = frequency_N[smooth_N <= 1e-6].max(initial=0.0)  # the fastest that is divided by the whole factor
        above = frequency_N[smooth_N >= 1 - 1e-6].min(initial=2.0)  # the slowest that is not divided
        if between_N.sum() > 1:
            slope, height = np.polyfit(frequency_N[between_N], smooth_N[between_N], 1)
            ends = -height / slope, (1 - height) / slope
        elif between_N.sum() == 1:  # any line through this point that reaches its ends before the others
            (point,), (share,) = frequency_N[between_N], smooth_N[between_N]
            back = min(point - below, share / (1 - share) * (above - point)) / 2
            ends = point - back, point - back + back / share
        else:
            ends = (2 * below + above) / 3, (below + 2 * above) / 3
        low, high = (float(original * end / (2 * np.pi)) for end in ends)
    if not low < high or not _equal(llama3_divisors(base, width, factor, low, high, original), divisor_N):
        raise BadSeed(f"{path}: rope_freqs.weight is not a Llama 3 scaling of positions: {CURE}")
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": int(original),
    }  # fmt: skip


def _equal(one_N: np.ndarray, other_N: np.ndarray) -> bool:
    return one_N.shape == other_N.shape and np.allclose(one_N, other_N, rtol=1e-5)
