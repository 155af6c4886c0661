"""Statistics that experts left beside their weights, found and opened.

I inputs of a linear layer
"""

import json

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput
from elmwood.records import Statistics
from elmwood.store import Store
from elmwood.store.headers import read_header
from elmwood.weights.tensors import Files, StoredTensor, decode, places

Doubles = NDArray[np.float64]


def find_statistics(expert: str, store: Store) -> Statistics:
    """The statistics of an expert that are over the most tokens. Raises BadInput where there are none."""
    have = [one for one in map(store.load, _named(expert, store)) if isinstance(one, Statistics) and one.expert == expert]
    if not have:
        raise BadInput(
            f"expert {expert[:8]} left no statistics: make them where its text is, `elmwood statistics {expert[:8]}`, or at training "
            "with --statistics"
        )
    return max(have, key=lambda one: (one.tokens, one.digest))


def _named(expert: str, store: Store) -> list[str]:
    """Records of statistics that name an expert. Read as text: a store may hold thousands, and few are these."""
    text = f'"{expert}"'.encode()
    raw = ((digest, store.path(digest).read_bytes()) for digest in store.records())
    return [digest for digest, data in raw if b'"kind":"statistics"' in data and text in data]


class ExpertStatistics:
    """The values of one expert's statistics, by tensor."""

    def __init__(self, record: Statistics, store: Store):
        self.record, self.files = record, Files(most=2)
        path = store.folder(record.files) / "statistics.safetensors"
        self.places: dict[str, StoredTensor] = places([path])
        self.same: dict[str, str] = json.loads(read_header(path).metadata.get("same", "{}"))

    def _read(self, key: str) -> Doubles | None:
        place = self.places.get(key)
        if place is None:
            return None
        return decode(self.files.read(place, 0, place.numbers), place.dtype).astype(np.float64).reshape(place.shape)

    def gram(self, name: str) -> Doubles | None:
        """Mean xᵀx [I, I] of what the linear layer with this weight reads; None where it is no linear layer."""
        name = self.same.get(name, name)
        if (gram_II := self._read(f"gram|{name}")) is not None:
            return gram_II
        factor_RI, rest_I = self._read(f"factor|{name}"), self._read(f"rest|{name}")
        return None if factor_RI is None or rest_I is None else factor_RI.T @ factor_RI + np.diag(rest_I)

    def fisher(self, name: str) -> Doubles | None:
        """Squared gradients in the tensor's shape, 1 on average over the whole model; None where there are none."""
        value = self._read(f"fisher|{name}")
        return None if value is None else value / (self.record.fisher or 1.0)


def open_statistics(expert: str, store: Store) -> ExpertStatistics:
    """Raises BadInput, Damaged."""
    return ExpertStatistics(find_statistics(expert, store), store)
