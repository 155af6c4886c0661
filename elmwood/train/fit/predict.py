"""Does a run fit in memory, what is the largest that would, and which is the cheapest change that makes it fit? From the config alone."""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from elmwood.errors import BadInput
from elmwood.lm.devices import best_device
from elmwood.lm.files import download, seed_folder
from elmwood.lm.pretrained import make_config, open_config
from elmwood.records import Frozen, Recipe, Seed
from elmwood.store import Store
from elmwood.train.fit.formulas import BESIDE, Anatomy, anatomy, components, speed, trained_parameters
from elmwood.train.fit.rehearsal import rehearse
from elmwood.train.seeds.shapes import find_shape, names_shape, read_shape

# measured / predicted speed, at its least and at its most, of the runs in docs/log/training.md
SPEEDS = (0.7, 2.2)


class Prediction(Frozen):
    """A prediction, in bytes and seconds. `components` are those at the peak, and sum to `total`."""

    device: str
    parameters: int
    trained: int
    components: dict[str, int]
    total: int
    memory: int  # of the machine, or as asked
    fits: bool
    tokens_per_second: float | None  # None if the device is not here
    largest: dict[str, int]  # batch, length or rank that would still fit, with the others as they are; 0: none
    verdict: str


def fit(
    seed: Seed | str, recipe: Recipe, store: Store | None = None, *, memory: int | None = None, device: str | None = None
) -> Prediction:
    """What training this seed by this recipe takes on this machine, or on one with `memory` bytes.

    `seed` is a record (then `store` has it), a folder with a config.json, or a model hub's id; `device` is cpu or cuda. Raises BadSeed,
    BadInput.
    """
    place, config = find_machine(device, memory), load_config(seed, store)
    body = anatomy(config)
    parts = components(body, recipe, place.device)
    if place.device != "cpu":
        formulas, parts = sum(parts.values()), rehearsed(config, recipe) or parts
        place = place._replace(share=sum(parts.values()) / formulas)
    total = sum(parts.values())
    settings = ("batch", "length") if recipe.method == "full" else ("batch", "length", "rank")
    limits = {what: largest(body, recipe, place, what) for what in settings}
    return Prediction(
        device=place.device, parameters=body.parameters, trained=trained_parameters(body, recipe), components=parts, total=total,
        memory=place.memory, fits=total <= place.memory and recipe.length <= body.context,
        tokens_per_second=speed(body, recipe, place.device) if place.here else None, largest=limits,
        verdict=verdict(body, recipe, place, total, limits),
    )  # fmt: skip


def rehearsed(config: Any, recipe: Recipe) -> dict[str, int] | None:
    """The parts of a GPU's memory; None for several experts at once, and where the model cannot be run without values."""
    return rehearse((config, recipe))[0] if recipe.together == 1 else None


class Machine(NamedTuple):
    """The device that a run must fit."""

    device: str  # cpu or cuda
    memory: int  # bytes
    here: bool  # so that its speed can be measured
    share: float = 1.0  # of what the formulas say, by a rehearsal


def find_machine(device: str | None, memory: int | None) -> Machine:
    """The device and memory in question, by default this machine's. Raises BadInput."""
    here = best_device().type
    device = device or here
    if device not in BESIDE:
        raise BadInput(f"--device {device}: predictions are for {' and '.join(BESIDE)}; choose one")
    if memory is None and device not in (here, "cpu"):
        raise BadInput(f"there is no {device} here: say how much memory the card has, as --memory 12GB")
    return Machine(device, machine_memory(device) if memory is None else memory, device in (here, "cpu"))


def load_config(seed: Seed | str, store: Store | None = None) -> Any:
    """The config of a seed, of a folder or file, of a published shape, or of a hub's `id` or `id@revision`. Raises BadSeed."""
    if isinstance(seed, Seed):
        return open_config(seed_folder(seed, store or Store(Path(".elmwood"))))
    if names_shape(seed):
        return make_config(find_shape(seed) if not seed.endswith(".json") else read_shape(seed), seed)
    if (place := Path(seed).expanduser()).exists():
        return open_config(place)
    identifier, _, revision = seed.partition("@")
    return open_config(download(identifier, revision, files=("config.json",)))


def machine_memory(device: str) -> int:
    """Bytes of memory of the device; on a CPU those of the machine, or of the container if it has fewer."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    limit, whole = Path("/sys/fs/cgroup/memory.max"), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(whole, int(text)) if text.isdigit() else whole


# ---- what would fit ---------------------------------------------------------------------------------------------


def largest(body: Anatomy, recipe: Recipe, place: Machine, what: str) -> int:
    """The largest value of one setting that fits; 0 if even the smallest does not."""
    most = {"batch": 1 << 16, "length": body.context, "rank": body.width}[what]
    smallest = 2 if what == "length" else 1
    return largest_number(lambda value: has_room(body, recipe.model_copy(update={what: max(value, smallest)}), place), most)


def has_room(body: Anatomy, recipe: Recipe, place: Machine) -> bool:
    """Whether the machine has enough memory."""
    return place.share * sum(components(body, recipe, place.device).values()) <= place.memory


def largest_number(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, if all smaller ones do; 0: none."""
    return bisect_left(range(1, most + 1), True, key=lambda number: not fits(number))


def verdict(body: Anatomy, recipe: Recipe, place: Machine, total: int, limits: dict[str, int]) -> str:
    """One sentence: it fits and what the largest would be, or the cheapest change that makes it fit."""
    have = f"{total / 1e9:.2f} GB of {place.memory / 1e9:.2f} GB"
    if recipe.length > body.context:
        return f"--length {recipe.length}: the model has {body.context} positions; choose --length {body.context}"
    if total <= place.memory:
        room = ", ".join(f"{what} {most}" for what, most in limits.items())
        return f"fits: {have}; so would {room}, one at a time"
    for changed in cheaper(recipe):
        tried = in_passes(recipe.model_copy(update=changed), lambda recipe: has_room(body, recipe, place))
        if tried is not None:
            return f"does not fit: {have}; {spell_changes(recipe, tried)} would"
    return f"does not fit: {have}; choose a smaller seed, or a machine with more memory"


METHODS = ("full", "dora", "lora", "qlora")  # from the most memory to the least


def cheaper(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Changes in order of their price: rounding, time, context, then what is trained and on what base."""
    small = {} if recipe.together > 1 else {"optimiser": "adamw8bit"}
    for method in METHODS[METHODS.index(recipe.method) :]:
        for length in (recipe.length, *(half for half in (recipe.length // 2, recipe.length // 4) if half >= 128)):
            for more in ({}, small, {"checkpointing": True}, {"checkpointing": True, **small}):
                yield {"method": method, "length": length, **more}


def in_passes(recipe: Recipe, fits: Callable[[Recipe], bool]) -> Recipe | None:
    """The recipe with the fewest passes per step that fits, if any does."""
    counts = range(recipe.accumulate, max(recipe.accumulate, recipe.batch) + 1)

    def spread(count: int) -> Recipe:
        return recipe.model_copy(update={"accumulate": count})

    place = bisect_left(counts, True, key=lambda count: fits(spread(count)))
    return spread(counts[place]) if place < len(counts) else None


def spell_changes(before: Recipe, after: Recipe) -> str:
    """The differences, as options of the command line."""
    words = []
    for what in ("method", "length", "optimiser", "checkpointing", "accumulate"):
        if (value := getattr(after, what)) != getattr(before, what):
            words.append(f"--{what}" + ("" if value is True else f" {value}"))
    return " ".join(words)
