"""GGUF, the file llama.cpp reads, written from a transformers folder a piece at a time.

E experts, H heads, D values of a head
"""

import re
from collections.abc import Iterator, Mapping, Sequence
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
    get_tensor_name_map,
)

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged
from elmwood.merge.export.gguf_config import read_config, write_config
from elmwood.merge.export.gguf_vocabulary import CURE, write_vocabulary
from elmwood.weights.experts import Low
from elmwood.weights.tensors import PIECE, SIZES, Bytes, Files, StoredTensor, check_finite, decode, encode, places

TYPES = {"F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16, "BF16": GGMLQuantizationType.BF16}
KINDS = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16}
WORDS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BUFFER = re.compile(r"rotary_emb\.inv_freq$")  # made from the config, and stored by older versions of transformers
# what an architecture of llama.cpp adds; it does not load a file with others
BIASES = {
    MODEL_ARCH.LLAMA: ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    MODEL_ARCH.QWEN2: ("attn_q", "attn_k", "attn_v"),
}


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
) -> list[str]:  # fmt: skip
    """`dtype` F32, F16 or BF16 for the matrices, by default as stored; vectors and routers are F32. What was written is read again
    and looked at. Returns sentences on what must be known of the file. Raises BadInput for what llama.cpp has no place for, Damaged.
    """
    config, architecture = read_config(folder)
    parts = plan(config, architecture, places(sorted(folder.glob("*.safetensors"))), dtype)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    if licence:
        writer.add_license(licence)
    kinds = [part.dtype for part in parts if len(part.shape) > 1]
    writer.add_file_type(KINDS[max(set(kinds), key=kinds.count)])
    writer.add_quantization_version(2)
    factors, notes = write_config(writer, config)
    notes += write_vocabulary(writer, folder, config, begins)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for part in parts:
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), part.bytes, raw_dtype=TYPES[part.dtype])
    _write(writer, factors, parts, progress)
    check_gguf(path, parts)
    return notes


def write_lora(folder: Path, low: Low, path: Path, *, name: str) -> None:
    """An adapter for llama.cpp's --lora, over the GGUF file of the seed in `folder`; its scale is in B. Raises BadInput, Damaged."""
    config, architecture = read_config(folder)
    names, heads = get_tensor_name_map(architecture, config.num_hidden_layers), _turn_counts(config, architecture)
    adaptable = {one.name for one in plan(config, architecture, places(sorted(folder.glob("*.safetensors"))), None)} - {"token_embd.weight"}
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    parts = []
    for key, place in sorted(low.factors.items()):
        there = names.get_name(key, try_suffixes=(".weight",))
        if there is None or there not in adaptable or low.turned:
            raise BadInput(f"llama.cpp has no place for an adapter of {key}: fold it, with --format gguf")
        a_RI, b_OR, scale = low.pair(key)
        b_OR = b_OR * (scale * len(a_RI))  # llama.cpp divides by the rank
        if count := heads.get(there.split(".")[2], 0) if there.startswith("blk.") else 0:
            b_OR = b_OR.reshape(count, 2, -1, len(a_RI)).swapaxes(1, 2).reshape(b_OR.shape)
        for end, value in (("lora_a", a_RI), ("lora_b", b_OR)):
            writer.add_tensor(f"{there}.{end}", np.ascontiguousarray(value, np.float32))
            parts.append(Part(f"{there}.{end}", "F32", (place[0]._replace(shape=value.shape),)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf(path, parts)


def _turn_counts(config: Any, architecture: MODEL_ARCH) -> dict[str, int]:
    """The matrices whose rotary pairs change places, and their heads."""
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if architecture is MODEL_ARCH.LLAMA else {}


# ---- tensors ----------------------------------------------------------------------------------------------------


def plan(config: Any, architecture: MODEL_ARCH, found: dict[str, StoredTensor], dtype: str | None) -> list[Part]:
    """Every tensor of the file; those of experts stand together. Raises BadInput for one that llama.cpp has no place for."""
    names, heads = get_tensor_name_map(architecture, config.num_hidden_layers), _turn_counts(config, architecture)
    shared = _check_head(config, found)
    groups: dict[str, dict[int, StoredTensor]] = {}
    for key, place in found.items():
        if (key == HEAD and shared) or BUFFER.search(key):
            continue
        expert = re.search(r"\.experts\.(\d+)\.", key)
        name = names.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", key), try_suffixes=(".weight", ".bias"))
        stem, _, end = (name or "").rpartition(".")
        if name is None or (end == "bias" and stem.rpartition(".")[2] not in BIASES.get(architecture, ())):
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


def _check_head(config: Any, found: Mapping[str, StoredTensor]) -> bool:
    """Whether the head is the embedding, as llama.cpp takes it where a file has none. One that is stored and differs is used, whatever
    the config says of it: so does transformers. Raises BadInput."""
    head, words = found.get(HEAD), found.get(WORDS)
    if head is None and not config.tie_word_embeddings:
        raise BadInput(f"config.json says that the head is not the embedding (tie_word_embeddings), and there is no {HEAD}: copy it again")
    return head is None or (config.tie_word_embeddings and words is not None and _alike(head, words))


def _alike(one: StoredTensor, other: StoredTensor) -> bool:
    """The same bytes in the same shape."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    files, spans = Files(), [(first, min(one.numbers, first + PIECE)) for first in range(0, one.numbers, PIECE)]
    found = all(np.array_equal(files.read(one, *span), files.read(other, *span)) for span in spans)
    files.close()
    return found


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
