"""Where to compute: the device that the user named, or the best one there is."""

import torch

from elmwood.engine import named_device
from elmwood.errors import BadInput

KINDS = ("cuda", "xpu", "mps")  # in this order; ROCm calls itself cuda


def best_device() -> torch.device:
    """What `device` of a verb, --device or ELMWOOD_DEVICE names, else a GPU, else the CPU. Raises BadInput if it is not here."""
    here = [kind for kind in KINDS if getattr(torch, kind).is_available()]
    named = named_device()
    if not named:
        return torch.device(here[0] if here else "cpu")
    try:
        device = torch.device(named)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", *here) or (device.index or 0) >= count(device.type):
        raise BadInput(f"--device {named}: there is no such device here; choose among {', '.join([*here, 'cpu'])}")
    return device


def choose_device(asked: torch.device | str | None) -> torch.device:
    """The device that a caller asks for, or the best one."""
    return best_device() if asked is None else torch.device(asked)


def count(kind: str) -> int:
    """Devices of a kind."""
    return 1 if kind == "cpu" else int(getattr(torch, kind).device_count())


def kind_of(device: torch.device) -> str:
    """cpu or gpu: what sizes of batches depend on."""
    return "cpu" if device.type == "cpu" else "gpu"


def ran_out(error: Exception) -> bool:
    """Whether memory ran out. torch's CPU allocator says so by a plain RuntimeError."""
    plain = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return plain or isinstance(error, MemoryError | torch.OutOfMemoryError)
