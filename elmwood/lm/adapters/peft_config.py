"""Reads the adapter_config.json of plain LoRA. Free of torch."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elmwood.errors import BadInput
from elmwood.records.plain_json import parse_json

# The settings of PEFT's LoRA, all of them. These say what the numbers mean:
USED: tuple[str, ...] = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")
USED += ("layers_to_transform", "layers_pattern", "bias", "init_lora_weights")
# these say nothing of what a trained adapter adds; which way a matrix stands is the seed's word, as in PEFT
IDLE: tuple[str, ...] = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
IDLE += ("lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size")
IDLE += ("megatron_core", "runtime_config", "ensure_weight_tying")
# these change more than W + scale * B A, or other modules; each must be absent or off
_UNSUPPORTED: tuple[str, ...] = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save")
_UNSUPPORTED += ("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "velora_config")
_UNSUPPORTED += ("monteclora_config", "arrow_config", "kasa_config", "megatron_config")
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # other initial values of A and B change the base weights too
ALPHA = 8  # of a rank-stabilised adapter (arXiv:2312.03732): at rank 16 its scale is 2, that of the usual alpha = 2 rank
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of its tensors
MOST_RANK, MOST_ALPHA = 1 << 16, 1 << 32
_NAMES = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern")  # settings that PEFT gives to `re`
# the tensors of an adapter that are understood; all others are refused by name
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?:lora_(?P<half>[AB])\.weight|lora_magnitude_vector(?:\.weight)?)")
_NAME = re.compile(r"\^?[\w-]+(\.[\w-]+)*", re.ASCII)


def read_settings(path: Path, dora: bool = False, modules: Sequence[str] = ()) -> dict[str, Any]:
    """An adapter_config.json of plain LoRA (or weight-decomposed, if `dora`). `modules`: the names of the modules it has tensors for,
    which replace target modules given as a pattern. Raises BadInput for other kinds of adapter."""
    try:
        settings = parse_json(path.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
        targets = settings.get("target_modules")
        if modules and isinstance(targets, str) and not _NAME.fullmatch(targets):
            settings["target_modules"] = sorted(modules)
        _check_numbers(settings)
        _check_names(settings)
    except (ValueError, OSError) as error:
        raise BadInput(f"{path} cannot be used: {error}") from error
    if settings.get("peft_type") != "LORA":
        raise BadInput(
            f"{path}: peft_type is {str(settings.get('peft_type'))[:80]!r}; only LORA adapters can be experts: train one with LoRA"
        )
    if used := [key for key in _UNSUPPORTED if settings.get(key) and not (dora and key == "use_dora")]:
        raise BadInput(f"{path} uses {', '.join(used)}; only W + scale * B A is supported here: train without it")
    if strange := [key for key in settings if key not in (*USED, *IDLE, *_UNSUPPORTED) and not _is_default(key, settings[key])]:
        raise BadInput(f"{path} uses {strange[0][:80]!r}, which is not known here: upgrade elmwood and PEFT, or train without it")
    if settings.get("bias", "none") != "none":
        raise BadInput(f"{path} trains biases ({str(settings['bias'])[:80]!r}); adapters of one base share them: train with bias='none'")
    if settings.get("init_lora_weights") not in _PLAIN_STARTS:
        raise BadInput(
            f"{path}: init_lora_weights={str(settings['init_lora_weights'])[:40]} changes the base weights: convert it to plain LoRA"
        )
    return settings


def _is_default(key: str, value: Any) -> bool:
    """Whether a setting that is not known here is off, or as PEFT has it by default."""
    if not value:
        return True
    from elmwood.lm.adapters.peft_import import LoraConfig  # a second, for settings of other versions alone

    return bool(getattr(LoraConfig(), key, None) == value)


def split_key(key: str) -> tuple[str, str] | None:
    """The layer of an adapter's tensor, and which part of it: "A", "B", or "m" for the magnitudes of DoRA; none for other tensors."""
    match = _KEY.fullmatch(key)
    return (match["layer"], match["half"] or "m") if match else None


def check_floats(path: Path, dtypes: Mapping[str, str]) -> None:
    """The tensors of an adapter are floats that can be added to weights. `dtypes`: as safetensors spells them. Raises BadInput."""
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise BadInput(f"{path}: {name[:80]!r} has values of {dtype}, and an adapter has {', '.join(FLOATS)}: save it in one of these")


def scale(settings: dict[str, Any], layer: str, rank: int) -> float:
    """The factor of B A: alpha / rank, or alpha / sqrt(rank) if rank-stabilised (arXiv:2312.03732)."""
    patterns = settings.get("alpha_pattern") or {}
    matching = (alpha for name, alpha in patterns.items() if _is_name_of(name, layer))
    alpha = next(matching, settings.get("lora_alpha", 8))  # PEFT's default
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _is_name_of(name: str, layer: str) -> bool:
    """As PEFT matches a key of alpha_pattern: the whole name, or what follows a dot; ^ stands before a whole name."""
    return layer == name.removeprefix("^") or (not name.startswith("^") and layer.endswith(f".{name}"))


def _check_numbers(settings: dict[str, Any]) -> None:
    """Raises ValueError where a rank or a scale is none."""
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(field) or {}, dict):
            raise ValueError(f"its {field} is no table of names: save the adapter again with PEFT")
    for rank in (settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()):
        if type(rank) is not int or rank > MOST_RANK:
            raise ValueError(f"the rank {str(rank)[:80]} is no whole number up to {MOST_RANK}: save the adapter with a smaller one")
    for alpha in (settings.get("lora_alpha", 8), *(settings.get("alpha_pattern") or {}).values()):
        if type(alpha) not in (int, float) or abs(alpha) > MOST_ALPHA:
            raise ValueError(f"the alpha {str(alpha)[:80]!r} is no number up to {MOST_ALPHA}: save the adapter with a smaller one")


def _check_names(settings: dict[str, Any]) -> None:
    """Raises ValueError for a pattern: PEFT matches these settings as regular expressions, and one of a stranger may never end."""
    for field in _NAMES:
        value = settings.get(field)
        names = [value] if isinstance(value, str) else list(value or ()) if isinstance(value, list | dict | type(None)) else [value]
        for name in names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(
                    f"its {field} has {str(name)[:80]!r}, and only names of modules are read here, as q_proj or layers.0.mlp.up_proj: "
                    "list the names that the pattern stands for"
                )
