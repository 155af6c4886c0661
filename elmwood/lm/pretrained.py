"""The one door through which transformers and PEFT open what came from others. No other module calls their `from_pretrained`.

Everything is read from files that are here, and nothing that a file says makes a library run code, go online, ask at the terminal, open a
pickle or load a kernel. transformers is shown a folder of links to files that were looked at: a config without the settings that name code,
and weights whose headers were checked. What a file leaves out is never made up: tensors that are missing are an error.
"""

import json
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import hub_kernels

from elmwood.corpus.foreign_tokenizer import check_tokenizer_file, tokenizer_errors
from elmwood.errors import BadInput, BadSeed, copied_to
from elmwood.lm.adapters.peft_config import check_floats, read_settings
from elmwood.lm.checkpoint import Stored, harmless, linked, read_json, said, stored_tensors, weight_files

# it prints what is missing, in a stranger's words; here that is an error
logging.getLogger("transformers.modeling_utils").addFilter(lambda line: line.levelno >= logging.ERROR)
hub_kernels._kernels_enabled = False  # some models fetch faster kernels from the model hub where the library `kernels` is installed

# what is raised where a library cannot read a file, or its header is refused before: anything (tokenizers raise Exception itself)
UNREADABLE = Exception
# Settings that name code, kernels, other files or other machines, at any depth of a config. They are passed over: transformers chooses its
# own attention, and the architecture must be one of its own.
_PASSED = frozenset({
    "auto_map", "custom_pipelines", "configuration_files", "transformers_weights", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset", "experts_implementation", "_experts_implementation",
    "_experts_implementation_internal", "use_kernels", "kernel_config", "fusion_config", "distributed_config", "name_or_path",
    "_name_or_path", "use_pretrained_backbone", "backbone_kwargs",
})  # fmt: skip
_QUANTISED = ("quantization_config", "compression_config")
# fields that count parts, which a model makes one by one: not more than a file has tensors, or a tensor has rows
_PARTS = re.compile(r"layer|block|depth|stage|expert|head|group|num_labels")
_WIDTHS = re.compile(r"size|dim|width|vocab|rank")  # of such parts
_ROWS = re.compile(r"expert|head|group|label")
MOST_LAYERS, MOST_ROWS = 1 << 12, 1 << 16  # of a config whose files are not here
SLACK = 1 << 24  # numbers that a model may have beyond twice those of its files: tables of positions are computed
TOKENIZER = ("tokenizer*", "vocab.*", "special_tokens_map.json", "merges.txt", "added_tokens.json", "*.model", "*.jinja")


# ---- configs -----------------------------------------------------------------------------------------------------


def open_config(folder: Path) -> Any:
    """The config in a folder, of an architecture that transformers itself has. Raises BadSeed, also for quantised weights."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadSeed(f"{folder} has no config.json: a model is a folder written by transformers' save_pretrained, or a .gguf file")
    config = make_config(read_json(path), folder)
    config.name_or_path = str(folder)
    return config


def make_config(settings: Mapping[str, Any], where: object = "this config") -> Any:
    """The config that these settings describe. Raises BadSeed."""
    if method := next((_method(settings[key]) for key in _QUANTISED if settings.get(key)), None):
        raise BadSeed(
            f"{where}: its weights are quantised ({method}), and experts are trained, merged and exported from a seed in full precision: "
            "import the original checkpoint; --method qlora trains over four bits of it"
        )
    check_counts(settings, where)  # some classes make a list with an entry for each layer
    with tempfile.TemporaryDirectory() as scratch, copied_to(scratch, where):
        _write_config(settings, Path(scratch))
        try:
            config = AutoConfig.from_pretrained(scratch, local_files_only=True, trust_remote_code=False)
            if not isinstance(config.get_text_config(), PreTrainedConfig):
                raise ValueError("its text_config is none")
            return config
        except UNREADABLE as error:
            raise BadSeed(
                f"{where}: transformers {transformers.__version__} does not know this architecture ({said(error)}); "
                "code that comes with a checkpoint is never run: use another seed, or upgrade transformers"
            ) from error


def _method(quantisation: Any) -> str:
    return said(quantisation.get("quant_method", "no method named") if isinstance(quantisation, dict) else quantisation)


def _write_config(settings: Mapping[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(_clean(settings)), encoding="utf-8")


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(one) for key, one in value.items() if key not in _PASSED}
    return [_clean(one) for one in value] if isinstance(value, list) else value


# ---- models ------------------------------------------------------------------------------------------------------


def empty_model(config: Any) -> Any:
    """The causal LM of a config, without storage. Raises BadSeed."""
    with torch.device("meta"):
        return new_model_of(config)


def open_empty(folder: Path) -> Any:
    """The model in a folder without its weights. Raises BadSeed, Damaged."""
    config = open_config(folder)
    return check_size(config, stored_tensors(path for path in weight_files(folder) if path.suffix == ".safetensors"), folder)


def new_model_of(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The causal LM of a config with random weights. Raises BadSeed."""
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **({} if dtype is None else {"dtype": dtype}))
    except UNREADABLE as error:
        raise BadSeed(f"no model can be built from this config of a {said(config.model_type)} ({said(error)}): use another seed") from error


