"""Seeds and experts as transformers models: new ones, imports, loading. No remote code is run and no pickle is opened."""

import copy
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from elmwood.errors import BadInput, BadSeed, Damaged, ForeignExpert
from elmwood.lm.adapters import lowrank
from elmwood.lm.adapters.peft_config import read_settings
from elmwood.lm.files import KEPT, download, seed_folder
from elmwood.lm.products import hasten
from elmwood.records import Expert, Files, Merged, Mixture, Point, Recipe, Seed, Shape
from elmwood.registry import require
from elmwood.store import Store, hash_file
from elmwood.store.headers import check_headers

transformers.logging.disable_progress_bar()  # only cli prints
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it advertises a kernel that would be downloaded

Branch = Expert | Merged | Mixture  # weights grown from a seed: a checkpoint, or an adapter over it
# what is raised where transformers cannot read something, or its header is refused before
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError, Damaged)


# ---- from scratch -----------------------------------------------------------------------------------------------


def new_model(shape: Shape, rng_seed: int = 0) -> PreTrainedModel:
    """A Llama with tied embeddings and random weights, float32 on the CPU. The same rng_seed gives the same bytes. Raises BadSeed."""
    if shape.width % (2 * shape.heads):
        raise BadSeed(f"width {shape.width} is not a multiple of twice the heads ({shape.heads}), which rotary positions need: change one")
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng_seed)
        return hasten(LlamaForCausalLM(config).eval())


def save_seed(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    store: Store,
    *,
    name: str,
    separator: int,
    corpus: str | None = None,
    recipe: Recipe | None = None,
    curve: Sequence[Point] = (),
    licence: str | None = None,
) -> Seed:
    """Store a model with its tokenizer as a transformers folder, and the record of both. Raises BadSeed."""
    check_tokenizer(tokenizer, model.config, separator, name)
    if model.config.eos_token_id is None:
        model.config.bos_token_id = model.config.eos_token_id = separator
        if model.generation_config is not None:
            model.generation_config.bos_token_id = model.generation_config.eos_token_id = separator
    with tempfile.TemporaryDirectory() as scratch:
        save_folder(model, tokenizer, Path(scratch))
        files = store.put_folder(Path(scratch))
    fields = {"corpus": corpus, "recipe": recipe, "curve": tuple(curve), "licence": licence}
    return add_seed(store, files, model.config, model.num_parameters(), name=name, separator=separator, **fields)


