"""What experts changed of their seed, held against one another: inner products from the bytes of their files, tensor by tensor.

M experts, N numbers of a piece of one tensor. Adapters alone stay factors; where a full checkpoint takes part, differences are streamed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmwood.evaluate.admission import Factors, inner
from elmwood.lm.files import seed_folder
from elmwood.records import Expert, Seed
from elmwood.store import Store
from elmwood.weights.experts import Low, Source, Whole
from elmwood.weights.tensors import PIECE, SIZES, Files, Place, decode, places

Floats = NDArray[np.floating]


def finite(expert: Expert, store: Store) -> bool:
    """Whether every number of an expert's weights is one."""
    found = places(sorted(store.folder(expert.files).glob("*.safetensors")))
    with_numbers = [place for place in found.values() if place.dtype in SIZES]
    return bool(with_numbers) and all(np.isfinite(part_N).all() for place in with_numbers for part_N in pieces(place))


def pieces(place: Place) -> Iterator[Floats]:
    """A tensor's numbers, some at a time."""
    files = Files()
    for first in range(0, place.numbers, PIECE):
        last = min(first + PIECE, place.numbers)
        yield decode(files.read(place, first, last), place.dtype)
    files.close()


def products(experts: Sequence[Expert], seed: Seed, store: Store) -> Floats:
    """Inner products of what experts changed [M, M] float64. A weight-decomposed adapter counts by its factors, without its magnitudes.

    Raises ForeignExpert, BadInput.
    """
    seed_places = places(sorted(seed_folder(seed, store).glob("*.safetensors")))
    sources = [_open(expert, store.folder(expert.files), seed_places) for expert in experts]
    product_MM = np.zeros((len(experts), len(experts)))
    for name, place in seed_places.items():
        here = [m for m, one in enumerate(sources) if one.has(name)]
        if not here:
            continue
        grid = np.ix_(here, here)
        product_MM[grid] += (
            _factored(name, [sources[m] for m in here])
            if all(isinstance(sources[m], Low) for m in here)
            else _streamed(name, place, [sources[m] for m in here])
        )
    return product_MM


def _open(expert: Expert, folder: Path, seed_places: dict[str, Place]) -> Source:
    if "adapter_config.json" in expert.files:
        return Low(expert.digest, folder, seed_places, dora=expert.recipe.method == "dora")
    return Whole(expert.digest, folder, seed_places)


def _factored(name: str, sources: Sequence[Source]) -> Floats:
    """From the factors: what they multiply to is never formed."""
    deltas = [{name: _factors(one, name)} for one in sources if isinstance(one, Low)]
    return np.array([[inner(one, other) for other in deltas] for one in deltas])


def _factors(one: Low, name: str) -> Factors:
    a_RI, b_OR, scale = one.pair(name)
    return Factors(b_OR * scale, a_RI)


def _streamed(name: str, place: Place, sources: Sequence[Source]) -> Floats:
    """Piece by piece, with the seed's own numbers taken off full checkpoints."""
    product_MM = np.zeros((len(sources), len(sources)))
    whole = [pieces(one.places[name]) if isinstance(one, Whole) else None for one in sources]
    first = 0
    for seed_N in pieces(place):
        last = first + len(seed_N)
        delta_MN = np.stack([
            next(numbers).astype(np.float64) - seed_N if numbers else one.delta(name, first, last, place.shape[-1])  # type: ignore[union-attr]
            for one, numbers in zip(sources, whole, strict=True)
        ])  # fmt: skip
        product_MM += delta_MN @ delta_MN.T
        first = last
    return product_MM
