"""A GGUF file, llama.cpp's format, as a transformers folder: every key and every tensor of it is understood, or the file is refused.

transformers passes over keys and tensors that it has no place for (scaled rotary positions, attention biases, soft caps, the other
parts of a split file), and the model then computes something else. Here one table says what is understood.

E experts, H heads, D values of a head
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from elmwood.errors import BadSeed
from elmwood.lm.checkpoint import Stored, said
from elmwood.lm.importing.checkpoint import canonical
from elmwood.lm.importing.gguf_header import check_header
from elmwood.lm.importing.gguf_rotary import rotary
from elmwood.lm.importing.gguf_words import write_words
from elmwood.lm.pretrained import UNREADABLE, check_size, empty_model, make_config
from elmwood.registry import require

CURE = "import the original checkpoint, from which the file was made"
SHARD = 4 << 30  # bytes of a file
Keys = Mapping[str, Any]  # of a file, without the name of the architecture before them

# key -> field of the config, in every architecture
SIZES = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim", "vocab_size": "vocab_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
MOE = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}
GEMMA = {"attention.sliding_window": "sliding_window"}
SOFT_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
LAYER_NORM = {"attention.layer_norm_epsilon": "layer_norm_epsilon", "feed_forward_length": "n_inner"}
HELD = ("attention.value_length", "rope.dimension_count")  # keys that must equal the size of a head
PLAIN = {"attention.causal": True}  # keys that change nothing at these values
ROTARY = ("rope.freq_base", "rope.scale_linear", "rope.scaling.")  # beginnings of keys that `rotary` reads
SAID = ("general.", "tokenizer.", "quantize.", "split.", "GGUF.")  # beginnings of keys that say nothing of what is computed


class Kind(NamedTuple):
    """An architecture of llama.cpp as one of transformers."""

    model_type: str
    keys: Mapping[str, str]
    fixed: Mapping[str, Any] = {}  # fields that llama.cpp has no key for
    undo: Callable[[str, Any, Any], Any] = lambda name, value, config: value  # what the conversion did to a tensor, by its name there


def _pairs_back(name: str, value: Any, config: Any) -> Any:
    """Rotary partners stand side by side in llama.cpp, D/2 apart in transformers."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2], 0)
    return value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape) if heads else value


def _norm_less_one(name: str, value: Any, config: Any) -> Any:
    return value - 1 if name.endswith("norm.weight") else value


def _turned(name: str, value: Any, config: Any) -> Any:
    return value.T if re.search(r"blk\.\d+\.(attn|ffn)_(qkv|output|up|down)\.weight", name) else value


QWEN_MOE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
KINDS = {
    "llama": Kind("llama", SIZES, undo=_pairs_back),
    "llama with experts": Kind("mixtral", SIZES | MOE | {"expert_count": "num_local_experts"}, {"sliding_window": None}, _pairs_back),
    "qwen2": Kind("qwen2", SIZES, {"use_sliding_window": False}),
    "qwen3": Kind("qwen3", SIZES, {"use_sliding_window": False}),
    "qwen3moe": Kind("qwen3_moe", SIZES | MOE, {"use_sliding_window": False, **QWEN_MOE}),
    "olmo2": Kind("olmo2", SIZES),
    "gemma2": Kind("gemma2", SIZES | GEMMA | SOFT_CAPS, undo=_norm_less_one),
    "gemma3": Kind("gemma3_text", SIZES | GEMMA | SOFT_CAPS, undo=_norm_less_one),
    "gpt2": Kind("gpt2", SIZES | LAYER_NORM, undo=_turned),
}


def convert(path: Path, folder: Path) -> tuple[str, ...]:
    """Write a GGUF file, or all parts of a split one, as a float32 transformers folder; say what was read.

    Quantised weights are expanded, which is slow. Raises BadSeed, MissingExtra.
    """
    require("gguf", "gguf")
    try:
        keys, tensors = _open(path)
        name = keys["general.architecture"]
        kind = KINDS.get("llama with experts" if name == "llama" and keys.get("llama.expert_count") else name)
        if kind is None:
            raise BadSeed(f"{path}: architecture {said(name)} is not read from GGUF here, only {', '.join(sorted(KINDS))}: {CURE}")
        own = {key.removeprefix(f"{name}."): value for key, value in keys.items() if not key.startswith(SAID)}
        config = _config(path, kind, own, keys, tensors)
        _write_weights(path, folder, kind, name, config, tensors)
        write_words(path, keys, folder, config)
    except BadSeed:
        raise
    except UNREADABLE as error:
        raise BadSeed(f"{path} is damaged, or no GGUF file ({said(error)}): {CURE}") from error
    config.save_pretrained(folder)
    types = sorted({one.tensor_type.name for one in tensors.values()})
    return (f"read from a GGUF file and stored as float32; its tensors were {', '.join(types)}",)


