"""What this machine has, which tiers of a run fit it, and whether somebody else is using it now."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from elmwood.engine import cores, gpus, named_device
from elmwood.errors import BadInput
from elmwood.records import Frozen
from elmwood.registry import require

CPU = "cpu"  # the tier of machines without a GPU; others are GB of memory
SPARE = 0.9  # of a card's memory: its driver and screen take the rest
BUSY_CORES, BUSY_GPU = 0.5, 20  # share of the cores, per cent of the card, that others use when a machine counts as busy


class Machine(Frozen):
    """The hardware, as far as it decides what fits. Names of cards are told to the hub, nothing else of the machine is."""

    device: str  # cpu, cuda, mps, xpu
    cores: int
    memory: int  # bytes of the machine
    card: str = ""
    card_memory: int = 0  # bytes
    torch: str = ""

    @property
    def room(self) -> int:
        """GB that training may take."""
        return int((self.card_memory or self.memory) * SPARE / 1e9 + 0.5)


def probe() -> Machine:
    """Look at the machine, and the device that the user named. Raises BadInput where a card is there that torch cannot use."""
    import torch

    from elmwood.lm.devices import best_device

    place = best_device()
    if place.type == "cpu" and not named_device() and gpus() and not torch.cuda.is_available():
        raise BadInput(
            f"there is an NVIDIA card, and torch {torch.__version__} cannot use it: install torch for its driver (see pytorch.org), "
            "or choose the CPU with --device cpu"
        )
    psutil = require("psutil", "hub")
    card, size = "", 0
    if place.type == "cuda":
        about = torch.cuda.get_device_properties(place)
        card, size = about.name, about.total_memory
    return Machine(
        device=place.type, cores=cores(), memory=psutil.virtual_memory().total, card=card, card_memory=size, torch=torch.__version__
    )


def tiers_that_fit(tiers: Iterable[str], machine: Machine) -> list[str]:
    """The tiers of a run that fit a machine, the largest first: GB of a card, or `cpu`, which fits every machine."""
    sizes = sorted((int(tier) for tier in tiers if tier != CPU), reverse=True)
    found = [str(size) for size in sizes if machine.device != "cpu" and size <= machine.room + 1]
    return found + [CPU] * (CPU in tiers)


def what_would(tiers: Iterable[str], machine: Machine) -> str:
    """For a machine on which no tier fits: the smallest that there is, in words."""
    smallest = min((int(tier) for tier in tiers if tier != CPU), default=0)
    here = f"{machine.card} with {machine.card_memory / 1e9:.0f} GB" if machine.card else f"{machine.cores} cores without a GPU"
    return f"this machine has {here}, and the smallest that fits this run is a card with {smallest} GB"


def boot_id(folder: Path) -> str:
    """What tells this machine, since it was started, from another that has a copy of the same folder."""
    path = Path("/proc/sys/kernel/random/boot_id")
    booted = path.read_text(encoding="utf-8").strip() if path.exists() else os.uname().nodename
    return hashlib.sha256(f"{booted} {folder.resolve()}".encode()).hexdigest()[:32]


# ---- while it runs --------------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """What the machine does beside us."""

    others: float  # share of the cores that other processes use
    card: int | None  # per cent of the card's time; None: unknown, or ours
    degrees: float | None  # of the hottest sensor, Celsius; None: no sensor


class Watch:
    """Looks at the load between two calls."""

    def __init__(self, device: str):
        self.psutil, self.device = require("psutil", "hub"), device
        self.own = self.psutil.Process()
        self.last = self._times()

    def _times(self) -> tuple[float, float, float]:
        """CPU seconds of the machine that were not idle, all of them, and our own."""
        every = self.psutil.cpu_times()
        idle = every.idle + getattr(every, "iowait", 0.0)
        whole = sum(every[: 8 if len(every) >= 8 else len(every)])
        own = self.own.cpu_times()
        return whole - idle, whole, own.user + own.system

    def look(self) -> Load:
        """Since the last look."""
        before, self.last = self.last, self._times()
        used, whole, own = (b - a for a, b in zip(before, self.last, strict=True))
        card, degrees = read_card() if self.device == "cuda" else (None, None)
        sensors: dict[str, Any] = getattr(self.psutil, "sensors_temperatures", dict)()
        hottest = max((one.current for group in sensors.values() for one in group if one.current), default=None)
        return Load(max(0.0, used - own) / whole if whole > 0 else 0.0, card, max(filter(None, (hottest, degrees)), default=None))


def read_card() -> tuple[int | None, float | None]:
    """Per cent of time that other processes than this one use the first card, and its temperature; None where the driver does not say."""
    if not (tool := shutil.which("nvidia-smi")):
        return None, None
    try:
        told = [
            subprocess.run([tool, f"--query-{what}", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10).stdout
            for what in ("gpu=utilization.gpu,temperature.gpu", "compute-apps=pid")
        ]
        used, degrees = (float(part) for part in told[0].splitlines()[0].split(","))
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None, None
    others = {line.strip() for line in told[1].splitlines()} - {"", str(os.getpid())}
    return (int(used) if others else 0), degrees


def why_pause(load: Load, *, when_busy: bool, most_degrees: float | None) -> str:
    """Why training should pause, in words; empty where it should not."""
    if most_degrees is not None and load.degrees is not None and load.degrees > most_degrees:
        return f"{load.degrees:.0f} °C, and --max-temp is {most_degrees:.0f}"
    if when_busy and (load.others > BUSY_CORES or (load.card or 0) > BUSY_GPU):
        return "others use this machine"
    return ""
