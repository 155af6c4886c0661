"""The checkpoint of a run, one file: trained weights, the optimiser's moments, step, curve, seconds. Written atomically."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elmwood.errors import Damaged, DoesNotFit
from elmwood.records import Point
from elmwood.store.disk import keep_whole
from elmwood.train.card.processes import full, part_of

FILE = "state.safetensors"
S = TypeVar("S")


class Position(NamedTuple):
    """Everything beside tensors that the next step depends on, and the clock."""

    step: int = 0  # steps done
    loss: float = 0.0  # sum since the last point of the curve, nats per token
    curve: tuple[Point, ...] = ()
    seconds: float = 0.0  # over all runs, interrupted ones included up to their checkpoint
    best: int = 0  # the step of the lowest validation loss, if there is one; its weights have a file of their own
    best_loss: float | None = None
    waited: int = 0  # validations since


def save(
    folder: Path, position: Position, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, first: bool = True
) -> None:  # fmt: skip
    """Replace the checkpoint in `folder`: the `first` process of a run does, and all take part. Raises DoesNotFit."""
    write(folder / FILE, position._asdict() | {"curve": [point.model_dump() for point in position.curve]}, weights, optimizer, first)
    for path in folder.glob(_best("*")) if first else ():
        if path.name != _best(position.best):
            path.unlink()  # no checkpoint refers to it any more


def load(folder: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Position:
    """Set weights and optimiser to the last checkpoint, and return its position; the start if there is none. Raises Damaged."""
    return read(folder / FILE, lambda plain: Position(**plain | {"curve": parse_curve(plain["curve"])}), weights, optimizer) or Position()


def parse_curve(plain: list[dict[str, Any]]) -> tuple[Point, ...]:
    """A curve as a checkpoint stores it."""
    return tuple(Point(**point) for point in plain)


def keep_best(folder: Path, position: Position, weights: dict[str, Tensor]) -> None:
    """Keep the weights as the best so far. Earlier ones stay until a checkpoint is written that does not refer to them."""
    write_tensors(folder / _best(position.best), {name: weight.detach() for name, weight in weights.items()}, {})


def load_best(folder: Path, position: Position, weights: dict[str, Tensor]) -> None:
    """Restore the weights of the lowest validation loss. Raises Damaged."""
    path = folder / _best(position.best)
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(file.get_tensor(name))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise Damaged(f"{path} cannot be read ({error}): delete its folder, and the run starts again") from error


def _best(step: int | str) -> str:
    return f"best-{step}.safetensors"


def write(
    path: Path, plain: dict[str, Any], weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, first: bool = True
) -> None:  # fmt: skip
    """Write the weights, the optimiser's tensors for each, and `plain`, which is JSON and has `step`. Raises DoesNotFit.

    Tensors that are divided among processes are gathered, which all of them take part in; the `first` one writes.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        own = {"weight": weight.detach()} | {part: tensor for part, tensor in optimizer.state[weight].items() if part != "step"}
        for part, tensor in own.items():
            whole = full(tensor)
            if first:
                tensors[f"{part}.{name}"] = whole if whole is tensor else whole.cpu()
    if first:
        write_tensors(path, tensors, {"stand": json.dumps(plain)})


def read(
    path: Path, parse: Callable[[dict[str, Any]], S], weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> S | None:  # fmt: skip
    """Restore weights and optimiser from a file, and return the parsed JSON; None if there is no file. Raises Damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            plain = json.loads(file.metadata()["stand"])
            kept: dict[str, dict[str, Tensor]] = {}  # name of a weight -> the weight and the optimiser's tensors for it
            for key in file.keys():  # noqa: SIM118  # not a dict
                part, _, name = key.partition(".")
                kept.setdefault(name, {})[part] = file.get_tensor(key)
            counted = isinstance(optimizer, torch.optim.AdamW)  # other optimisers count in integers
            for name, weight in weights.items():
                weight.copy_(part_of(kept[name].pop("weight"), weight))
                step = torch.tensor(float(plain["step"])) if counted else plain["step"]
                optimizer.state[weight] = {"step": step, **{part: part_of(tensor, weight) for part, tensor in kept[name].items()}}
            return parse(plain)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Damaged(f"{path} cannot be read ({error}): delete it, and the run starts again") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """All or nothing. Raises DoesNotFit."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    if shutil.disk_usage(path.parent).free < size + (1 << 20):
        raise DoesNotFit(f"{path.parent} needs {size:,} bytes for a checkpoint, and the disk has less: free some, or move the store")
    seen: set[int] = set()  # an optimiser may share a table among weights; a file needs a copy for each
    whole = {}
    for name, tensor in tensors.items():
        whole[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    temporary = path.with_name(f"{path.name}.tmp")
    save_file(whole, temporary, metadata=facts)
    keep_whole(temporary, path)