def open_files(folder: Path, *, dtype: torch.dtype | str = "auto", device: Any = None, quantisation: Any = None) -> tuple[Any, Any]:
    """The model in a folder, and what transformers says of the names in its files. The caller looks at that: what is missing is random.

    `device` and `quantisation` are transformers' device_map and quantization_config. Raises BadSeed, Damaged.
    """
    config, files = open_config(folder), weight_files(folder)
    check_size(config, stored_tensors(path for path in files if path.suffix == ".safetensors"), folder)
    if (generation := folder / "generation_config.json").is_file():
        read_json(generation)
        files.append(generation)
    more = {} if quantisation is None else {"quantization_config": quantisation}
    with linked(files) as links:
        _write_config(read_json(folder / "config.json"), links)
        loaded: Any
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                links, config=config, dtype=dtype, device_map=device, use_safetensors=True, local_files_only=True,
                output_loading_info=True, trust_remote_code=False, **more,
            )  # fmt: skip
        except UNREADABLE as error:
            raise BadSeed(f"{folder}: the weights cannot be loaded ({said(error)}): copy the checkpoint again") from error
    model, info = loaded
    model.name_or_path = str(folder)
    return model, info


def open_weights(folder: Path, *, stored_before: bool = False, **how: Any) -> Any:
    """The model in a folder: every parameter from its files, in its shape, and no tensor in them without a place in the model.

    `stored_before`: it is in the store, where earlier versions kept constants and heads of other tasks; these are passed over.
    `how` as for `open_files`. Raises BadSeed, Damaged.
    """
    model, info = open_files(folder, **how)
    unused = sorted(map(str, info["unexpected_keys"]))
    if stored_before and unused:
        tensors = stored_tensors(path for path in weight_files(folder) if path.suffix == ".safetensors")
        unused = [name for name in unused if not harmless(name, tensors.get(name))]
    _check_info(model, info, unused, folder)
    _keep_scale(model)
    return model


def _keep_scale(model: Any) -> None:
    """Let an RWKV compute with the weights it has. In eval mode transformers would halve those of its later blocks in place, so that
    float16 does not overflow: weights saved then are other ones, and adapters over them are not halved."""
    trunk = model.base_model
    if getattr(trunk.config, "rescale_every", 0) and model.dtype != torch.float16:
        trunk.config = copy(trunk.config)  # the model's own, which is saved, stays as it is
        trunk.config.rescale_every = 0


def _check_info(model: Any, info: Mapping[str, Any], unused: Sequence[str], where: object) -> None:
    """Raises BadSeed."""
    shaped = {str(one if isinstance(one, str) else one[0]) for one in info["mismatched_keys"]}
    if absent := sorted({*map(str, info["missing_keys"]), *shaped}):
        first = absent[0]
        raise BadSeed(f"{where}: {len(absent)} tensors are missing or of a wrong shape, first {said(first)}: copy the checkpoint again")
    if info["error_msgs"]:
        raise BadSeed(f"{where}: the weights cannot be loaded ({said(info['error_msgs'][0])}): copy the checkpoint again")
    if unused:
        raise BadSeed(
            f"{where}: {len(unused)} tensors have no place in a {type(model).__name__}, first {said(unused[0])}: "
            "its config.json is that of another model; use the files of one checkpoint"
        )


def open_adapter(model: Any, folder: Path) -> Any:
    """A model with the LoRA or DoRA adapter in a folder, all of whose tensors have a place in it. Raises BadInput, Damaged."""
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    for path in files:
        if not path.is_file():  # PEFT would open a pickle, or ask the model hub
            raise BadInput(f"{folder} has no {path.name}: save the adapter again with PEFT")
    settings, tensors = read_settings(files[0], dora=True), stored_tensors(files[1:])
    check_floats(files[1], {name: one.dtype for name, one in tensors.items()})
    rank = max(settings.get("r", 8), *(settings.get("rank_pattern") or {0: 0}).values())
    if rank > max((size for one in tensors.values() for size in one.shape), default=0):
        raise BadInput(f"{files[0]}: the rank {rank} is not that of the tensors in {files[1].name}: save the adapter again with PEFT")
    from elmwood.lm.adapters.peft_import import get_peft_model_state_dict, read_adapter  # PEFT takes a second to import

    with linked(files) as links, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tensors are missing: here that is an error
        try:
            adapted = read_adapter(model, str(links), low_cpu_mem_usage=True)
        except UNREADABLE as error:
            raise BadInput(f"{folder}: PEFT cannot add it to this seed ({said(error)}): the adapter has another base") from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if wrong := sorted(wanted ^ tensors.keys()):
        raise BadInput(f"{folder}: {len(wrong)} tensors do not fit its settings on this seed, first {said(wrong[0])}: it has another base")
    return adapted


