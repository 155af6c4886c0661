"""Where a run stands, in one file: trained weights, the optimiser's moments, step, curve, seconds. Written atomically, never half."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elmwood.errors import Damaged, DoesNotFit
from elmwood.records import Point
from elmwood.store import sync_folder

FILE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Stand(NamedTuple):
    """Everything beside tensors that the next step depends on, and the clock."""

    step: int = 0  # steps done
    loss: float = 0.0  # sum since the last point of the curve, nats per token
    curve: tuple[Point, ...] = ()
    seconds: float = 0.0  # spent in all runs, those cut short included as far as they were kept


def save(folder: Path, stand: Stand, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Replace the state in `folder`. Raises DoesNotFit."""
    tensors = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors |= {f"{moment}.{name}": optimizer.state[weight][moment] for moment in MOMENTS}
    size = sum(tensor.nbytes for tensor in tensors.values())
    if shutil.disk_usage(folder).free < size + (1 << 20):
        raise DoesNotFit(f"{folder} needs {size:,} bytes for the state of the run, and the disk has less: free some, or move the store")
    plain = stand._asdict() | {"curve": [point.model_dump() for point in stand.curve]}
    temporary = folder / f"{FILE}.tmp"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"stand": json.dumps(plain)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(folder / FILE)
    sync_folder(folder)


def load(folder: Path, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Stand:
    """Bring weights and optimiser to where the last run stood; the beginning where there was none. Raises Damaged."""
    path = folder / FILE
    if not path.exists():
        return Stand()
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            plain = json.loads(file.metadata()["stand"])
            stand = Stand(**plain | {"curve": tuple(Point(**point) for point in plain["curve"])})
            for name, weight in weights.items():
                weight.copy_(file.get_tensor(f"weight.{name}"))
                moments = {moment: file.get_tensor(f"{moment}.{name}").to(weight.device) for moment in MOMENTS}
                optimizer.state[weight] = {"step": torch.tensor(float(stand.step)), **moments}
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Damaged(f"{path} cannot be read ({error}): delete it, and the run starts anew") from error
    return stand
