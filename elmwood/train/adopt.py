"""Adapters made elsewhere: any PEFT LoRA folder, or hub id, that fits a seed becomes an expert of it."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from elmwood.errors import BadInput
from elmwood.lm.files import download, seed_folder
from elmwood.lm.peft_config import read_settings
from elmwood.records import Digest, Expert, Recipe, Seed
from elmwood.store import Store

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# the settings that say what the numbers mean; all others are left behind, so that a stranger's file decides nothing else here
KEPT: tuple[str, ...] = ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
KEPT += ("fan_in_fan_out", "layers_to_transform", "layers_pattern", "lora_dropout")


def import_adapter(folder: str, seed: Seed, store: Store, *, partition: Digest | None = None, domain: int | None = None) -> Expert:
    """A PEFT adapter folder, or a hub's `id` or `id@revision`, as an expert of this seed. How it was trained stays unknown: its recipe
    says one step, its data are none. Raises BadInput where it is no LoRA, grew on another base, or holds numbers that are not finite.
    """
    from peft import LoraConfig  # takes as long to import as all else of this room, and few need it

    place = Path(folder).expanduser()
    if not place.is_dir():
        if place.exists() or folder.startswith((".", "/", "~")) or folder.count("/") != 1:
            raise BadInput(f"{folder} is no folder here: give one that PEFT's save_pretrained wrote, or a hub id")
        identifier, _, revision = folder.partition("@")
        place = download(identifier, revision, files=(CONFIG, WEIGHTS))
    for name in (CONFIG, WEIGHTS):
        if not (place / name).is_file():
            raise BadInput(
                f"{folder} has no {name}: an adapter is a folder that PEFT's save_pretrained wrote (pickled ones are never opened)"
            )
    try:
        found = read_settings(place / CONFIG, dora=True)
        settings = {key: found[key] for key in KEPT if found.get(key) is not None}
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{place / CONFIG}: PEFT does not take these settings ({error}): save the adapter again with PEFT") from error
    _check(place / WEIGHTS, config, seed, store)
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": seed.digest, "inference_mode": True, "bias": "none"}
    recipe = Recipe(
        method="dora" if config.use_dora else "lora", steps=1, rank=config.r, alpha=None if config.use_rslora else config.lora_alpha,
        targets=tuple(sorted(config.target_modules)) if isinstance(config.target_modules, set) else "all-linear",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / CONFIG).write_text(json.dumps(_sorted(settings) | plain, indent=1, sort_keys=True))
        files = {CONFIG: store.put(Path(scratch) / CONFIG), WEIGHTS: store.put(place / WEIGHTS)}
    expert = Expert(seed=seed.digest, partition=partition, domain=domain, data=(), recipe=recipe, files=files)
    store.add(expert)
    return expert


def _sorted(settings: dict[str, Any]) -> dict[str, Any]:
    targets = settings.get("target_modules")
    return settings | ({"target_modules": sorted(targets)} if isinstance(targets, list) else {})


def _check(path: Path, config: Any, seed: Seed, store: Store) -> None:
    """The file must hold just the tensors that PEFT would make for these settings over this seed, and finite numbers. Raises BadInput."""
    from peft import get_peft_model, get_peft_model_state_dict

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(seed_folder(seed, store), trust_remote_code=False))
    try:
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"{path}: PEFT cannot put it over {seed.name} ({error}): its target modules are not in this seed, or its settings are damaged"
        ) from error
    wanted = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    try:
        with safe_open(path, "pt") as file:
            have = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a dict
            if wrong := sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name)):
                shapes = f"{have.get(wrong[0], 'absent')} in the file, {wanted.get(wrong[0], 'absent')} by its settings over {seed.name}"
                raise BadInput(f"{path}: {len(wrong)} tensors do not fit, first {wrong[0]}: {shapes}; the adapter grew on another base")
            if astray := next((name for name in have if not torch.isfinite(file.get_tensor(name)).all()), None):
                raise BadInput(f"{path}: {astray} holds numbers that are not finite; its training went astray: take an earlier state of it")
    except SafetensorError as error:
        raise BadInput(f"{path} cannot be read ({error}): fetch it again") from error