def end_ids(folder: Path) -> list[int]:
    """The tokens that end a text, by generation_config.json or else by the config. Raises BadSeed."""
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else open_config(folder).get_text_config().eos_token_id
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(one) is not int for one in ids):
        raise BadSeed(f"{folder}: its eos_token_id is {said(found)}, and should be a token id: correct it and import the model again")
    return ids


# settings of generation that choose other tokens than the likeliest of the model -> values at which they do nothing
_CHOOSING: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,), "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "num_beams": (1,), "num_beam_groups": (1,), "min_length": (0,), "min_new_tokens": (0,), "guidance_scale": (1,),
    "diversity_penalty": (0,), "penalty_alpha": (0,), "length_penalty": (1,),
} | dict.fromkeys(
    ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias",
     "exponential_decay_length_penalty", "watermarking_config", "dola_layers", "stop_strings"), ()
)  # fmt: skip


def generation_settings(folder: Path) -> dict[str, Any]:
    """What generation_config.json asks for beyond the probabilities of the model, such as a repetition penalty. transformers applies it
    to every text that it generates; an ensemble of probabilities has no logits that it could be applied to. Raises BadSeed."""
    path = folder / "generation_config.json"
    said_there = read_json(path) if path.is_file() else {}
    return {name: value for name, value in said_there.items() if name in _CHOOSING and value not in (None, [], *_CHOOSING[name])}


# ---- sizes -------------------------------------------------------------------------------------------------------


def check_size(config: Any, tensors: Mapping[str, Stored], where: object) -> Any:
    """A config speaks of no more than its files hold: looked at before a model is built. The model, without storage. Raises BadSeed."""
    widest = max((size for one in tensors.values() for size in one.shape), default=1)
    check_counts(config.to_dict(), where, max(256, len(tensors)), max(1024, widest))
    model = empty_model(config)
    stored = sum(math.prod(one.shape) for one in tensors.values())
    built, tables = sum(one.numel() for one in model.parameters()), sum(one.numel() for one in model.buffers())
    if built > 2 * stored + SLACK or tables > 16 * (stored + SLACK):
        raise BadSeed(
            f"{where}: a model of its config has {built} parameters and {tables} constants, and its files hold {stored} numbers: "
            "the config.json is that of another model, or damaged; copy the checkpoint again"
        )
    return model


def check_counts(settings: Any, where: object, layers: int = MOST_LAYERS, rows: int = MOST_ROWS) -> None:
    """A config has no more layers, heads and experts than this: models make them one by one. Raises BadSeed."""
    for key, value in _counts(settings):
        most = rows if _ROWS.search(key) else layers
        if value > most:
            raise BadSeed(
                f"{where}: its config says {said(key)} = {value}, and {most} is the most that its files can have: "
                "the config.json is that of another model, or damaged; copy the checkpoint again"
            )


def _counts(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Counts of parts, in a config and those inside it."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _counts(one, str(name))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _counts(one, key)
    elif type(value) in (int, float) and _PARTS.search(key) and not _WIDTHS.search(key):
        yield key, value


# ---- tokenizers --------------------------------------------------------------------------------------------------


def open_tokenizer(folder: Path, **settings: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, with settings beside those of its files; a slow one is converted. Raises BadSeed."""
    files = sorted({path for pattern in TOKENIZER for path in folder.glob(pattern) if path.is_file()})
    if not any(path.name == "tokenizer.json" or path.name.startswith("vocab.") or path.suffix == ".model" for path in files):
        raise BadSeed(f"{folder} has no tokenizer: put its tokenizer.json beside config.json")
    if (folder / "tokenizer.json").is_file():
        check_tokenizer_file(folder / "tokenizer.json")
    with linked(files) as links:
        if (folder / "config.json").is_file():
            _write_config(read_json(folder / "config.json"), links)
        with tokenizer_errors(f"{folder}: the tokenizer cannot be opened"):
            found = AutoTokenizer.from_pretrained(links, local_files_only=True, trust_remote_code=False, **settings)
    if not found.is_fast:
        raise BadSeed(f"{folder}: the tokenizer has no fast form: convert it, and put its tokenizer.json beside config.json")
    return found
