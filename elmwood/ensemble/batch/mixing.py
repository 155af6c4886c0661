"""One distribution of those of a token's candidates.

A active candidates, V vocabulary
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from elmwood.ensemble.batch.candidates import Candidates
from elmwood.ensemble.bounded import AGGREGATIONS, bound


class Mixing(NamedTuple):
    """How several distributions become one: the fields of an ensemble's record."""

    aggregation: str = "arithmetic"
    nats: float = 2.0


SUM = Mixing()


def mix(weight: Mapping[int, float], said: Mapping[int, Tensor], candidates: Candidates, mixing: Mixing) -> Tensor:
    """Log-probabilities [V], float32, by the weights of the active candidates. `said`: theirs, and the seed's where bounds refer to it."""
    if len(weight) == 1 and not candidates.bounded:
        return said[next(iter(weight))]
    bounded = candidates.bounded.intersection(weight)
    logp_AV = torch.stack([bound(said[c], said[candidates.seed], mixing.nats) if c in bounded else said[c] for c in weight])
    weight_A = torch.tensor(list(weight.values()), dtype=logp_AV.dtype, device=logp_AV.device)
    return AGGREGATIONS[mixing.aggregation](logp_AV, weight_A)
