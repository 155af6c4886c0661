"""Adapters trained elsewhere: any PEFT LoRA folder, or hub id, that fits a seed becomes an expert."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from elmwood.errors import BadInput, Damaged
from elmwood.lm.adapters.peft_config import read_settings
from elmwood.lm.files import download, seed_folder
from elmwood.records import Digest, Expert, Recipe, Seed
from elmwood.store import Store
from elmwood.store.headers import read_header

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
    _check(place / WEIGHTS, config, seed, store)
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": seed.digest, "inference_mode": True, "bias": "none"}
    recipe = Recipe(
        method="dora" if config.use_dora else "lora", steps=1, rank=config.r, alpha=None if config.use_rslora else config.lora_alpha,
        targets=tuple(sorted(config.target_modules)) if isinstance(config.target_modules, set) else "all-linear",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / CONFIG).write_text(json.dumps(_in_order(settings | plain), indent=1))
        files = {CONFIG: store.put(Path(scratch) / CONFIG), WEIGHTS: store.put(place / WEIGHTS)}
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


def _check(path: Path, config: Any, seed: Seed, store: Store) -> None:
    """The file must hold exactly the tensors that PEFT makes for these settings on this seed, all finite. Raises BadInput."""
    from peft import get_peft_model, get_peft_model_state_dict

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(seed_folder(seed, store), trust_remote_code=False))
    try:
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"{path}: PEFT cannot add it to {seed.name} ({error}): its target modules are not in this seed, or its settings are damaged"
        ) from error
    wanted = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    try:
        read_header(path)
        with safe_open(path, "pt") as file:
            have = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a dict
            if wrong := sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name)):
                shapes = f"{have.get(wrong[0], 'absent')} in the file, {wanted.get(wrong[0], 'absent')} by its settings on {seed.name}"
                raise BadInput(f"{path}: {len(wrong)} tensors do not fit, first {wrong[0]}: {shapes}; the adapter has another base")
            if broken := next((name for name in have if not torch.isfinite(file.get_tensor(name)).all()), None):
                raise BadInput(f"{path}: {broken} contains NaN or Inf; training diverged: take an earlier checkpoint")
    except (SafetensorError, Damaged) as error:
        raise BadInput(f"{path} cannot be read ({error}): download it again") from error
