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
AT_ONCE = 32  # adapters whose factors stand side by side


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


def top_energy(expert: Expert, seed: Seed, store: Store) -> float:
    """The largest share, over the modules of an adapter, of the squared length of its delta that one direction has: 1 is rank one."""
    tensors = seed_places(seed, store)
    one = Low(expert.digest, store.folder(expert.files), tensors, dora=expert.recipe.method == "dora")
    found = [0.0]
    for name in filter(one.has, tensors):
        b_OR, a_RI = _factors(one, name)
        left_RR, right_RR = (np.asarray(np.linalg.qr(part, "r")) for part in (b_OR, a_RI.T))
        value2_R = np.linalg.svd(left_RR @ right_RR.T, compute_uv=False) ** 2
        found.append(float(value2_R.max() / value2_R.sum()) if value2_R.any() else 0.0)
    return max(found)


def _open(expert: Expert, folder: Path, tensors: dict[str, StoredTensor]) -> Source:
    if "adapter_config.json" in expert.files:
        return Low(expert.digest, folder, tensors, dora=expert.recipe.method == "dora")
    return Whole(expert.digest, folder, tensors)


def _from_factors(name: str, sources: Sequence[Source]) -> Floats:
    """From the factors, without forming their products: <B A, B' A'> = sum of (B^T B') * (A A'^T), all experts' factors side by side."""
    factors = [_factors(one, name) for one in sources if isinstance(one, Low)]
    product_MM = np.zeros((len(factors), len(factors)))
    for first in range(0, len(factors), AT_ONCE):
        some = factors[first : first + AT_ONCE]
        b_OX, a_XI = np.concatenate([one.b_OR for one in some], 1), np.concatenate([one.a_RI for one in some])
        start_m = np.cumsum([0, *(len(one.a_RI) for one in some)])[:-1]
        for m, (b_OR, a_RI) in enumerate(factors):
            product_X = ((b_OX.T @ b_OR) * (a_XI @ a_RI.T)).sum(1)
            product_MM[first : first + AT_ONCE, m] = np.add.reduceat(product_X, start_m)
    return product_MM


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
