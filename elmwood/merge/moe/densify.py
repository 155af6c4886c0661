"""A low-rank mixture as the checkpoint of a standard architecture: every expert gets a feed-forward of its own.

N values of a piece of one tensor; O, I: what a linear layer gives out and takes in; R rank
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.lm.files import seed_folder
from elmwood.merge.moe.layout import FEED_FORWARD, Cell, cells, family_of, mixed_config
from elmwood.merge.moe.shards import Shards
from elmwood.records import Mixture, Seed
from elmwood.store import Store
from elmwood.weights.experts import exact_product, seed_places, slices
from elmwood.weights.tensors import PIECE, Files, StoredTensor, decode, places


def densify(made: Mixture, store: Store, folder: Path, progress: Progress = silent) -> None:
    """Config and shards; gates, and what all share, are the mixture's own where it has them. Raises BadSeed."""
    seed = store.load(made.seed, Seed)
    tensors, files = seed_places(seed, store), Files()
    low = places(sorted(store.folder(made.files).glob("*.safetensors")))
    config = json.loads((seed_folder(seed, store) / "config.json").read_bytes())
    plan = cells(family_of(config), tensors, len(made.experts))
    shards = Shards([(cell.name, cell.dtype, cell.shape) for cell in plan], folder, alone=sum(cell.gate for cell in plan))
    for done, cell in enumerate(plan, 1):
        if cell.gate:
            shards.copy(cell.name, low[f"{cell.source}.mlp.gate.weight"], files)
        elif cell.expert is None or not (pair := _factors(cell, low, files)):
            shards.copy(cell.name, low.get(cell.source, tensors[cell.source]), files)
        else:
            _expert(cell, tensors[cell.source], *pair, shards, files)
        progress("experts", done, len(plan), "tensors")
    files.close()
    shards.close()
    said = mixed_config(config, len(made.experts), made.gates.top_k)
    (folder / "config.json").write_text(json.dumps(said, indent=1, sort_keys=True), encoding="utf-8")


def _factors(cell: Cell, low: Mapping[str, StoredTensor], files: Files) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """A [R, I] and B [O, R], its scale in B, of an expert's tensor; none where the expert leaves it to the seed."""
    match = FEED_FORWARD.fullmatch(cell.source)
    assert match is not None
    top = f"{match['layer']}.mlp.experts.{cell.expert}.{match['part']}"
    if f"{top}.lora_A" not in low:
        return None
    a, b = low[f"{top}.lora_A"], low[f"{top}.lora_B"]
    a_RI, b_OR = (decode(files.read(one, 0, one.numbers), one.dtype).astype(np.float64).reshape(one.shape) for one in (a, b))
    return a_RI, b_OR


def _expert(
    cell: Cell, place: StoredTensor, a_RI: NDArray[np.float64], b_OR: NDArray[np.float64], shards: Shards, files: Files
) -> None:  # fmt: skip
    left, right, width = slices(b_OR), slices(a_RI), place.shape[1]
    step = max(1, PIECE // width)
    for top in range(0, place.shape[0], step):
        bottom = min(top + step, place.shape[0])
        theta_N = decode(files.read(place, top * width, bottom * width), place.dtype).astype(np.float64)
        theta_N += exact_product([part[top:bottom] for part in left], right).reshape(-1)
        shards.put_numbers(cell.name, theta_N, top * width)
