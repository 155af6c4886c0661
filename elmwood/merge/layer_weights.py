"""Weights that may differ over tensors and depth, as merge tools know them: single values, gradients over the layers, filters."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from elmwood.errors import BadInput
from elmwood.merge.rules.base import Rule, Settings
from elmwood.records import Share

NOTHING = 1e-9  # of the weights' magnitudes together: a sum below it is 0


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


# ---- weights that make sense ------------------------------------------------------------------------------------


def plain_weights(members: Mapping[str, Sequence[Share]]) -> dict[str, list[object]]:
    """Expert -> its weights, as JSON values. Raises BadInput where one is not finite, or all are 0."""
    for digest, shares in members.items():
        if not all(math.isfinite(value) for share in shares for value in share.values):
            raise BadInput(f"expert {digest[:8]} has the weight {', '.join(f'{value:g}' for share in shares for value in share.values)}: "
                           "weights are finite numbers")  # fmt: skip
    if not any(value for shares in members.values() for share in shares for value in share.values):
        raise BadInput("all weights are 0, and the seed alone would be left: give an expert another weight")
    return {digest: [share.model_dump(mode="json") for share in shares] for digest, shares in members.items()}


def check_weights(
    rule: Rule, method: str, settings: Settings, weights: Sequence[Sequence[Share]], names: Iterable[str], depth: int
) -> None:  # fmt: skip
    """Raises BadInput where a rule makes no sense of the experts' weights of a tensor: a mean over weights of both signs goes towards the
    expert that was to be subtracted, and a mean over weights that add up to 0 goes anywhere."""
    subtracts = rule.signed or (rule.together is None and settings.get("normalise") == 0)
    for name in names:
        weight_E = [weight_of(shares, name, depth) for shares in weights]
        if not subtracts and min(weight_E, default=0.0) < 0:
            cure = "set normalise=0, or take" if "normalise" in settings else "take"
            raise BadInput(f"weight {min(weight_E):g} for {name}: {method} divides by the weights, and a negative one would not subtract: "
                           f"{cure} task_arithmetic, which adds and subtracts")  # fmt: skip
        if settings.get("normalise"):
            check_total(weight_E, name)


def check_total(weight_E: Sequence[float], name: str) -> None:
    """Raises BadInput where a mean is over weights that add up to 0 though they are not."""
    size = sum(map(abs, weight_E))
    if size and abs(sum(weight_E)) <= NOTHING * size:
        raise BadInput(f"the weights for {name} add up to 0, and a mean divides by their sum: set normalise=0, or choose other weights")
