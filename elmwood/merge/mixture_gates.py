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


def hidden_rows(
    mean_DH: Floats, within_HH: Floats, domain_E: Sequence[int | None], scale: float, seed_bias: float, shrink: float = 0.1
) -> Floats:
    """Fisher's discriminant of the domains, as rows [E, H] of one layer: what a token of a domain looks like to the seed.

    A linear gate has no bias. Hidden states have a common direction v with v.x near 1, and biases stand along it; so does that of
    the seed's own expert (None), whose row is nothing else. `shrink`: the share of a diagonal in the covariance.
    """
    overall_H = mean_DH.mean(0)
    width = len(overall_H)
    cov_HH = (1 - shrink) * within_HH + shrink * np.trace(within_HH) / width * np.eye(width)
    solved_DH = np.linalg.solve(cov_HH, (mean_DH - overall_H).T).T
    bias_D = -0.5 * ((mean_DH + overall_H) * solved_DH).sum(1)
    common_H = np.linalg.solve(cov_HH + np.outer(overall_H, overall_H), overall_H)
    common_H /= common_H @ overall_H
    rows = [seed_bias * common_H if k is None else scale * (solved_DH[k] + bias_D[k] * common_H) for k in domain_E]
    return np.stack(rows)
