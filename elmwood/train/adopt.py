"""Experts trained elsewhere: a PEFT LoRA folder or a full fine-tune, or a hub's id of one, that fits a seed becomes an expert."""

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from elmwood.corpus.tokens import load_tokenizer
from elmwood.errors import BadInput, Damaged, ElmwoodError, ForeignExpert, copied_to
from elmwood.lm.adapters.peft_config import check_floats, read_settings
from elmwood.lm.adapters.places import first_unfit, linear_layers, unfit
from elmwood.lm.files import download, same_tokens, seed_folder
from elmwood.lm.importing.checkpoint import normalise
from elmwood.lm.importing.config import read_config
from elmwood.lm.importing.seed import companions
from elmwood.lm.importing.words import read_tokenizer
from elmwood.lm.pretrained import linked, open_empty
from elmwood.records import Digest, Expert, Files, Recipe, Seed, parse
from elmwood.store import Store
from elmwood.store.disk import temporary_folder
from elmwood.store.headers import read_header
from elmwood.weights.experts import Low, Whole, seed_places
from elmwood.weights.tensors import StoredTensor

CONFIG, WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "elmwood.json"
# the settings that say what the numbers mean; no other setting of somebody else's file is used
SETTINGS: tuple[str, ...] = ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora")
SETTINGS += ("use_dora", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "lora_dropout")
# settings of a model that say nothing of what it computes from the same tensors, beside rates of dropout
ALIKE: tuple[str, ...] = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache")
ALIKE += ("initializer_range", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


def import_expert(source: str, seed: Seed, store: Store, *, partition: Digest | None = None, domain: int | None = None) -> Expert:
    """An adapter or a full fine-tune of this seed made elsewhere, a folder or a hub's `id` or `id@revision`, as an expert of it. How it
    was trained is not known: its recipe has one step and its data are empty. Raises BadInput, BadSeed, ForeignExpert, Damaged.
    """
    place = Path(source).expanduser()
    if not place.is_dir():
        if place.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise BadInput(f"{source} is not a folder: name one that PEFT's or transformers' save_pretrained wrote, or a hub id")
        identifier, _, revision = source.partition("@")
        place = download(identifier, revision, files=(CONFIG, WEIGHTS, ABOUT), passed=())
        place = place if (place / CONFIG).is_file() else download(identifier, revision)
    adapter, weights = (place / CONFIG).is_file(), [path for path in place.glob("model*.safetensors") if path.is_file()]
    if adapter and weights:
        raise BadInput(f"{source} holds an adapter and a whole model: move {CONFIG} or {weights[0].name} out of it")
    if not adapter and (place / "config.json").is_file():
        return import_checkpoint(place, seed, store, partition=partition, domain=domain)
    return import_adapter(str(place), seed, store, partition=partition, domain=domain)


def import_adapter(folder: str, seed: Seed, store: Store, *, partition: Digest | None = None, domain: int | None = None) -> Expert:
    """A PEFT adapter folder as an expert of this seed. Raises BadInput if it is not LoRA, does not fit the seed, or holds NaN or Inf."""
    from elmwood.lm.adapters.peft_import import LoraConfig  # PEFT takes as long to import as all else of this room, and few need it

    place = Path(folder).expanduser()
    if not place.is_dir():
        raise BadInput(f"{folder} is not a folder: name one that PEFT's save_pretrained wrote")
    for name in (CONFIG, WEIGHTS):
        if not (place / name).is_file():
            raise BadInput(
                f"{folder} has no {name}: an adapter is a folder that PEFT's save_pretrained wrote (pickled files are never opened)"
            )
    try:
        found = read_settings(place / CONFIG, dora=True, modules=_modules(place / WEIGHTS))
        settings = {key: found[key] for key in SETTINGS if found.get(key) is not None}
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{place / CONFIG}: PEFT refuses these settings ({error}): save the adapter again with PEFT") from error
    tensors = seed_places(seed, store)
    beside = _check(place / WEIGHTS, config, tensors, seed, store)
    settings |= {"r": config.r, "lora_alpha": config.lora_alpha}  # PEFT's defaults where they were left out
    turned = any(one.turned for one in tensors.values())
    if bool(settings.get("fan_in_fan_out")) != turned:  # PEFT corrects it when it loads the adapter; other programs do not
        settings["fan_in_fan_out"] = turned
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": seed.digest, "inference_mode": True, "bias": "none"}
    recipe = Recipe(
        method="dora" if config.use_dora else "lora", steps=1, rank=config.r, alpha=None if config.use_rslora else config.lora_alpha,
        targets=tuple(sorted(config.target_modules)) if isinstance(config.target_modules, set) else "all-linear",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, copied_to(scratch, place):
        made = Path(scratch)
        (made / CONFIG).write_text(json.dumps(_in_order(settings | plain), indent=1), encoding="utf-8")
        if beside:
            kept = {name: value for name, value in load_file(place / WEIGHTS).items() if name not in beside}
            save_file(kept, made / WEIGHTS, {"format": "pt"})
        else:
            (made / WEIGHTS).symlink_to((place / WEIGHTS).resolve())
        Low("adopted", made, tensors, dora=True)  # as every later reader opens it
        files = {CONFIG: store.put(made / CONFIG), WEIGHTS: store.put((made / WEIGHTS).resolve())}
    said = _said(place / ABOUT, seed, files)
    expert = Expert(seed=seed.digest, partition=partition, domain=domain, data=(), recipe=recipe, files=files, probe=said)
    store.add(expert)
    return expert


def _said(about: Path, seed: Seed, files: Files) -> tuple[float, ...]:
    """What the expert of an exported folder said at the end of its training, where these are its seed and its weights."""
    try:
        found = parse(about.read_bytes())
    except (OSError, ElmwoodError):
        return ()
    same = isinstance(found, Expert) and (found.seed, found.files.get(WEIGHTS)) == (seed.digest, files[WEIGHTS])
    return found.probe if same and isinstance(found, Expert) else ()


def import_checkpoint(place: Path, seed: Seed, store: Store, *, partition: Digest | None = None, domain: int | None = None) -> Expert:
    """A transformers folder with a full fine-tune of this seed, as an expert of it: the same architecture, settings, tokenizer and
    tensors. It may have other rows of vocabulary, which merges take with `resize`. Raises BadSeed, ForeignExpert, Damaged.
    """
    config, tensors, source = read_config(place), seed_places(seed, store), seed_folder(seed, store)
    for name, (mine, its) in _differences(config.to_dict(), read_config(source).to_dict()).items():
        raise ForeignExpert(
            f"{place}: its config.json says {name} = {mine!r:.80}, and {seed.name} has {its!r:.80}: it is no fine-tune of it"
        )
    words = load_tokenizer(place) if (place / "tokenizer.json").is_file() else read_tokenizer(place)[0]
    if not same_tokens(words, load_tokenizer(source)):
        raise ForeignExpert(f"{place} has another tokenizer than {seed.name}: only a fine-tune that kept the seed's can be an expert of it")
    with temporary_folder(store.root / "work") as scratch:
        found = normalise(place, config, scratch)
        with linked(path for path in found.files if path.suffix == ".safetensors") as links:
            Whole(place.name, links, tensors, rows=True)
        kept = companions(place, found)
        files = {name: store.take(path) if scratch in path.parents else store.put(path) for name, path in kept.items()}
    files["tokenizer.json"] = store.put(source / "tokenizer.json")
    expert = Expert(seed=seed.digest, partition=partition, domain=domain, data=(), recipe=Recipe(steps=1), files=files)
    store.add(expert)
    return expert


def _differences(mine: dict[str, Any], its: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of two models that make other computations of the same tensors, the architecture first."""
    names = [name for name in {"model_type": None, **mine, **its} if name not in ALIKE and "drop" not in name]
    return {name: (mine.get(name), its.get(name)) for name in names if mine.get(name) != its.get(name)}


def _modules(path: Path) -> list[str]:
    """The modules that an adapter has tensors for. Raises BadInput."""
    try:
        names = read_header(path).tensors
    except Damaged as error:
        raise BadInput(f"{path} cannot be read ({error}): download it again") from error
    start, end = "base_model.model.", ".lora_A.weight"
    return [name.removeprefix(start).removesuffix(end) for name in names if name.startswith(start) and name.endswith(end)]


def _in_order(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings and target modules sorted, patterns as they stand: of several that match a layer, the first applies."""
    targets = settings.get("target_modules")
    return dict(sorted(settings.items())) | ({"target_modules": sorted(targets)} if isinstance(targets, list) else {})


def _check(path: Path, config: Any, tensors: Mapping[str, StoredTensor], seed: Seed, store: Store) -> list[str]:
    """The file must hold the tensors that PEFT makes for these settings on this seed, all finite, on layers that can carry an adapter.
    Returns the names of others that may be left out: copies of the seed's embedding or head, as it saves beside them. Raises BadInput."""
    from elmwood.lm.adapters.peft_import import get_peft_model, get_peft_model_state_dict

    base = open_empty(seed_folder(seed, store))
    layers, refused = linear_layers(base), unfit(base, tensors)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it corrects fan_in_fan_out
            model = get_peft_model(base, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"{path}: PEFT cannot add it to {seed.name} ({error}): its target modules are not in this seed, or its settings are damaged"
        ) from error
    if wrong := first_unfit(model, layers, refused):
        raise BadInput(f"{path}: {wrong}: train an adapter without it")
    wanted = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    try:
        check_floats(path, {name: entry["dtype"] for name, entry in read_header(path).tensors.items()})
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            beside = [name for name in names - wanted.keys() if _is_copy(file.get_tensor(name), name, tensors)]
            have = {name: file.get_slice(name).get_shape() for name in names.difference(beside)}
            if odd := sorted(have.keys() - wanted.keys()):
                raise BadInput(f"{path}: {odd[0]!r} has no place in {seed.name} with this adapter: {_why(odd[0])}")
            if unlike := sorted(name for name in wanted if wanted[name] != have.get(name)):
                shapes = f"{have.get(unlike[0], 'absent')} in the file, {wanted[unlike[0]]} by its settings on {seed.name}"
                raise BadInput(f"{path}: {len(unlike)} tensors do not fit, first {unlike[0]}: {shapes}; the adapter has another base")
            if broken := next((name for name in have if not torch.isfinite(file.get_tensor(name).float()).all()), None):
                raise BadInput(f"{path}: {broken} contains NaN or Inf; training diverged: take an earlier checkpoint")
            return beside
    except (SafetensorError, Damaged) as error:
        raise BadInput(f"{path} cannot be read ({error}): download it again") from error


def _is_copy(value: torch.Tensor, key: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a whole matrix that PEFT saved beside the adapter is the seed's, in the adapter's dtype."""
    place = tensors.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
    if place is None or place.shape != tuple(value.shape):
        return False
    with safe_open(place.path, "pt") as file:
        name = next(name for name in file.keys() if tensors[name] == place)  # noqa: SIM118  # not a dict
        return torch.equal(file.get_tensor(name).to(value.dtype), value)


def _why(key: str) -> str:
    if "lora_" in key:
        return "its name is not one that PEFT's save_pretrained writes for it; save it again from the trained model, or it has another base"
    return "it is a whole matrix, and not the seed's; merge it into its base with PEFT's merge_and_unload, and adopt the checkpoint"
