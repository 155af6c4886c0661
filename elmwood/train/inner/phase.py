"""Inner steps on one machine: H steps of AdamW from a version of the weights, and a compressed delta; what it leaves out is kept.

The optimiser's moments and the error stay on this machine. Interrupted phases resume. Files of a folder:

    state.safetensors           weights, moments, and how far the phase is
    error.safetensors           what was computed and not yet applied by a version
    whole-ID, sent-ID           a finished phase: delta and error together, and what was sent of them; until its receipt came

N values of a tensor
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from elmwood.corpus.tokens import Packed
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.outer.compress import Floats, open_delta, write_delta
from elmwood.outer.gates import WRONGS
from elmwood.outer.step import read_tensors
from elmwood.records import Fate, Star
from elmwood.store.disk import keep_whole
from elmwood.train import checkpoint
from elmwood.train.card.path import fast_path
from elmwood.train.data import batches
from elmwood.train.loop import adamw, add_gradients, recompute_activations, update_weights, use_threads

EVERY = 5.0  # seconds between two checkpoints


class Slice(NamedTuple):
    """What a grant says: batches first ... first + steps - 1 of a part of the text, from a version."""

    id: str
    base: int
    part: int
    first: int


class Local(NamedTuple):
    """A machine's model and everything that stays with it."""

    model: Any
    weights: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    packed: Packed
    star: Star
    folder: Path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}


def open_local(model: Any, packed: Packed, star: Star, folder: Path) -> Local:
    """Raises BadInput where a weight would not train."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(model.named_parameters())
    return Local(model, weights, adamw(weights, star.recipe), packed, star, folder)


def documents_of(packed: Packed, star: Star, part: int) -> np.ndarray:
    """The documents of a part; all of them where there are fewer than parts."""
    chosen_N = np.arange(part % len(packed.starts), len(packed.starts), star.parts)
    return chosen_N if len(chosen_N) else np.arange(len(packed.starts))


def set_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Set a model's weights to those of a file. Raises BadInput where their names differ."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        if set(file.keys()) != set(weights):
            odd = sorted(set(file.keys()) ^ set(weights))[0]
            raise BadInput(f"the version has other tensors than the model ({odd!r}): is it of this star's seed?")
        for name, weight in weights.items():
            weight.copy_(file.get_tensor(name))


def run_phase(
    local: Local, slice: Slice, base: Path, on_step: Callable[[int], None] = lambda step: None, progress: Progress = silent
) -> Path:  # fmt: skip
    """Train a slice from the weights in `base`; the compressed delta as a file. A finished phase is not run again. Raises BadInput."""
    sent = local.folder / f"sent-{slice.id}.safetensors"
    if sent.exists():
        return sent
    star, recipe = local.star, local.star.recipe
    path = local.folder / checkpoint.FILE
    stand: dict[str, Any] = checkpoint.read(path, dict, local.weights, local.optimizer) or {"step": 0, "slice": "", "done": 0}
    if stand["slice"] != slice.id:
        set_weights(local.weights, base)
        stand = {"step": stand["step"], "slice": slice.id, "done": 0}
    rows = batches(local.packed, recipe, slice.first + stand["done"], documents_of(local.packed, star, slice.part))
    saved = time.monotonic()
    with ExitStack() as around:
        around.enter_context(use_threads(recipe.threads))
        around.enter_context(torch.random.fork_rng())
        around.enter_context(recompute_activations(local.model, recipe))
        able = around.enter_context(fast_path(local.model, recipe))
        local.model.train()
        while stand["done"] < star.steps:
            torch.manual_seed((recipe.rng_seed << 32) + stand["step"])
            add_gradients(local.model, able, next(rows), recipe)
            update_weights(local.optimizer, recipe, min(slice.base * star.steps + stand["done"], recipe.steps - 1))
            stand = stand | {"step": stand["step"] + 1, "done": stand["done"] + 1}
            on_step(stand["done"])
            progress(f"version {slice.base}", stand["done"], star.steps, "steps")
            if time.monotonic() - saved > EVERY or stand["done"] == star.steps:
                checkpoint.write(path, stand, local.weights, local.optimizer)
                saved = time.monotonic()
        local.model.eval()
    return _finish(local, slice, base, sent)


def _finish(local: Local, slice: Slice, base: Path, sent: Path) -> Path:
    """Delta and error together, and what of them goes out. The file that is sent is written last: it says that the phase is done."""
    error = load_error(local)
    whole = {
        name: local.weights[name].detach().float().cpu().numpy().reshape(-1) - value_N + error.get(name, np.float32(0))
        for name, value_N in read_tensors(base)
    }
    _save(whole, local.folder / f"whole-{slice.id}.safetensors")
    temporary = sent.with_name(f"{sent.name}.tmp")
    write_delta(temporary, whole, local.shapes, local.star.form)
    keep_whole(temporary, sent)
    return sent


def unsettled(local: Local) -> list[str]:
    """Finished phases, by id, whose receipts did not come yet."""
    return sorted(path.stem.removeprefix("whole-") for path in local.folder.glob("whole-*.safetensors"))


def settle_phase(local: Local, id: str, fate: Fate | None) -> float:
    """Take the receipt of a proposal: what was applied is subtracted from the error, and nothing else is. None: it was lost. The norm of
    what is dropped: the error of a proposal that did harm. May be run again."""
    whole_path, sent_path = local.folder / f"whole-{id}.safetensors", local.folder / f"sent-{id}.safetensors"
    dropped = 0.0
    if whole_path.exists():
        whole = load_file(whole_path)
        if fate and fate.fate == "applied":
            sent = open_delta(sent_path, local.shapes, local.star.form)
            whole = {name: value_N - np.float32(fate.scale) * sent.values(name) for name, value_N in whole.items()}
        elif fate and fate.code in WRONGS:
            dropped = float(np.sqrt(sum(np.square(value_N, dtype=np.float64).sum() for value_N in whole.values())))
            whole = {name: np.zeros_like(value_N) for name, value_N in whole.items()}
        _save(whole, local.folder / "error.safetensors")
        whole_path.unlink()
    sent_path.unlink(missing_ok=True)
    return dropped


def load_error(local: Local) -> dict[str, Floats]:
    """What no version has applied yet, by tensor [N]; nothing at the start."""
    path = local.folder / "error.safetensors"
    return dict(load_file(path)) if path.exists() else {}


def _save(tensors: dict[str, Floats], path: Path) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    save_file(tensors, temporary)
    keep_whole(temporary, path)
