"""The weights of a model made elsewhere, as a checkpoint in which every tensor has the name and the layout of the loaded model.

Checkpoints in circulation differ from what transformers' save_pretrained writes today: names without the model's prefix, older
spellings, buffers and heads that the model does not have, a stored copy of a tied head, fused experts. transformers reads them all,
but merges, exports and other programs go by the names in the files. Such a checkpoint is written anew, once, at import.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from elmwood.errors import BadSeed
from elmwood.lm.checkpoint import Stored, harmless, said, stored_tensors, weight_files
from elmwood.lm.pretrained import open_files

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # dtypes of a seed's parameters
SHARD = "4GB"  # of a checkpoint that is written anew


class Checkpoint(NamedTuple):
    """The weights of a seed: its files, and what was changed to get them."""

    files: tuple[Path, ...]  # weights with their index; a config.json where they were written anew
    config: Any
    parameters: int
    changes: tuple[str, ...] = ()  # none: the files are as they were given


def check_values(paths: Iterable[Path], names: Iterable[str]) -> None:
    """Every number of these tensors is finite. One tensor at a time is in memory. Raises BadSeed."""
    wanted = set(names)
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in wanted.intersection(file.keys()):
                if not torch.isfinite(file.get_tensor(name)).all():
                    raise BadSeed(f"{path}: {name} contains NaN or Inf: its training or conversion failed; use another checkpoint")


# ---- as the model is loaded --------------------------------------------------------------------------------------


def canonical(model: Any) -> dict[str, Stored]:
    """What save_pretrained writes for a model, whatever the names in the files that it was loaded from."""
    model._weight_conversions = None  # or it would write the names that it was loaded from
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    kinds = {dtype: kind for kind, dtype in FLOATS.items()}
    return {name: Stored(kinds.get(value.dtype, str(value.dtype)), tuple(value.shape)) for name, value in state.items()}


def unused(stored: dict[str, Stored], model: Any, unexpected: Iterable[str], where: object) -> list[str]:
    """Names of stored tensors that the model does not use. Raises BadSeed unless all of them are constants or other tasks' heads."""
    own, prefix = model.state_dict().keys(), model.base_model_prefix
    free = [name for name in stored if name not in own and f"{prefix}.{name}" not in own and name.removeprefix(f"{prefix}.") not in own]
    left = set(unexpected)
    passed = [name for name in free if name not in left and _forgiven(name, model)]
    strange = sorted(name for name in left if not harmless(name, stored.get(name)))
    if strange:
        kind = type(model).__name__
        raise BadSeed(
            f"{where}: {len(strange)} tensors have no place in a {kind}, first {said(strange[0])}: "
            "the config.json is that of another model, or these layers need code that transformers does not have; use another seed"
        )
    return sorted({*passed, *(name for name in free if name in left)})


def _forgiven(name: str, model: Any) -> bool:
    """What transformers itself passes over for this class: its patterns, none from a file."""
    patterns = (*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
    return any(re.search(pattern, name) for pattern in patterns)


def widest(stored: Iterable[Stored], where: object) -> torch.dtype:
    """The one dtype that holds all these values. Raises BadSeed for quantised ones."""
    kinds = sorted({one.dtype for one in stored})
    if strange := [kind for kind in kinds if kind not in FLOATS]:
        raise BadSeed(
            f"{where}: its weights are stored as {strange[0]}, and a seed has {', '.join(FLOATS)}: "
            "they are quantised; use the original checkpoint, and --method qlora to train over four bits"
        )
    dtype = FLOATS[kinds[0]]
    for kind in kinds:
        dtype = torch.promote_types(dtype, FLOATS[kind])
    return dtype


def told(names: Sequence[str]) -> str:
    """A few of many names."""
    return ", ".join(said(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- written anew ------------------------------------------------------------------------------------------------


def normalise(folder: Path, config: Any, scratch: Path) -> Checkpoint:
    """A folder's weights as they are, where their names and shapes are those of the loaded model; else written anew into `scratch`.

    Each tensor may have a float dtype of its own; a checkpoint that is written anew has the widest of them, and takes the memory of
    one model and one shard. Raises BadSeed, Damaged.
    """
    files = weight_files(folder)
    weights = [path for path in files if path.suffix == ".safetensors"]
    stored = stored_tensors(weights)
    widest((one for name, one in stored.items() if not harmless(name, one)), folder)
    model, info = open_files(folder, device="meta")
    _refuse_absent(folder, model, info, stored)
    dropped = unused(stored, model, info["unexpected_keys"], folder)
    used = {name: one for name, one in stored.items() if name not in dropped}
    dtype = widest(used.values(), folder)
    check_values(weights, used)
    tied = model.all_tied_weights_keys
    twice = [name for name, source in tied.items() if model.get_parameter(name) is not model.get_parameter(source)]
    if not twice and {name: one.shape for name, one in canonical(model).items()} == {name: one.shape for name, one in stored.items()}:
        return Checkpoint(tuple(files), config, model.num_parameters())
    model, _ = open_files(folder, dtype=dtype, device="cpu")
    changes = []
    if own := [name for name in twice if name not in model.all_tied_weights_keys]:
        model.config.tie_word_embeddings = False
        changes.append(f"tie_word_embeddings is now false: the files hold other values for {told(own)} than for the embedding")
    written = canonical(model)
    changes += _describe(used, written, dropped, [name for name in twice if name not in own], dtype)
    made = scratch / "written"
    model.save_pretrained(made, max_shard_size=SHARD)
    found = (*sorted(made.glob("*.safetensors")), *made.glob("*.index.json"), made / "config.json")
    return Checkpoint(found, model.config, model.num_parameters(), tuple(changes))


def _refuse_absent(folder: Path, model: Any, info: dict[str, Any], stored: dict[str, Stored]) -> None:
    """Raises BadSeed for parameters that the files do not hold, or in another shape: they would be random."""
    patterns = model._keys_to_ignore_on_load_missing or ()  # transformers' own; what it makes up itself is random to us
    held = stored.keys() | {f"{model.base_model_prefix}.{name}" for name in stored}
    passed = [name for name in canonical(model) if name not in held and any(re.search(pattern, name) for pattern in patterns)]
    shaped = [name if isinstance(name, str) else str(name[0]) for name in info["mismatched_keys"]]
    if absent := sorted({*map(str, info["missing_keys"]), *shaped, *passed}):
        head = " (if its head is its embedding, set tie_word_embeddings to true in config.json)" if "lm_head.weight" in absent else ""
        raise BadSeed(
            f"{folder}: {len(absent)} tensors are missing or of a wrong shape, first {said(absent[0])}: copy the files again{head}"
        )


def _describe(
    used: dict[str, Stored], written: dict[str, Stored], dropped: Sequence[str], copies: Sequence[str], dtype: torch.dtype
) -> list[str]:
    """What was changed, in sentences."""
    found = []
    old, new = sorted(used.keys() - written.keys() - set(copies)), sorted(written.keys() - used.keys())
    if old:
        found.append(f"{len(old)} tensors have the names of the loaded model: {told(old)} became {told(new)}")
    if dropped:
        found.append(f"{len(dropped)} tensors that the model does not use were left out: {told(dropped)}")
    if copies:
        found.append(f"{told(copies)}, a copy of the embedding, was left out: the config ties them")
    if mixed := sorted({one.dtype for one in used.values()}):
        found += [f"all tensors are {dtype}, which holds every value: they were {' and '.join(mixed)}"] if len(mixed) > 1 else []
    return found
