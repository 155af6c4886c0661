"""Weights that may differ over tensors and depth, as merge tools know them: single values, gradients over the layers, filters."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from elmwood.records import Share


def everywhere(weight: float) -> tuple[Share, ...]:
    """The same weight for all tensors."""
    return (Share(values=(weight,)),)


def layer_of(name: str) -> int | None:
    """The layer a tensor stands in: the first number in its name."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def layer_name(name: str) -> str:
    """The layer's number, or "outside": embeddings, the last norm, the head."""
    layer = layer_of(name)
    return "outside" if layer is None else str(layer)


def depth_of(names: Iterable[str]) -> int:
    """How many layers there are."""
    return 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)


def weight_of(shares: Sequence[Share], name: str, depth: int) -> float:
    """The first share whose filter and layers fit a tensor says its weight; 0 where none does.

    Several values are a gradient, interpolated over depth: embeddings are at its beginning, the final norm and the head at its end.
    """
    layer = layer_of(name)
    for share in shares:
        inside = share.layers is None or (layer is not None and share.layers[0] <= layer < share.layers[1])
        if share.tensors in name and inside:
            if len(share.values) == 1:
                return share.values[0]
            early = re.search(r"embed|wte|wpe", name) is not None
            where = layer / max(1, depth - 1) if layer is not None else 0.0 if early else 1.0
            return float(np.interp(where, np.linspace(0, 1, len(share.values)), share.values))
    return 0.0
