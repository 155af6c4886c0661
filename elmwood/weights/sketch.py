"""Which of many experts could an expert be a copy or a blend of? A sketch of each delta finds the few that are compared exactly.

The sketch of a low-rank delta is P^T (B A) Q for each module, with random P and Q of few columns that depend on the module's name alone:
inner products of sketches are those of the deltas, up to a random error (Johnson and Lindenstrauss 1984; the product form is that of
Kronecker projections). A copy has the sketch of its original in any basis.

E experts, S numbers of a sketch, O outputs, I inputs, C columns of a projection, R rank
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmwood.records import Expert, Seed
from elmwood.store import Store
from elmwood.weights.experts import Low, seed_places
from elmwood.weights.tensors import StoredTensor

Floats = NDArray[np.floating]

NUMBERS = 2048  # of a sketch, at least
ROUNDS, PICKED = 8, 4  # experts are picked in so many rounds, so many in each
EXPLAINED = 0.02  # of the squared length; what is left is not looked into
CHANCE = 4.5  # standard deviations of the inner product of two random sketches


def likely(expert: Expert, others: Sequence[Expert], seed: Seed, store: Store) -> list[Expert]:
    """Those of the others, at most ROUNDS * PICKED, that the expert's delta looks like a combination of. Adapters only.

    Sketches of the others are kept in the store. Raises BadInput, ForeignExpert.
    """
    tensors = seed_places(seed, store)
    own_S = sketch(Low(expert.digest, store.folder(expert.files), tensors, dora=True), tensors)
    return [others[e] for e in pick(own_S, kept_sketches(others, seed, tensors, len(own_S), store))]


def pick(own_S: Floats, sketch_ES: Floats) -> list[int]:
    """Orthogonal matching pursuit, several at a time (Tropp and Gilbert 2007): which sketches make up the expert's. Ascending."""
    length_E = np.linalg.norm(sketch_ES, axis=1)
    length_E[length_E == 0] = np.inf
    whole = float(np.linalg.norm(own_S))
    rest_S, chosen = own_S.astype(np.float32), np.zeros(0, np.int64)
    for _ in range(ROUNDS):
        left = float(np.linalg.norm(rest_S))
        if not left**2 > EXPLAINED * whole**2:
            break
        cosine_E = np.abs(sketch_ES @ rest_S) / (length_E * left)
        cosine_E[chosen] = 0
        best = np.argpartition(-cosine_E, min(PICKED, len(cosine_E) - 1))[:PICKED]
        best = best[cosine_E[best] > CHANCE / np.sqrt(len(own_S))]
        if not len(best):
            break
        chosen = np.concatenate([chosen, best])
        basis_SC = sketch_ES[chosen].T / length_E[chosen]
        rest_S = own_S - basis_SC @ np.linalg.lstsq(basis_SC, own_S, rcond=1e-5)[0]
    return sorted(set(chosen.tolist()))


def sketch(one: Low, tensors: Mapping[str, StoredTensor]) -> Floats:
    """The sketch of an adapter [S] float32, all modules of the seed that could carry one in the order of their names."""
    names = _names(tensors)
    columns = _columns(names)
    parts = np.zeros((len(names), columns, columns), np.float32)
    for n, name in enumerate(names):
        if one.has(name):
            a_RI, b_OR, scale = one.pair(name)
            left_OC, right_IC = projections(name, b_OR.shape[0], a_RI.shape[1], columns)
            parts[n] = (left_OC.T @ b_OR) @ (a_RI @ right_IC) * scale
    return parts.ravel()


def sketch_size(tensors: Mapping[str, StoredTensor]) -> int:
    """Numbers of a sketch of an adapter of this seed."""
    names = _names(tensors)
    return len(names) * _columns(names) ** 2


def _names(tensors: Mapping[str, StoredTensor]) -> list[str]:
    return sorted(name for name, place in tensors.items() if len(place.shape) == 2)


def _columns(names: Sequence[str]) -> int:
    return int(np.ceil(np.sqrt(NUMBERS / len(names))))


@lru_cache(4096)
def projections(name: str, outputs: int, inputs: int, columns: int) -> tuple[Floats, Floats]:
    """The random matrices of a module [O, C], [I, C] float64: the same on every machine."""
    chance = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")))
    left_OC, right_IC = (chance.standard_normal((size, columns)) / np.sqrt(columns) for size in (outputs, inputs))
    return left_OC, right_IC


def kept_sketches(others: Sequence[Expert], seed: Seed, tensors: Mapping[str, StoredTensor], size: int, store: Store) -> Floats:
    """Sketches of experts [E, S] float32, from a file that grows: rows of a digest and its sketch."""
    path = store.root / "sketches" / f"{seed.digest[:16]}-{size}"
    row = row_type(size)
    with store.held("sketches"):
        found = _read(path, row)
        known = {digest.tobytes() for digest in found["digest"]}
        if missing := [expert for expert in others if bytes.fromhex(expert.digest) not in known]:
            added = np.zeros(len(missing), row)
            for place, expert in enumerate(missing):
                added["digest"][place] = np.void(bytes.fromhex(expert.digest))
                added["sketch"][place] = sketch(Low(expert.digest, store.folder(expert.files), tensors, dora=True), tensors)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.truncate(found.nbytes)  # a row that a process was killed at
                file.write(added.tobytes())
            found = np.concatenate([found, added])
    place_of = {digest.tobytes(): place for place, digest in enumerate(found["digest"])}
    return found["sketch"][[place_of[bytes.fromhex(expert.digest)] for expert in others]]


def row_type(size: int) -> np.dtype:
    """A row of that file."""
    return np.dtype([("digest", "V32"), ("sketch", "<f4", (size,))])


def _read(path: Path, row: np.dtype) -> NDArray[np.void]:
    """The whole rows of the file."""
    return np.fromfile(path, row, path.stat().st_size // row.itemsize) if path.is_file() else np.zeros(0, row)
