"""Adapters trained elsewhere: any PEFT LoRA folder, or hub id, that fits a seed becomes an expert."""

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from elmwood.errors import BadInput, Damaged
from elmwood.lm.adapters.peft_config import read_settings
from elmwood.lm.adapters.places import first_unfit, linear_layers, unfit
from elmwood.lm.files import download, seed_folder
from elmwood.lm.pretrained import open_empty
from elmwood.records import Digest, Expert, Recipe, Seed
from elmwood.store import Store
from elmwood.store.headers import read_header
from elmwood.weights.experts import Low, seed_places
from elmwood.weights.tensors import StoredTensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# the settings that say what the numbers mean; no other setting of somebody else's file is used
KEPT: tuple[str, ...] = ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
KEPT += ("fan_in_fan_out", "layers_to_transform", "layers_pattern", "lora_dropout")


def import_adapter(folder: str, seed: Seed, store: Store, *, partition: Digest | None = None, domain: int | None = None) -> Expert:
    """A PEFT adapter folder, or a hub's `id` or `id@revision`, as an expert of this seed. How it was trained is not known: its recipe
    has one step and its data are empty. Raises BadInput if it is not LoRA, does not fit the seed, or holds NaN or Inf.
    """
    from peft import LoraConfig  # takes as long to import as all else of this room, and few need it

    place = Path(folder).expanduser()
    if not place.is_dir():
        if place.exists() or folder.startswith((".", "/", "~")) or folder.count("/") != 1:
            raise BadInput(f"{folder} is not a folder: name one that PEFT's save_pretrained wrote, or a hub id")
        identifier, _, revision = folder.partition("@")
        place = download(identifier, revision, files=(CONFIG, WEIGHTS))
    for name in (CONFIG, WEIGHTS):
        if not (place / name).is_file():
            raise BadInput(
                f"{folder} has no {name}: an adapter is a folder that PEFT's save_pretrained wrote (pickled files are never opened)"
            )
    try:
        found = read_settings(place / CONFIG, dora=True, modules=_modules(place / WEIGHTS))
        settings = {key: found[key] for key in KEPT if found.get(key) is not None}
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
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        (made / CONFIG).write_text(json.dumps(_in_order(settings | plain), indent=1), encoding="utf-8")
        if beside:
            kept = {name: value for name, value in load_file(place / WEIGHTS).items() if name not in beside}
            save_file(kept, made / WEIGHTS, {"format": "pt"})
        else:
            (made / WEIGHTS).symlink_to((place / WEIGHTS).resolve())
        Low("adopted", made, tensors, dora=True)  # as every later reader opens it
        files = {CONFIG: store.put(made / CONFIG), WEIGHTS: store.put((made / WEIGHTS).resolve())}
    expert = Expert(seed=seed.digest, partition=partition, domain=domain, data=(), recipe=recipe, files=files)
    store.add(expert)
    return expert


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
    from peft import get_peft_model, get_peft_model_state_dict

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
        read_header(path)
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            beside = [name for name in names - wanted.keys() if _is_copy(file.get_tensor(name), name, tensors)]
            have = {name: file.get_slice(name).get_shape() for name in names.difference(beside)}
            if odd := sorted(have.keys() - wanted.keys()):
                raise BadInput(f"{path}: {odd[0]!r} has no place in {seed.name} with this adapter: {_why(odd[0])}")
            if unlike := sorted(name for name in wanted if wanted[name] != have.get(name)):
                shapes = f"{have.get(unlike[0], 'absent')} in the file, {wanted[unlike[0]]} by its settings on {seed.name}"
                raise BadInput(f"{path}: {len(unlike)} tensors do not fit, first {unlike[0]}: {shapes}; the adapter has another base")
            if broken := next((name for name in have if not torch.isfinite(file.get_tensor(name)).all()), None):
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
