"""Rules that see experts as points of a sphere. All they need of them is their inner products: what comes out is a weighted sum.

E experts
"""

import math

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput
from elmwood.merge.rules.base import Floats, Settings

Doubles = NDArray[np.float64]


def follow_arc(inner_EE: Floats, weight_E: Floats, settings: Settings) -> Floats:
    """Along the great circle from the first expert to the second, by the second's share of the weights (slerp, Shoemake 1985).

    Straight where the cosine is above `straight` in magnitude. Lengths are mixed along with directions. A vector without length, as of an
    expert that leaves a tensor alone, is at a right angle to all, as in mergekit. Raises BadInput."""
    if len(weight_E) != 2:
        raise BadInput(f"slerp goes between two experts, these are {len(weight_E)}: multislerp and karcher take any number")
    share = weight_E[1] / weight_E.sum()
    length = math.sqrt(inner_EE[0, 0] * inner_EE[1, 1])
    cosine = min(1.0, max(-1.0, inner_EE[0, 1] / length)) if length else 0.0
    angle = math.acos(cosine)
    if abs(cosine) > settings["straight"] or not math.sin(angle):
        return np.array([1 - share, share])
    return np.array([math.sin((1 - share) * angle), math.sin(share * angle)]) / math.sin(angle)


def average_directions(inner_EE: Floats, weight_E: Floats, settings: Settings) -> Floats:
    """The weighted mean of the directions, with the weighted mean of the lengths (what mergekit's multislerp comes to: its step in the
    tangent space at that mean is zero)."""
    share_E, length_E, unit_EE = _units(inner_EE, weight_E)
    return _along(share_E, weight_E, length_E, unit_EE)


def find_karcher_mean(inner_EE: Floats, weight_E: Floats, settings: Settings) -> Floats:
    """The point of the sphere with the least squared distances to all, by gradient descent (Karcher 1977), with the mean of the lengths."""
    share_E, length_E, unit_EE = _units(inner_EE, weight_E)
    mean_E = _normal(share_E.copy(), unit_EE)
    for _ in range(int(settings["iterations"])):
        cosine_E = np.clip(unit_EE @ mean_E, -1.0, 1.0)
        angle_E = np.arccos(cosine_E)
        sine_E = np.sin(angle_E)
        pull_E = np.where(sine_E > 1e-12, share_E * angle_E / np.where(sine_E > 1e-12, sine_E, 1.0), 0.0)
        step_E = pull_E - math.fsum(pull_E * cosine_E) * mean_E
        size = math.sqrt(max(0.0, float(step_E @ unit_EE @ step_E)))
        if size < settings["tolerance"]:
            break
        mean_E = _normal(mean_E * math.cos(size) + step_E * (math.sin(size) / size), unit_EE)
    return _along(mean_E, weight_E, length_E, unit_EE)


def _units(inner_EE: Floats, weight_E: Floats) -> tuple[Doubles, Doubles, Doubles]:
    """Shares of the weights, lengths, and inner products of the directions. One without length has no direction, and no share."""
    length_E = np.sqrt(np.diag(inner_EE))
    weight_E = np.where(length_E > 0, weight_E, 0.0)
    safe_E = np.where(length_E > 0, length_E, 1.0)
    total = weight_E.sum()
    share_E = np.asarray(weight_E / total if total else weight_E, np.float64)
    return share_E, length_E.astype(np.float64), np.asarray(inner_EE / np.outer(safe_E, safe_E), np.float64)


def _normal(point_E: Doubles, unit_EE: Doubles) -> Doubles:
    length = math.sqrt(max(0.0, float(point_E @ unit_EE @ point_E)))
    return point_E / length if length > 1e-12 else point_E


def _along(point_E: Doubles, weight_E: Floats, length_E: Doubles, unit_EE: Doubles) -> Doubles:
    """Weights of the experts for the direction of a combination of unit vectors, with the mean length, those without length included."""
    total = weight_E.sum()
    return _normal(point_E, unit_EE) * float(weight_E @ length_E / total if total else 0.0) / np.where(length_E > 0, length_E, 1.0)
