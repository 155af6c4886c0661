"""Bring in a seed from elsewhere: a transformers folder, a GGUF file, a model hub. No remote code is run, no pickle opened."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from elmwood.errors import BadSeed
from elmwood.lm.load import KEPT, add_seed, check_tokenizer, download
from elmwood.records import Seed
from elmwood.registry import require
from elmwood.store import Store, hash_file

UNREADABLE = (
    OSError,
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    NotImplementedError,
    ImportError,
)  # what transformers raises


def import_seed(source: str, store: Store, *, name: str | None = None, separator: int | None = None, licence: str | None = None) -> Seed:
    """A seed from a transformers folder, a .gguf file, or a model hub's `id` or `id@revision`.

    A hub seed stays in the hub's own cache, pinned to its commit and to the digests of its files; anything else is copied
    into the store. `separator` is the token id that stands before each document: by default "<|endoftext|>" where the
    vocabulary has it, else the tokenizer's bos, else its eos. Raises BadSeed, MissingExtra.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        with tempfile.TemporaryDirectory() as scratch:
            _convert_gguf(path, Path(scratch))
            return _import_folder(Path(scratch), store, name or path.stem, separator, licence)
    if path.is_dir():
        return _import_folder(path, store, name or path.resolve().name, separator, licence)
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BadSeed(f"{source} is neither a folder with a config.json nor a .gguf file: give one of these, or a hub id")
    identifier, _, revision = source.partition("@")
    folder, commit = download(identifier, revision)
    # a tokenizer.json that must be made first cannot stay in the hub's cache: then the whole seed moves into the store
    hub = f"{identifier}@{commit}" if (folder / "tokenizer.json").exists() else None
    return _import_folder(folder, store, name or identifier.split("/")[-1], separator, licence, hub)


def _import_folder(folder: Path, store: Store, name: str, separator: int | None, licence: str | None, hub: str | None = None) -> Seed:
    config = _config(folder)
    tokenizer, starts = _tokenizer(folder)
    if separator is None:
        separator = next((found for found in (tokenizer.token_to_id("<|endoftext|>"), *starts) if found is not None), None)
    if separator is None:
        raise BadSeed(f"{folder}: the tokenizer has no <|endoftext|>, bos or eos for a separator of documents: give a token id")
    check_tokenizer(tokenizer, config, separator, str(folder))
    parameters = _parameters(folder)
    kept = sorted({path for pattern in KEPT for path in folder.glob(pattern) if path.is_file()})
    files = {path.name: f"sha256:{hash_file(path)}" if hub else store.put(path) for path in kept}
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = store.put(tokenizer.to_str().encode())
    return add_seed(store, files, config, parameters, name=name, separator=separator, licence=licence, hub=hub)


def _config(folder: Path) -> Any:
    """The folder's config, if it is of a causal LM that transformers itself knows."""
    if not (folder / "config.json").exists():
        raise BadSeed(f"{folder} has no config.json: a seed is a folder written by transformers' save_pretrained, or a .gguf file")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UNREADABLE as error:
        raise BadSeed(
            f"{folder}: transformers {transformers.__version__} does not know this architecture ({error}); "
            "code that comes with a checkpoint is never run: use another seed, or upgrade transformers"
        ) from error
    default = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "model without a language head")
    name = (config.architectures or [default])[0]
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True)  # BERT as it comes
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or masked or config.is_encoder_decoder:
        raise BadSeed(f"{folder} holds a {name}: a seed is a causal LM (LlamaForCausalLM, OPTForCausalLM, …) that predicts the next token")
    config.architectures = [name]
    return config


def _tokenizer(folder: Path) -> tuple[Tokenizer, tuple[int | None, int | None]]:
    """The tokenizer in its fast form (a slow one is converted), and the ids of its bos and eos."""
    if not any(path for pattern in ("tokenizer.json", "vocab.*", "*.model") for path in folder.glob(pattern)):
        raise BadSeed(f"{folder} has no tokenizer: put its tokenizer.json beside config.json")
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return loaded.backend_tokenizer, (loaded.bos_token_id, loaded.eos_token_id)
    except UNREADABLE as error:
        raise BadSeed(f"{folder}: the tokenizer cannot be opened ({error}): put its tokenizer.json beside config.json") from error


def _parameters(folder: Path) -> int:
    """Load the weights once, to know that all are there; return the number of parameters."""
    if not any(folder.glob("*.safetensors")):
        raise BadSeed(
            f"{folder} has no *.safetensors, and pickled weights (*.bin) are never opened: "
            "convert them, or name a hub revision that holds converted ones (id@refs/pr/N)"
        )
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True, output_loading_info=True)
    except UNREADABLE as error:
        raise BadSeed(f"{folder}: the weights cannot be loaded ({error}): copy the checkpoint again") from error
    model, info = loaded
    absent = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if absent:
        raise BadSeed(f"{folder}: {len(absent)} tensors are missing or of a wrong shape, first {absent[0]}: copy the checkpoint again")
    return model.num_parameters()


def _convert_gguf(path: Path, folder: Path) -> None:
    """A GGUF file -> a float32 transformers folder. Quantised weights are expanded: slow, done once."""
    require("gguf", "gguf")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except UNREADABLE as error:
        raise BadSeed(f"{path}: transformers {transformers.__version__} cannot read it ({error}): use the original checkpoint") from error
    # the model still calls itself quantised, so it can be neither saved nor trained (transformers 5.23): move its weights to a fresh one
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = type(model)(config)
    clean.load_state_dict(model.state_dict())
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