def save_folder(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """A transformers checkpoint folder (safetensors) with a tokenizer that AutoTokenizer opens too."""
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = model.config.eos_token_id
    special = {} if end is None else {"eos_token": tokenizer.id_to_token(end[0] if isinstance(end, list) else end)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def check_tokenizer(tokenizer: Tokenizer, config: Any, separator: int, where: str) -> None:
    """Every token id must have a row in the embedding. Raises BadSeed."""
    rows, largest = config.get_text_config().vocab_size, max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= rows:
        raise BadSeed(
            f"{where}: the tokenizer has ids up to {largest}, the embedding only {rows} rows: "
            "use the tokenizer of this checkpoint, or resize its embedding first"
        )
    if not 0 <= separator < rows:
        raise BadSeed(f"{where}: the separator {separator} is not a token id below {rows}: choose one that is")


def add_seed(store: Store, files: Files, config: Any, parameters: int, **fields: Any) -> Seed:
    """The record of a checkpoint folder, from its config. Raises BadSeed."""
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    if not context:
        raise BadSeed(f"{fields['name']}: the config has no max_position_embeddings: add it to config.json")
    architecture = config.architectures[0]
    seed = Seed(architecture=architecture, parameters=parameters, vocabulary=text.vocab_size, context=context, files=files, **fields)
    store.add(seed)
    return seed


# ---- import ----------------------------------------------------------------------------------------------------


def import_seed(
    source: str, store: Store, *, name: str | None = None, separator: int | str | None = None, licence: str | None = None
) -> Seed:
    """A seed from a transformers folder, a .gguf file, or a model hub's `id` or `id@revision`.

    A hub seed stays in the hub's own cache, pinned to its commit and to the digests of its files; anything else is copied
    into the store. `separator` is the token (or its id) before each document: by default "<|endoftext|>" where the
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
    folder = download(identifier, revision)
    # without a tokenizer.json, which is then converted, the seed is copied into the store
    hub = f"{identifier}@{folder.name}" if (folder / "tokenizer.json").exists() else None
    return _import_folder(folder, store, name or identifier.split("/")[-1], separator, licence, hub)


def _import_folder(folder: Path, store: Store, name: str, separator: int | str | None, licence: str | None, hub: str | None = None) -> Seed:
    config = _config(folder)
    tokenizer, starts = _tokenizer(folder)
    if isinstance(separator, str):
        separator = _token_id(separator, tokenizer, folder)
    if separator is None:
        separator = next((found for found in (tokenizer.token_to_id("<|endoftext|>"), *starts) if found is not None), None)
    if separator is None:
        raise BadSeed(f"{folder}: the tokenizer has no <|endoftext|>, bos or eos to separate documents: name a token with --separator")
    check_tokenizer(tokenizer, config, separator, str(folder))
    parameters = _parameters(folder)
    kept = sorted({path for pattern in KEPT for path in folder.glob(pattern) if path.is_file()})
    files = {path.name: f"sha256:{hash_file(path)}" if hub else store.put(path) for path in kept}
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = store.put(tokenizer.to_str().encode())
    return add_seed(store, files, config, parameters, name=name, separator=separator, licence=licence, hub=hub)


def _token_id(token: str, tokenizer: Tokenizer, folder: Path) -> int:
    """The id of a token given by its text, or as a number. Raises BadSeed."""
    found = tokenizer.token_to_id(token)
    if found is None and not token.isdecimal():
        raise BadSeed(f"{folder}: the tokenizer has no token {token!r}: name one of its vocabulary, or its id")
    return int(token) if found is None else found


def _config(folder: Path) -> Any:
    """The folder's config, which must be that of a causal LM in transformers. Raises BadSeed."""
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
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True)  # BERT as published
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or masked or config.is_encoder_decoder:
        raise BadSeed(f"{folder} holds a {name}: a seed is a causal LM (LlamaForCausalLM, OPTForCausalLM, …) that predicts the next token")
    config.architectures = [name]
    return config


def _tokenizer(folder: Path) -> tuple[Tokenizer, tuple[int | None, int | None]]:
    """The fast tokenizer (a slow one is converted), and the ids of its bos and eos. Raises BadSeed."""
    if not any(path for pattern in ("tokenizer.json", "vocab.*", "*.model") for path in folder.glob(pattern)):
        raise BadSeed(f"{folder} has no tokenizer: put its tokenizer.json beside config.json")
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return loaded.backend_tokenizer, (loaded.bos_token_id, loaded.eos_token_id)
    except UNREADABLE as error:
        raise BadSeed(f"{folder}: the tokenizer cannot be opened ({error}): put its tokenizer.json beside config.json") from error


def _parameters(folder: Path) -> int:
    """Load the weights once, to check that none is missing; return the number of parameters. Raises BadSeed."""
    if not any(folder.glob("*.safetensors")):
        raise BadSeed(
            f"{folder} has no *.safetensors, and pickled weights (*.bin) are never opened: "
            "convert them, or name a hub revision that holds converted ones (id@refs/pr/N)"
        )
    loaded: Any
    try:
        check_headers(folder.glob("*.safetensors"))
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except UNREADABLE as error:
        raise BadSeed(f"{folder}: the weights cannot be loaded ({error}): copy the checkpoint again") from error
    model, info = loaded
    absent = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if absent:
        raise BadSeed(f"{folder}: {len(absent)} tensors are missing or of a wrong shape, first {absent[0]}: copy the checkpoint again")
    return model.num_parameters()


def check_loads(folder: Path) -> None:
    """transformers finds every tensor of a checkpoint in its shape, and no others, and the tokenizer fits. Raises BadSeed."""
    config, (tokenizer, _) = _config(folder), _tokenizer(folder)
    check_tokenizer(tokenizer, config, 0, str(folder))
    loaded: Any
    try:
        check_headers(folder.glob("*.safetensors"))
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map="meta",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except UNREADABLE as error:
        raise BadSeed(f"{folder}: the weights cannot be loaded ({error}): write the checkpoint again") from error
    if wrong := sorted({str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loaded[1][kind]}):
        raise BadSeed(
            f"{folder}: {len(wrong)} tensors are missing, foreign or of a wrong shape, first {wrong[0]}: write the checkpoint again"
        )


def _convert_gguf(path: Path, folder: Path) -> None:
    """A GGUF file -> a float32 transformers folder. Quantised weights are expanded, which is slow. Raises BadSeed."""
    require("gguf", "gguf")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except UNREADABLE as error:
        raise BadSeed(f"{path}: transformers {transformers.__version__} cannot read it ({error}): use the original checkpoint") from error
    # the model is still marked as quantised, so it can be neither saved nor trained (transformers 5.23): copy its weights to a new one
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = type(model)(config)
    clean.load_state_dict(model.state_dict())
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- loading ----------------------------------------------------------------------------------------------------


def end_tokens(seed: Seed, store: Store) -> list[int]:
    """The tokens that end a text, from the checkpoint's config; no weights are read."""
    folder = seed_folder(seed, store)
    if (folder / "generation_config.json").exists():
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().eos_token_id
    return found if isinstance(found, list) else [] if found is None else [found]


def best_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def method_of(branch: Branch) -> str:
    """The kind of adapter, or "full" for a checkpoint."""
    if isinstance(branch, Expert):
        return branch.recipe.method
    return "lora" if "adapter_config.json" in branch.files else "full"


def load_model(
    seed: Seed, store: Store, branch: Branch | None = None, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The seed, or weights grown from it, in eval mode on `device` (default: a GPU where there is one).

    `dtype` is by default float32 on a CPU (bf16 is slower there), elsewhere as stored. An adapter comes as PEFT's model over its own
    copy of the seed; many adapters over one copy are `elmwood.lm.adapters.lora`. Raises ForeignExpert, Damaged.
    """
    place = torch.device(device) if device is not None else best_device()
    wanted: torch.dtype | str = dtype or (torch.float32 if place.type == "cpu" else "auto")
    if branch is not None:
        check_seed(seed, branch)
    low = branch is not None and lowrank.FILE in branch.files  # a mixture of adapters
    full = branch is not None and method_of(branch) == "full" and not low
    folder = store.folder(branch.files) if full and branch is not None else seed_folder(seed, store)
    check_headers(folder.glob("*.safetensors"))
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=wanted, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    if branch is not None and low:
        model = lowrank.add_gated_experts(model, store.folder(branch.files))
    elif branch is not None and not full:
        if "adapter_model.safetensors" not in branch.files:  # PEFT would open a pickle, or ask the model hub
            raise BadInput(f"{branch.kind} {branch.digest[:8]} has no adapter_model.safetensors: save the adapter again with PEFT")
        adapter = store.folder(branch.files)
        read_settings(adapter / "adapter_config.json", dora=True)
        check_headers(adapter.glob("*.safetensors"))
        from peft import PeftModel  # takes as long to import as everything else here

        model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True)
    return hasten(model.to(place).eval())


def load_quantised(seed: Seed, store: Store, device: torch.device | str | None = None) -> PreTrainedModel:
    """The seed with its linear layers, the head aside, in four bits: NF4, its constants quantised again (QLoRA, arXiv:2305.14314).

    Embeddings, norms and head stay as they are, in bf16 on a GPU and in float32 on a CPU, and so is what is computed. Raises MissingExtra.
    """
    require("bitsandbytes", "qlora")
    place = torch.device(device) if device is not None else best_device()
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    folder = seed_folder(seed, store)
    check_headers(folder.glob("*.safetensors"))
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=four,
        device_map={"": place},
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    for module in model.modules():  # on some CPUs it would repack weights of some sizes in bf16 in eval mode
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def check_seed(seed: Seed, branch: Branch) -> None:
    """Weights are of use with their own seed only. Raises ForeignExpert."""
    if branch.seed != seed.digest:
        raise ForeignExpert(
            f"{branch.kind} {branch.digest[:8]} grew from seed {branch.seed[:8]}, not from {seed.digest[:8]} ({seed.name}): "
            "use it with its own seed, or retrain it on this one"
        )
