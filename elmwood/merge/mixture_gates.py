"""The gates of a mixture before any tuning: rows of a linear map from what enters a layer's feed-forward to a logit for each expert.

E experts, H width, D domains, R rank
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from elmwood.merge.mixture_layout import FEED_FORWARD
from elmwood.merge.tensors import Place

Floats = NDArray[np.floating]


def layers_of(tensors: Mapping[str, Place]) -> dict[str, int]:
    """The seed's layers with a feed-forward, and the width of what enters it."""
    found = ((FEED_FORWARD.fullmatch(name), place) for name, place in tensors.items())
    return {match["layer"]: place.shape[1] for match, place in found if match and match["part"] == "gate_proj"}


def random_rows(tensors: Mapping[str, Place], experts: Sequence[str], rng_seed: int, scale: float) -> dict[str, Floats]:
    """Normal numbers, 0.02 wide at scale 1, by layer and the expert's digest: so another expert changes no row but its own."""
    return {
        layer: scale * 0.02 * np.stack([_chance(f"{rng_seed} {layer} {digest}", width) for digest in experts])
        for layer, width in layers_of(tensors).items()
    }  # fmt: skip


def _chance(name: str, count: int) -> Floats:
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(count)
