"""The seed of the demo, which comes with the package: the files of its checkpoint, and its record.

It is what `elmwood demo --from-scratch` trains on the training split of the bundled corpus; `python -m benches.demo seed` trains it
and writes this folder.
"""

from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from elmwood.errors import Damaged
from elmwood.records import Corpus, Seed, parse
from elmwood.store import Store

PACKAGED = resources.files(__name__)
RECORD = "seed.json"


def install_seed(corpus: Corpus, store: Store) -> Seed:
    """The packaged seed, in the store. Raises Damaged where its files are not its own, or it saw another split of the text."""
    seed = packaged_seed()
    if seed.corpus != corpus.digest:
        raise Damaged(
            f"the packaged seed was trained on corpus {(seed.corpus or '')[:8]}, and the bundled text makes {corpus.digest[:8]} here, so "
            "it may have seen held-out text: run the demo with --from-scratch"
        )
    for name, digest in seed.files.items():
        if store.put(PACKAGED.joinpath(name).read_bytes()) != digest:
            raise Damaged(f"{name} of the packaged seed is not what it was: install elmwood again, or run the demo with --from-scratch")
    store.add(seed)
    return seed


def packaged_seed() -> Seed:
    """The record of the packaged seed."""
    seed = parse(PACKAGED.joinpath(RECORD).read_bytes())
    assert isinstance(seed, Seed)
    return seed


def pack_seed(seed: Seed, store: Store, folder: Path) -> None:
    """Write the files of a seed and its record into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, digest in seed.files.items():
        (folder / name).write_bytes(store.get(digest).read_bytes())
    (folder / RECORD).write_bytes(store.get(seed.digest).read_bytes())


class Remade(NamedTuple):
    """The packaged seed, trained again."""

    same: bool  # the same bytes of weights
    difference: float  # the largest between two weights, in units of the largest weight


def compare_packaged(seed: Seed, store: Store) -> Remade | None:
    """How near a seed that was trained here is to the packaged one; None where their recipes differ."""
    packaged = packaged_seed()
    if (seed.recipe, seed.corpus) != (packaged.recipe, packaged.corpus):
        return None
    from safetensors.numpy import load, load_file

    ours = load_file(store.get(seed.files["model.safetensors"]))
    theirs = load(PACKAGED.joinpath("model.safetensors").read_bytes())
    largest = max(float(np.abs(weight).max()) for weight in theirs.values())
    difference = max(float(np.abs(ours[name] - weight).max()) for name, weight in theirs.items()) / largest
    return Remade(seed.files["model.safetensors"] == packaged.files["model.safetensors"], difference)