# ---- keys --------------------------------------------------------------------------------------------------------


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a file, and its tensors by name; of a split file those of all parts. Raises BadSeed."""
    from gguf import GGUFReader

    parts = [path]
    if cut := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name):
        parts = [path.with_name(f"{cut[1]}-{number:05}-of-{cut[3]}.gguf") for number in range(1, int(cut[3]) + 1)]
    if absent := [part.name for part in parts if not part.is_file()]:
        raise BadSeed(f"{path}: {len(absent)} of {len(parts)} parts are missing, first {absent[0]}: put them beside it")
    keys: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for part in parts:
        check_header(part)
        reader = GGUFReader(part)
        found = {field.name: field.contents() for field in reader.fields.values()}
        keys = keys or found
        if found.get("split.count", 1) != len(parts):
            raise BadSeed(
                f"{part} is one of {found.get('split.count', 1)} parts, and {len(parts)} are here: "
                "give the parts the names that gguf-split gives (…-00001-of-00002.gguf), or join them with gguf-split --merge"
            )
        tensors |= {one.name: one for one in reader.tensors}
    if keys.get("split.tensors.count", len(tensors)) != len(tensors):
        raise BadSeed(f"{path}: {len(tensors)} of {keys['split.tensors.count']} tensors are here: fetch the parts again")
    return keys, tensors


def _config(path: Path, kind: Kind, own: Keys, keys: Keys, tensors: Keys) -> Any:
    """The config that computes what the file says. Raises BadSeed for a key that is not understood."""
    rows, heads = int(tensors["token_embd.weight"].shape[-1]), _one("attention.head_count", own["attention.head_count"], path)
    width = own.get("attention.key_length") or own["embedding_length"] // heads
    fields = {"vocab_size": rows, "num_key_value_heads": heads, "head_dim": width, **kind.fixed}
    for key, value in own.items():
        if key in kind.keys:
            fields[kind.keys[key]] = _one(key, value, path)
        elif key in HELD and value != width:
            raise BadSeed(f"{path}: {key} is {value}, and a head has {width}: that is not read here; {CURE}")
        elif key not in HELD and not key.startswith(ROTARY) and PLAIN.get(key) != value:
            raise BadSeed(f"{path}: the key {said(key)} ({said(value)}) is not understood, and may change what is computed: {CURE}")
    if fields["vocab_size"] != rows:
        raise BadSeed(f"{path}: vocab_size is {fields['vocab_size']}, the embedding has {rows} rows: {CURE}")
    if kind.model_type in ("llama", "qwen3", "qwen3_moe", "olmo2"):
        fields["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if kind.model_type == "llama":
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if kind.model_type.startswith("gemma"):  # as llama.cpp has it: the largest one (46 or 62 layers) divides by its width per head
        largest = fields["num_hidden_layers"] == {"gemma2": 46}.get(kind.model_type, 62)
        fields["query_pre_attn_scalar"] = fields["hidden_size"] // heads if largest else width
        fields |= {name: fields.get(name) for name in SOFT_CAPS.values()}
    fields["tie_word_embeddings"] = "output.weight" not in tensors
    for name in ("bos", "eos", "padding"):
        fields[f"{name[:3]}_token_id"] = keys.get(f"tokenizer.ggml.{name}_token_id")
    fields |= rotary(path, kind.model_type, own, tensors, width)
    config = make_config({"model_type": kind.model_type, **fields}, path)
    sizes = {name: Stored(one.tensor_type.name, tuple(map(int, one.shape))) for name, one in tensors.items()}
    config.architectures = [type(check_size(config, sizes, path)).__name__]
    return config


def _one(key: str, value: Any, path: Path) -> Any:
    """The value of a key that may stand once for each layer. Raises BadSeed where layers differ."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise BadSeed(f"{path}: {key} differs from layer to layer, which is not read here: {CURE}")
    return value[0]


# ---- tensors -----------------------------------------------------------------------------------------------------


def _write_weights(path: Path, folder: Path, kind: Kind, name: str, config: Any, tensors: Keys) -> None:
    """Files of up to 4 GB, one of them in memory at a time, with their index. Raises BadSeed unless all tensors are used, and all there."""
    shards: list[dict[str, str]] = []
    waiting: dict[str, torch.Tensor] = {}
    size = total = 0

    def write() -> None:
        shards.append(dict.fromkeys(waiting, file := f"model-{len(shards) + 1:05}.safetensors"))
        save_file(waiting, folder / file, {"format": "pt"})
        waiting.clear()

    for key, value in _read(path, kind, name, config, tensors):
        if waiting and size + value.nbytes > SHARD:
            write()
            size = 0
        waiting[key] = value
        size, total = size + value.nbytes, total + value.nbytes
    write()
    if len(shards) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    places = {key: file for shard in shards for key, file in shard.items()}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places}), encoding="utf-8"
    )


def _read(path: Path, kind: Kind, name: str, config: Any, tensors: Keys) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model in float32, by the names that save_pretrained writes. Raises BadSeed."""
    from gguf import MODEL_ARCH_NAMES, dequantize, get_tensor_name_map

    names = get_tensor_name_map({there: arch for arch, there in MODEL_ARCH_NAMES.items()}[name], config.num_hidden_layers)
    wanted = canonical(empty_model(config))
    sources: dict[str, list[tuple[str, int | None]]] = {}
    for key in wanted:
        found = re.search(r"\.experts\.(\d+)\.", key)
        there = names.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", key), try_suffixes=(".weight", ".bias"))
        if there is None or there not in tensors:
            raise BadSeed(f"{path} has no tensor for {key} ({there}): it is cut short, or of another kind; {CURE}")
        sources.setdefault(there, []).append((key, int(found[1]) if found else None))
    if strange := sorted(tensors.keys() - sources.keys() - {"rope_freqs.weight"}):
        raise BadSeed(f"{path}: {len(strange)} tensors have no place in a {config.architectures[0]}, first {said(strange[0])}: {CURE}")
    for there, keys in sources.items():
        whole = dequantize(tensors[there].data, tensors[there].tensor_type)
        for key, expert in keys:
            value = np.asarray(kind.undo(there, whole if expert is None else whole[expert], config), np.float32)
            if value.shape != wanted[key].shape:
                raise BadSeed(f"{path}: {there} is {value.shape}, and {key} is {wanted[key].shape}: its keys are those of another model")
            yield key, torch.from_numpy(value.copy())
