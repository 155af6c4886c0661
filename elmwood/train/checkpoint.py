"""Where a run stands, in one file: trained weights, the optimiser's moments, step, curve, seconds. Written atomically, never half."""

import json
import os
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
from elmwood.store import sync_folder

FILE = "state.safetensors"
S = TypeVar("S")


class Stand(NamedTuple):
    """Everything beside tensors that the next step depends on, and the clock."""

    step: int = 0  # steps done
    loss: float = 0.0  # sum since the last point of the curve, nats per token
    curve: tuple[Point, ...] = ()
    seconds: float = 0.0  # spent in all runs, those cut short included as far as they were kept
    best: int = 0  # the step of the least validation loss, where one is looked at; its weights stand in a file of their own
    best_loss: float | None = None
    waited: int = 0  # looks since


def save(folder: Path, stand: Stand, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Replace the state in `folder`. Raises DoesNotFit."""
    write(folder / FILE, stand._asdict() | {"curve": [point.model_dump() for point in stand.curve]}, weights, optimizer)
    for path in folder.glob(_best("*")):
        if path.name != _best(stand.best):
            path.unlink()  # no state speaks of it any more


def load(folder: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Stand:
    """Bring weights and optimiser to where the last run stood; the beginning where there was none. Raises Damaged."""
    return read(folder / FILE, lambda plain: Stand(**plain | {"curve": points(plain["curve"])}), weights, optimizer) or Stand()


def points(plain: list[dict[str, Any]]) -> tuple[Point, ...]:
    """A curve as it stands in a state."""
    return tuple(Point(**point) for point in plain)


def keep_best(folder: Path, stand: Stand, weights: dict[str, Tensor]) -> None:
    """Set the weights aside as the best so far. Earlier ones stay until a state that does not speak of them is written."""
    _write(folder / _best(stand.best), {name: weight.detach() for name, weight in weights.items()}, {})


def load_best(folder: Path, stand: Stand, weights: dict[str, Tensor]) -> None:
    """Bring back the weights of the least validation loss. Raises Damaged."""
    path = folder / _best(stand.best)
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(file.get_tensor(name))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise Damaged(f"{path} cannot be read ({error}): delete its folder, and the run starts anew") from error


def _best(step: int | str) -> str:
    return f"best-{step}.safetensors"


def write(path: Path, plain: dict[str, Any], weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """A file of weights, of what the optimiser keeps of each, and of `plain`, which is JSON and has `step`. Raises DoesNotFit."""
    tensors = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors |= {f"{part}.{name}": tensor for part, tensor in optimizer.state[weight].items() if part != "step"}
    _write(path, tensors, {"stand": json.dumps(plain)})


def read(
    path: Path, parse: Callable[[dict[str, Any]], S], weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> S | None:  # fmt: skip
    """Bring weights and optimiser to where they stood when the file was written; what was plain, parsed. None where there is no file.

    Raises Damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            plain = json.loads(file.metadata()["stand"])
            kept: dict[str, dict[str, Tensor]] = {}  # name of a weight -> itself and what the optimiser keeps of it
            for key in file.keys():  # noqa: SIM118  # not a dict
                part, _, name = key.partition(".")
                kept.setdefault(name, {})[part] = file.get_tensor(key)
            counted = isinstance(optimizer, torch.optim.AdamW)  # others count in whole numbers
            for name, weight in weights.items():
                weight.copy_(kept[name].pop("weight"))
                step = torch.tensor(float(plain["step"])) if counted else plain["step"]
                optimizer.state[weight] = {"step": step, **{part: tensor.to(weight.device) for part, tensor in kept[name].items()}}
            return parse(plain)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Damaged(f"{path} cannot be read ({error}): delete it, and the run starts anew") from error


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """All or nothing. Raises DoesNotFit."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    if shutil.disk_usage(path.parent).free < size + (1 << 20):
        raise DoesNotFit(
            f"{path.parent} needs {size:,} bytes for the state of the run, and the disk has less: free some, or move the store"
        )
    seen: set[int] = set()  # tables that an optimiser shares among weights; a file wants one of each
    whole = {}
    for name, tensor in tensors.items():
        whole[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    temporary = path.with_name(f"{path.name}.tmp")
    save_file(whole, temporary, metadata=facts)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
