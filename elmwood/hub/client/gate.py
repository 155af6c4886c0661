"""The gate for files of strangers: one safetensors file with exactly the tensors that the recipe makes, all finite. Free of torch.

Nothing else is taken from a member: the adapter's config is made here, from the recipe. The hub and every verifier call the same
functions. What is refused has one of three codes, and the status that HTTP has for it.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from elmwood.errors import BadInput, Damaged
from elmwood.lm.adapters.peft_config import ALPHA, split_key
from elmwood.records import Recipe, Seed
from elmwood.store import Store
from elmwood.store.headers import Header, read_header
from elmwood.weights.experts import CONV1D
from elmwood.weights.tensors import decode

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST_HEADER = 1 << 20  # bytes
FIRST = 5  # tensors named in a refusal
PIECE = 1 << 22  # bytes looked at together
STATUS = {"not-safetensors": 415, "wrong-tensors": 422, "not-finite": 422}

Shapes = Mapping[str, tuple[int, ...]]  # tensor -> shape


class Refused(BadInput):
    """A file that the gate does not let in."""

    def __init__(self, code: str, detail: str):
        super().__init__(detail)
        self.code, self.status = code, STATUS[code]


def check_adapter(path: Path, expected: Shapes, dtype: str = "F32") -> None:
    """Let a file in, or raise Refused. Messages name tensors of the recipe and shortened ones of the file, never a path."""
    top = _read_header(path)
    if unlike := _differences(top, expected, dtype):
        more = f" and {len(unlike) - FIRST} more" if len(unlike) > FIRST else ""
        raise Refused("wrong-tensors", f"the adapter is not that of the recipe: {'; '.join(unlike[:FIRST])}{more}: train with the recipe")
    if broken := _first_nonfinite(path, top, dtype):
        raise Refused("not-finite", f"{broken} contains NaN or Inf; training diverged: train again from the seed")


def _read_header(path: Path) -> Header:
    with path.open("rb") as file:
        start = file.read(9)
    length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
    if start[8:] != b"{" or length > LARGEST_HEADER:
        what = f"its header has {length} bytes, and {LARGEST_HEADER} are read at most" if start[8:] == b"{" else "it begins otherwise"
        raise Refused("not-safetensors", f"this is no safetensors file of an adapter ({what}): upload the one that training wrote")
    try:
        return read_header(path)
    except Damaged as error:
        reason = str(error).removeprefix(str(path)).lstrip(": ").removesuffix(": fetch it again")
        raise Refused(
            "not-safetensors", f"this is no whole safetensors file ({reason[:300]}): upload the one that training wrote"
        ) from error


def _differences(top: Header, expected: Shapes, dtype: str) -> list[str]:
    """What of a header is not as expected, in words, sorted."""
    found = [f"{name[:120]!r} is not of it" for name in sorted(top.tensors.keys() - expected.keys())[: FIRST + 1]]
    found += [f"{name!r} is missing" for name in sorted(expected.keys() - top.tensors.keys())]
    for name in sorted(expected.keys() & top.tensors.keys()):
        one, shape = top.tensors[name], list(expected[name])
        if (one["dtype"], one["shape"]) != (dtype, shape):
            found.append(f"{name!r} is {one['dtype']} {one['shape']} and has to be {dtype} {shape}")
    if top.metadata and top.metadata != {"format": "pt"}:
        found.append("its metadata say more than the format")
    return found


def _first_nonfinite(path: Path, top: Header, dtype: str) -> str | None:
    """The first tensor with NaN or Inf. All tensors have the same dtype, and stand one after another."""
    with path.open("rb") as file:
        file.seek(top.begin)
        at = 0
        while piece := file.read(PIECE):
            finite_N = np.isfinite(decode(np.frombuffer(piece, np.uint8), dtype))
            if not finite_N.all():
                at += int(finite_N.argmin()) * (len(piece) // len(finite_N))
                return next(name for name, one in top.tensors.items() if one["data_offsets"][0] <= at < one["data_offsets"][1])
            at += len(piece)
    return None


# ---- what a recipe makes --------------------------------------------------------------------------------------------


def expected_tensors(seed: Seed, recipe: Recipe, store: Store) -> dict[str, tuple[int, ...]]:
    """The tensors of the adapter that a recipe makes of a seed, from the seed's files. Needs torch. Raises BadInput."""
    from elmwood.lm.adapters.peft_import import get_peft_model_state_dict
    from elmwood.lm.files import seed_folder
    from elmwood.lm.pretrained import open_empty
    from elmwood.train.adapter import add_adapter
    from elmwood.weights.experts import seed_places

    if recipe.method not in ("lora", "qlora", "dora"):
        raise BadInput(f"the recipe has method {recipe.method!r}: members of a run train adapters, choose lora, qlora or dora")
    model = add_adapter(open_empty(seed_folder(seed, store)), recipe, seed.digest, seed_places(seed, store))
    return {name: tuple(tensor.shape) for name, tensor in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items())}


def adapter_config(recipe: Recipe, seed: Seed, expected: Shapes) -> bytes:
    """The adapter_config.json of an adapter with these tensors: of the recipe alone, so that a member's settings are never read."""
    modules = sorted({part[0] for part in map(split_key, expected) if part})
    settings = {
        "base_model_name_or_path": seed.digest, "bias": "none", "fan_in_fan_out": seed.architecture in CONV1D, "inference_mode": True,
        "lora_alpha": ALPHA if recipe.alpha is None else recipe.alpha, "peft_type": "LORA", "r": recipe.rank, "target_modules": modules,
        "task_type": "CAUSAL_LM", "use_dora": recipe.method == "dora", "use_rslora": recipe.alpha is None,
    }  # fmt: skip
    return json.dumps(settings, indent=1, sort_keys=True).encode()
