"""Inner products of experts' deltas, from the bytes of their files, tensor by tensor.

M experts, N values of a piece of one tensor, O outputs, I inputs, R rank. Between adapters the factors suffice; where a full checkpoint
takes part, the differences are streamed.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.records import Expert, Seed
from elmwood.store import Store
from elmwood.weights.experts import Low, Source, Whole, read_delta, seed_places
from elmwood.weights.tensors import PIECE, SIZES, Files, StoredTensor, decode, places

Floats = NDArray[np.floating]


class Factors(NamedTuple):
    """A low-rank delta of one module."""

    b_OR: Floats
    a_RI: Floats


Delta = Mapping[str, Factors]  # by module


def is_finite(expert: Expert, store: Store) -> bool:
    """Whether an expert has weights, and none of them is NaN or Inf."""
    found = places(sorted(store.folder(expert.files).glob("*.safetensors")))
    numeric = [place for place in found.values() if place.dtype in SIZES]
    return bool(numeric) and all(np.isfinite(part_N).all() for place in numeric for part_N in pieces(place))


def pieces(place: StoredTensor) -> Iterator[Floats]:
    """The values of a tensor, piece by piece."""
    files = Files()
    for first in range(0, place.numbers, PIECE):
        last = min(first + PIECE, place.numbers)
        yield decode(files.read(place, first, last), place.dtype)
    files.close()


def products(experts: Sequence[Expert], seed: Seed, store: Store) -> Floats:
    """Inner products of deltas [M, M] float64. A weight-decomposed adapter counts by its factors, without its magnitudes.

    Raises ForeignExpert, BadInput.
    """
    tensors = seed_places(seed, store)
    sources = [_open(expert, store.folder(expert.files), tensors) for expert in experts]
    product_MM = np.zeros((len(experts), len(experts)))
    for name, place in tensors.items():
        here = [m for m, one in enumerate(sources) if one.has(name)]
        if not here:
            continue
        grid = np.ix_(here, here)
        product_MM[grid] += (
            _from_factors(name, [sources[m] for m in here])
            if all(isinstance(sources[m], Low) for m in here)
            else _from_pieces(name, place, [sources[m] for m in here])
        )
    return product_MM


def _open(expert: Expert, folder: Path, tensors: dict[str, StoredTensor]) -> Source:
    if "adapter_config.json" in expert.files:
        return Low(expert.digest, folder, tensors, dora=expert.recipe.method == "dora")
    return Whole(expert.digest, folder, tensors)


def _from_factors(name: str, sources: Sequence[Source]) -> Floats:
    """From the factors, without forming their products."""
    deltas = [{name: _factors(one, name)} for one in sources if isinstance(one, Low)]
    return np.array([[inner(one, other) for other in deltas] for one in deltas])


def _factors(one: Low, name: str) -> Factors:
    a_RI, b_OR, scale = one.pair(name)
    return Factors(b_OR * scale, a_RI)


def _from_pieces(name: str, place: StoredTensor, sources: Sequence[Source]) -> Floats:
    """Piece by piece; the seed is subtracted from full checkpoints."""
    product_MM, files = np.zeros((len(sources), len(sources))), Files()
    for first in range(0, place.numbers, PIECE):
        last = min(first + PIECE, place.numbers)
        seed_N = decode(files.read(place, first, last), place.dtype)
        delta_MN = np.stack([read_delta(one, name, place, first, last, seed_N, files) for one in sources])
        product_MM += delta_MN @ delta_MN.T
    files.close()
    return product_MM


# ---- adapters -------------------------------------------------------------------------------------------------------


def inner(one: Delta, other: Delta) -> float:
    """Sum over shared modules of <B A, B' A'> = sum of (B^T B') * (A A'^T): from the factors, without forming the products."""
    total = 0.0
    for name in one.keys() & other.keys():
        (b_OR, a_RI), (other_OS, other_SI) = one[name], other[name]
        outward_RS = np.asarray(b_OR, np.float64).T @ np.asarray(other_OS, np.float64)
        inward_RS = np.asarray(a_RI, np.float64) @ np.asarray(other_SI, np.float64).T
        total += float((outward_RS * inward_RS).sum())
    return total


def gram(deltas: Sequence[Delta]) -> Floats:
    """Inner products of deltas [E, E] float64."""
    gram_EE = np.zeros((len(deltas), len(deltas)))
    for i, one in enumerate(deltas):
        for j in range(i + 1):
            gram_EE[i, j] = gram_EE[j, i] = inner(one, deltas[j])
    return gram_EE
