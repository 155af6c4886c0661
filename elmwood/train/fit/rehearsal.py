"""What training takes on a GPU: one step of the real loop on a pretended one (`pretend`), without weights and without a card.

python -m elmwood.train.fit.rehearsal FILE, with lines of JSON on stdin, [config, recipe], writes one line of JSON for each
"""

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from elmwood.lm.pretrained import make_config, new_model_of
from elmwood.records import Recipe
from elmwood.train import loop
from elmwood.train.adapter import add_adapter
from elmwood.train.card.attention import can_choose
from elmwood.train.card.path import fast_path
from elmwood.train.data import Batch
from elmwood.train.fit.allocator import CachingAllocator
from elmwood.train.fit.formulas import BESIDE, EIGHT_BITS, FLOAT
from elmwood.train.fit.pretend import place, pretend
from elmwood.train.loss import Abilities, base_model


def rehearse(*runs: tuple[Any, Recipe]) -> list[dict[str, int] | None]:
    """Bytes at the peak on a GPU, by what they are for, for each config and recipe; they sum to the total. None: the model looks at values.

    In a process of its own: torch's autograd knows only devices that were there at the first backward pass.
    """
    lines = [json.dumps([config.to_dict(), recipe.model_dump(mode="json")]) for config, recipe in runs]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rehearsed"
        command = [sys.executable, "-W", "ignore", "-m", __spec__.name, str(path)]
        subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, encoding="utf-8")
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return found + [None] * (len(runs) - len(found))


def rehearse_here(config: Any, recipe: Recipe) -> dict[str, int]:
    """One of them, in this process. Raises what the model raises.

    The optimiser's moments are made first, as all steps but the first find them. Their bytes in 8 bits are counted, not tried.
    """
    low = torch.float32 if recipe.method == "full" else torch.bfloat16
    with torch.device("meta"):
        model = new_model_of(config, low)
        if recipe.method == "qlora":
            pack_linear(model)
        if recipe.method != "full":
            model = add_adapter(model, recipe, "rehearsal")
    allocator = CachingAllocator()
    able = Abilities("documents" if can_choose(base_model(model)) else "mask", True)
    with pretend(allocator) as device, loop.recompute_activations(model, recipe), fast_path(model, recipe, able):
        _place(model, device)
        weights = allocator.allocated
        own = {name: one for name, one in model.named_parameters() if one.requires_grad}
        optimizer = loop.adamw(own, recipe.model_copy(update={"optimiser": "adamw"}))
        for one in own.values():
            one.grad = torch.zeros_like(one)
        optimizer.step()
        optimizer.zero_grad()
        held = allocator.allocated - weights
        model.train()
        loop.add_gradients(model, able, _batch(recipe), recipe)
        loop.update_weights(optimizer, recipe, 0)
        most, reserved = allocator.most, allocator.reserved
        del model, optimizer, own
        gc.collect()
    kept = held if recipe.optimiser == "adamw" else round(held * EIGHT_BITS / FLOAT)
    return {
        "libraries": BESIDE["cuda"], "weights": weights, "optimiser": kept,
        "activations and gradients": most - weights - held, "allocator": reserved - most,
    }  # fmt: skip


def _batch(recipe: Recipe) -> Batch:
    """Rows of two documents each."""
    position_L = np.arange(recipe.length) % max(1, recipe.length - recipe.length // 3)
    tokens_BL = np.ones((recipe.batch, recipe.length), dtype=np.int64)
    return Batch(tokens_BL, tokens_BL, np.tile(position_L, (recipe.batch, 1)))


# ---- four bits, as bitsandbytes keeps them -------------------------------------------------------------------------


def pack_linear(model: Any) -> None:
    """The linear layers but the head as layers in four bits, on the meta device."""
    from bitsandbytes.nn import Linear4bit

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module) in (nn.Linear, Conv1D) and module is not head:
                into, out = module.weight.shape if isinstance(module, Conv1D) else (module.in_features, module.out_features)
                four = Linear4bit(into, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
                four.bias = module.bias
                setattr(parent, name, four)
    model.is_loaded_in_4bit = True


def _place(model: Any, device: torch.device) -> None:
    """Give every tensor its place on the device; weights in four bits are bytes, and numbers with which to unpack them."""
    packed = [module for module in model.modules() if type(module).__name__ == "Linear4bit" and hasattr(module, "compute_dtype")]
    shapes = [(module.out_features, module.in_features) for module in packed]
    for module, (out, into) in zip(packed, shapes, strict=True):
        module.weight = nn.Parameter(torch.empty(out * into // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
    place(model, device)
    for module, (out, into) in zip(packed, shapes, strict=True):
        module.weight.quant_state = _state(out, into, device)


def _state(out: int, into: int, device: torch.device) -> Any:
    from bitsandbytes.functional import QuantState

    def numbers(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device=device)

    blocks = -(-out * into // 64)
    again = QuantState(absmax=numbers(-(-blocks // 256)), code=numbers(256), blocksize=256, dtype=torch.float32)
    return QuantState(
        absmax=numbers(blocks, torch.uint8), shape=torch.Size((out, into)), code=numbers(16), blocksize=64, quant_type="nf4",
        dtype=torch.bfloat16, offset=torch.empty((), device=device), state2=again,
    )  # fmt: skip


def main(lines: Sequence[str], path: Path) -> None:
    for line in lines:
        settings, plan = json.loads(line)
        try:
            found: dict[str, int] | None = rehearse_here(make_config(settings), Recipe.model_validate(plan))
        except Exception:  # whatever a model raises that has no values
            found = None
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.stdin.read().splitlines(), Path(sys.argv[1]))
