"""Seeds and experts as transformers models: new ones, imports, loading. No remote code is run and no pickle is opened."""

import copy
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from elmwood.errors import BadSeed, ForeignExpert
from elmwood.lm import pretrained
from elmwood.lm.adapters import lowrank
from elmwood.lm.devices import choose_device
from elmwood.lm.files import seed_folder
from elmwood.lm.importing.config import check_causal, read_config
from elmwood.lm.importing.seed import add_seed
from elmwood.lm.importing.seed import import_seed as import_seed
from elmwood.lm.importing.words import check_tokenizer, read_tokenizer
from elmwood.lm.pretrained import end_ids, open_adapter, open_weights
from elmwood.lm.products import hasten
from elmwood.records import Expert, Merged, Mixture, Point, Seed, Shape
from elmwood.registry import require
from elmwood.store import Store

transformers.logging.disable_progress_bar()  # only cli prints
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it advertises a kernel that would be downloaded

Branch = Expert | Merged | Mixture  # weights grown from a seed: a checkpoint, or an adapter over it


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


def new_model_like(settings: Mapping[str, Any], rng_seed: int = 0, where: object = "this config") -> PreTrainedModel:
    """A causal LM of any architecture of transformers with random weights, float32 on the CPU. The same rng_seed gives the same bytes.
    Raises BadSeed."""
    config = check_causal(pretrained.make_config({**settings, "dtype": "float32"}, where), where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng_seed)
        return hasten(pretrained.new_model_of(config, torch.float32).eval())


def save_seed(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    store: Store,
    *,
    name: str,
    separator: int,
    curve: Sequence[Point] = (),
    **facts: Any,
) -> Seed:
    """Store a model with its tokenizer as a transformers folder, and the record of both, with these facts. Raises BadSeed."""
    check_tokenizer(tokenizer, model.config, separator, name)
    if model.config.eos_token_id is None:
        model.config.bos_token_id = model.config.eos_token_id = separator
        if model.generation_config is not None:
            model.generation_config.bos_token_id = model.generation_config.eos_token_id = separator
    with tempfile.TemporaryDirectory() as scratch:
        save_folder(model, tokenizer, Path(scratch))
        files = store.put_folder(Path(scratch))
    return add_seed(store, files, model.config, model.num_parameters(), name=name, separator=separator, curve=tuple(curve), **facts)


def save_folder(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """A transformers checkpoint folder (safetensors) with a tokenizer that AutoTokenizer opens too."""
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = model.config.eos_token_id
    special = {} if end is None else {"eos_token": tokenizer.id_to_token(end[0] if isinstance(end, list) else end)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def check_loads(folder: Path) -> None:
    """transformers finds every tensor of a checkpoint in its shape, and no others, and the tokenizer fits. Raises BadSeed."""
    config, (tokenizer, _) = read_config(folder), read_tokenizer(folder)
    check_tokenizer(tokenizer, config, 0, str(folder))
    open_weights(folder, device="meta")


# ---- loading ----------------------------------------------------------------------------------------------------


def end_tokens(seed: Seed, store: Store) -> list[int]:
    """The tokens that end a text, from the checkpoint's config; no weights are read."""
    return end_ids(seed_folder(seed, store))


def own_generation(seed: Seed, store: Store) -> dict[str, Any]:
    """`pretrained.generation_settings` of the seed."""
    return pretrained.generation_settings(seed_folder(seed, store))


def open_tokenizer(seed: Seed, store: Store, add_bos: bool | None = None) -> PreTrainedTokenizerBase:
    """The seed's tokenizer as transformers opens it. `add_bos`: whether it adds a bos, which is the separator where it has none; None: as
    the checkpoint says. Raises BadSeed."""
    folder = seed_folder(seed, store)
    settings: dict[str, Any] = {} if add_bos is None else {"add_bos_token": add_bos}
    found = pretrained.open_tokenizer(folder, **settings)
    if add_bos and found.bos_token_id is None:
        found = pretrained.open_tokenizer(folder, **settings, bos_token=found.convert_ids_to_tokens(seed.separator))
    return found


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
    place = choose_device(device)
    wanted: torch.dtype | str = dtype or (torch.float32 if place.type == "cpu" else "auto")
    if branch is not None:
        check_seed(seed, branch)
    low = branch is not None and lowrank.FILE in branch.files  # a mixture of adapters
    full = branch is not None and method_of(branch) == "full" and not low
    folder = store.folder(branch.files) if full and branch is not None else seed_folder(seed, store)
    model: Any = open_weights(folder, stored_before=True, dtype=wanted)
    if branch is not None and low:
        model = lowrank.add_gated_experts(model, store.folder(branch.files))
    elif branch is not None and not full:
        model = open_adapter(model, store.folder(branch.files))
    return hasten(model.to(place).eval())


def load_quantised(seed: Seed, store: Store, device: torch.device | str | None = None) -> PreTrainedModel:
    """The seed with its linear layers, the head aside, in four bits: NF4, its constants quantised again (QLoRA, arXiv:2305.14314).

    Embeddings, norms and head stay as they are, in bf16 on a GPU and in float32 on a CPU, and so is what is computed. Raises MissingExtra.
    """
    require("bitsandbytes", "qlora")
    place = choose_device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model: Any = open_weights(seed_folder(seed, store), stored_before=True, dtype=dtype, quantisation=four, device={"": place})
    for module in model.modules():  # on some CPUs it would repack weights of some sizes in bf16 in eval mode
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same weights, in the same memory, whose modules others may wrap."""
    others = (one for module in model.modules() for one in vars(module).values() if isinstance(one, torch.Tensor))
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *others)})


def check_seed(seed: Seed, branch: Branch) -> None:
    """Weights are of use with their own seed only. Raises ForeignExpert."""
    if branch.seed != seed.digest:
        raise ForeignExpert(
            f"{branch.kind} {branch.digest[:8]} grew from seed {branch.seed[:8]}, not from {seed.digest[:8]} ({seed.name}): "
            "use it with its own seed, or retrain it on this one"
        )
