"""Will tuning a mixture fit? As `fit`, from its files' headers and its seed's config: no weights are read.

N numbers, K experts that a token goes through, D width, F width of a feed-forward layer
"""

import json
import math
from typing import Any

from elmwood.errors import BadInput
from elmwood.lm.lowrank import FILE
from elmwood.records import Frozen, Mixture, Recipe, Seed
from elmwood.store import Store
from elmwood.train.fit import BESIDE, FLOAT, KEPT, activations, anatomy, best_device, config_of, machine_memory, resident, speed
from elmwood.train.loss import CHUNK, ROWS
from elmwood.train.router import ORDER, kind_of


class Tuning(Frozen):
    """A prediction, in bytes and tokens per second. `components` stand at the peak and sum to `total`."""

    device: str
    parameters: int
    trained: int
    components: dict[str, int]
    total: int
    memory: int
    fits: bool
    tokens_per_second: float | None
    batch: int  # the largest that would fit in one pass; 0: none
    verdict: str


def fit_mixture(mixture: Mixture, recipe: Recipe, store: Store, *, memory: int | None = None, device: str | None = None) -> Tuning:
    """What tuning a mixture by this recipe takes. Raises BadInput."""
    if recipe.method != "router":
        raise BadInput(f"a mixture is tuned, not trained with method {recipe.method!r}: ask with --method router")
    here = best_device().type
    device = device or here
    there = machine_memory(here) if memory is None else memory
    parts = components(mixture, recipe, store, device)
    total = sum(parts.values())
    low, high = 0, 1 << 16
    while low < high:
        middle = (low + high + 1) // 2
        tried = recipe.model_copy(update={"batch": middle, "accumulate": 1})
        low, high = (middle, high) if sum(components(mixture, tried, store, device).values()) <= there else (low, middle - 1)
    count = counted(mixture, store)
    have = f"{total / 1e9:.2f} GB of {there / 1e9:.2f} GB"
    if total <= there:
        verdict = f"fits: {have}; it would with batch {low}"
    elif low:
        verdict = f"does not fit: {have}; --accumulate {math.ceil(recipe.batch / low)} would"
    else:
        verdict = f"does not fit: {have}; tune less (--tuned routers), shorter rows, or mix --low-rank"
    return Tuning(
        device=device, parameters=sum(count.values()), trained=_trained(count, recipe), components=parts, total=total, memory=there,
        fits=total <= there, tokens_per_second=_speed(mixture, recipe, store, device) if device in (here, "cpu") else None, batch=low,
        verdict=verdict,
    )  # fmt: skip


def counted(mixture: Mixture, store: Store) -> dict[str, int]:
    """Numbers of each kind: routers, norms, shared, everything (the experts' own)."""
    found = dict.fromkeys(ORDER, 0)
    low = mixture.layout == "low-rank"
    files = [mixture.files] + ([store.load(mixture.seed, Seed).files] if low else [])
    names: dict[str, int] = {}
    for one in reversed(files):
        for path in sorted(store.folder(one).glob("*.safetensors")):
            with path.open("rb") as file:
                said = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            names |= {name: math.prod(entry["shape"]) for name, entry in said.items() if name != "__metadata__"}
    for name, numbers in names.items():
        found["everything" if low and ".mlp." in name and "gate.weight" not in name else kind_of(name)] += numbers
    return found


def components(mixture: Mixture, recipe: Recipe, store: Store, device: str) -> dict[str, int]:
    """Bytes at the peak of a pass; constants of the allocator and the libraries are those of `fit`."""
    count, body = counted(mixture, store), _body(mixture, store)
    own, low, rows = _trained(count, recipe), FLOAT if device == "cpu" else 2, math.ceil(recipe.batch / recipe.accumulate)
    sent = 3 * mixture.gates.top_k * body.width + 3 * len(mixture.experts)  # of a token and layer: to its experts, and back; logits
    kept = (activations(body, recipe.model_copy(update={"method": "full"})) + rows * recipe.length * body.layers * sent) * low
    kept += rows * recipe.length**2 * low
    head = body.vocabulary * body.width * FLOAT if recipe.tuned in ("shared", "everything") else 0
    gradients, again, more = own * FLOAT, *KEPT[device]
    first, second = kept + max(head, gradients if recipe.accumulate > 1 else 0), gradients
    peak = max(first + again * first + more * (gradients if recipe.accumulate == 1 else 0), second + again * first)
    chunk = min(rows * recipe.length, max(ROWS, CHUNK[device] // body.vocabulary))
    return {
        "process": resident() if device == "cpu" else 0,
        "libraries": BESIDE[device],
        "weights": sum(count.values()) * FLOAT,
        "optimiser": 2 * own * FLOAT,
        "activations": kept if first >= second else 0,
        "gradients": first - kept if first >= second else gradients,
        "logits": 3 * chunk * body.vocabulary * FLOAT,
        "allocator": round(peak) - max(first, second),
    }


def _body(mixture: Mixture, store: Store) -> Any:
    """The seed, with as many feed-forward layers side by side as a token goes through (all of a low-rank one share one)."""
    body = anatomy(config_of(store.load(mixture.seed, Seed), store))
    more = mixture.gates.top_k - 1
    wide = tuple(shape for shape in body.shapes if body.feed_forward in shape)
    shapes = body.shapes if FILE in mixture.files else (*body.shapes, *wide * more)
    return body._replace(feed_forward=body.feed_forward * (1 + more), shapes=shapes)


def _trained(count: dict[str, int], recipe: Recipe) -> int:
    return sum(count[kind] for kind in ORDER[: ORDER.index(recipe.tuned) + 1])


def _speed(mixture: Mixture, recipe: Recipe, store: Store, device: str) -> float:
    return speed(_body(mixture, store), recipe.model_copy(update={"method": "full"}), device)
