"""GGUF, the file llama.cpp reads, written from a transformers folder a piece at a time.

E experts, H heads, D values of a head
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
)
from transformers import AutoConfig

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged
from elmwood.merge.export.gguf_vocabulary import CURE, write_vocabulary
from elmwood.weights.experts import Low
from elmwood.weights.tensors import PIECE, SIZES, Bytes, Files, StoredTensor, check_finite, decode, encode, places

TYPES = {"F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16, "BF16": GGMLQuantizationType.BF16}
KINDS = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16}
# transformers' model_type -> llama.cpp's architecture
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA, "mistral": MODEL_ARCH.LLAMA, "mixtral": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3, "qwen3_moe": MODEL_ARCH.QWEN3MOE, "olmo2": MODEL_ARCH.OLMO2,
}  # fmt: skip


class Part(NamedTuple):
    """A tensor of the file."""

    name: str
    dtype: str  # as safetensors spells it
    sources: tuple[StoredTensor, ...]  # of the experts where there are several, in order
    heads: int = 0  # where rotary pairs change places: how many

    @property
    def shape(self) -> tuple[int, ...]:
        one = self.sources[0].shape
        return one if ".ffn_" not in self.name or "_exps." not in self.name else (len(self.sources), *one)

    @property
    def bytes(self) -> int:
        return sum(place.numbers for place in self.sources) * SIZES[self.dtype]


def write_gguf(
    folder: Path, path: Path, *, name: str, dtype: str | None = None, licence: str | None = None, begins: bool = False,
    progress: Progress = silent,
) -> None:  # fmt: skip
    """`dtype` F32, F16 or BF16 for the matrices, by default as stored; vectors and routers are F32. What was written is read again
    and looked at. Raises BadInput for what llama.cpp has no place for, Damaged.
    """
    config, architecture = _read(folder)
    parts = plan(config, architecture, places(sorted(folder.glob("*.safetensors"))), dtype)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    if licence:
        writer.add_license(licence)
    kinds = [part.dtype for part in parts if len(part.shape) > 1]
    writer.add_file_type(KINDS[max(set(kinds), key=kinds.count)])
    writer.add_quantization_version(2)
    _sizes(writer, config)
    factors = _rotary(writer, config)
    write_vocabulary(writer, folder, config, begins)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for part in parts:
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), part.bytes, raw_dtype=TYPES[part.dtype])
    _write(writer, factors, parts, progress)
    check_gguf(path, parts)


def write_lora(folder: Path, low: Low, path: Path, *, name: str) -> None:
    """An adapter for llama.cpp's --lora, over the GGUF file of the seed in `folder`; its scale is in B. Raises BadInput, Damaged."""
    config, architecture = _read(folder)
    names, heads = get_tensor_name_map(architecture, config.num_hidden_layers), _turn_counts(config, architecture)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    parts = []
    for key, place in sorted(low.factors.items()):
        there = names.get_name(key, try_suffixes=(".weight",))
        if there is None or low.turned:
            raise BadInput(f"llama.cpp has no place for an adapter of {key}: fold it, with --format gguf")
        a_RI, b_OR, scale = low.pair(key)
        b_OR = b_OR * (scale * len(a_RI))  # llama.cpp divides by the rank
        if count := heads.get(there.split(".")[2], 0):
            b_OR = b_OR.reshape(count, 2, -1, len(a_RI)).swapaxes(1, 2).reshape(b_OR.shape)
        for end, value in (("lora_a", a_RI), ("lora_b", b_OR)):
            writer.add_tensor(f"{there}.{end}", np.ascontiguousarray(value, np.float32))
            parts.append(Part(f"{there}.{end}", "F32", (place[0]._replace(shape=value.shape),)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf(path, parts)


def _read(folder: Path) -> tuple[Any, MODEL_ARCH]:
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type not in ARCHITECTURES:
        raise BadInput(f"{config.model_type} models are not within reach of this exporter (it knows {', '.join(ARCHITECTURES)}): {CURE}")
    return config, ARCHITECTURES[config.model_type]


def _turn_counts(config: Any, architecture: MODEL_ARCH) -> dict[str, int]:
    """The matrices whose rotary pairs change places, and their heads."""
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if architecture is MODEL_ARCH.LLAMA else {}


# ---- what the file says -----------------------------------------------------------------------------------------


def _sizes(writer: GGUFWriter, config: Any) -> None:
    """Raises BadInput where llama.cpp would compute something else."""
    heads, head = config.num_attention_heads, _head(config)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    # llama.cpp attends to everything in these architectures; as far as a window reaches that is the same
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    if config.hidden_act != "silu":
        raise BadInput(f"{config.model_type} with {config.hidden_act}: llama.cpp computes silu there; {CURE}")
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not experts:
        return
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if not config.norm_topk_prob and config.num_experts_per_tok < experts:
            raise BadInput(
                "norm_topk_prob is false, and llama.cpp always lets the weights of a token's experts sum to one: there it differs"
            )
        if config.decoder_sparse_step != 1 or config.mlp_only_layers:
            raise BadInput(f"some layers have no experts (decoder_sparse_step, mlp_only_layers): {CURE}")


def _head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary(writer: GGUFWriter, config: Any) -> np.ndarray | None:
    """The base, and how positions are stretched; for Llama 3 the divisor of each frequency [D / 2]. Raises BadInput."""
    said = config.rope_parameters
    kind = said.get("rope_type", "default")
    writer.add_rope_freq_base(said["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(said["factor"])
    elif kind == "llama3":
        frequency_N = said["rope_theta"] ** -(np.arange(0, _head(config), 2) / _head(config))
        turns_N = said["original_max_position_embeddings"] * frequency_N / (2 * np.pi)  # of each pair within the original context
        low, high = said["low_freq_factor"], said["high_freq_factor"]
        smooth_N = np.clip((turns_N - low) / (high - low), 0, 1)
        return (1 / (smooth_N + (1 - smooth_N) / said["factor"])).astype(np.float32)
    elif kind != "default":
        raise BadInput(f"rotary positions of type {kind!r} are not within reach of this exporter: {CURE}")
    return None


# ---- tensors ----------------------------------------------------------------------------------------------------


def plan(config: Any, architecture: MODEL_ARCH, found: dict[str, StoredTensor], dtype: str | None) -> list[Part]:
    """Every tensor of the file; those of experts stand together. Raises BadInput for one that llama.cpp has no place for."""
    names, heads = get_tensor_name_map(architecture, config.num_hidden_layers), _turn_counts(config, architecture)
    groups: dict[str, dict[int, StoredTensor]] = {}
    for key, place in found.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        expert = re.search(r"\.experts\.(\d+)\.", key)
        name = names.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", key), try_suffixes=(".weight", ".bias"))
        if name is None:
            raise BadInput(f"llama.cpp has no place for {key} in {config.model_type}: {CURE}")
        groups.setdefault(name, {})[int(expert[1]) if expert else 0] = place
    parts = []
    for name, group in groups.items():
        sources = tuple(group[e] for e in range(len(group)))
        stored = sources[0].dtype if sources[0].dtype in TYPES else "F32"
        matrix = len(sources[0].shape) > 1 and "ffn_gate_inp" not in name
        kind = name.split(".")[2] if name.startswith("blk.") else ""
        parts.append(Part(name, (dtype or stored) if matrix else "F32", sources, heads.get(kind, 0)))
    return parts


def _pieces(part: Part, files: Files) -> Iterator[Bytes]:
    """The bytes of a tensor, in order."""
    for place in part.sources:
        rows = place.shape[0] // part.heads if part.heads else 1
        unit = rows * (place.numbers // place.shape[0]) if part.heads else 1  # what must stay together: a head
        step = max(1, PIECE // unit) * unit
        for first in range(0, place.numbers, step):
            last = min(first + step, place.numbers)
            raw = files.read(place, first, last)
            if place.dtype != part.dtype:
                raw = encode(decode(raw, place.dtype), part.dtype)
            if part.heads:  # rotary partners stand D/2 apart in transformers, side by side in llama.cpp
                raw = raw.reshape((last - first) // unit, 2, rows // 2, -1).swapaxes(1, 2).reshape(-1)
            yield raw


def _write(writer: GGUFWriter, factors: np.ndarray | None, parts: Sequence[Part], progress: Progress) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file, files, done, total = writer.fout[0], Files(), 0, sum(part.bytes for part in parts)
    writer.write_padding(file, file.tell())
    if factors is not None:
        factors.tofile(file)
        writer.write_padding(file, factors.nbytes)
    for part in parts:
        for raw in _pieces(part, files):
            raw.tofile(file)
            done += raw.size
            progress("gguf", done, total, "B")
        writer.write_padding(file, part.bytes)
    files.close()
    writer.close()


def check_gguf(path: Path, parts: Sequence[Part]) -> None:
    """Every tensor is there, of its shape and type, and finite, by the word of another reader. Raises Damaged."""
    found = {one.name: one for one in GGUFReader(path).tensors}
    for part in parts:
        one = found.get(part.name)
        if one is None or tuple(int(n) for n in reversed(one.shape)) != part.shape or one.tensor_type != TYPES[part.dtype]:
            raise Damaged(f"{path}: {part.name} did not come out as {part.dtype} {part.shape}: export it again")
        check_finite(part.name, StoredTensor(path, part.dtype, part.shape, int(one.data_offset)))
