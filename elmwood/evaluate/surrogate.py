"""Estimates of a merge's loss from the columns of its experts, so that merges can be ranked without running them.

The merge is seed + sum_e c_e (expert_e - seed). Its logits are close to the seed's plus the same sum of differences, so it is close to
the log-linear pool of the experts. Nothing here models trimming, sign elections or rotations; elmwood/merge/estimate.py does.

N scored tokens, E experts
"""

import numpy as np
from numpy.typing import NDArray

from elmwood.evaluate.losses import mix

Floats = NDArray[np.floating]


def pool(loglik_NE: Floats, seed_N: Floats, coefficient_E: Floats) -> Floats:
    """Log-likelihood of the log-linear pool [N], nats: use means over many tokens, not single entries.

    The normaliser needs the whole vocabulary. Its mean is estimated from the tokens, as samples from about the mixture:
    log mean_t exp(pool_t - mixture_t).
    """
    seed_N = np.asarray(seed_N, np.float64)
    raw_N = seed_N + (np.asarray(loglik_NE, np.float64) - seed_N[:, None]) @ coefficient_E
    over_N = raw_N - mixture(loglik_NE, seed_N, coefficient_E)
    peak = over_N.max()
    return raw_N - (peak + np.log(np.exp(over_N - peak).mean()))


def mixture(loglik_NE: Floats, seed_N: Floats, coefficient_E: Floats) -> Floats:
    """Log-likelihood of the probability mixture with the same coefficients [N], nats.

    The seed's weight is one minus their sum; where that is negative, the coefficients are scaled to sum to one.
    """
    weight_E = np.maximum(np.asarray(coefficient_E, np.float64), 0)
    weight_E = np.append(weight_E, max(0.0, 1 - weight_E.sum()))
    weight_E /= weight_E.sum()
    return mix(np.column_stack([loglik_NE, seed_N]), np.broadcast_to(weight_E, (len(seed_N), len(weight_E))))


def interpolation(loglik_NE: Floats, seed_N: Floats, coefficient_E: Floats) -> Floats:
    """The weighted mean of the log-likelihoods themselves [N]: the simplest estimate, for comparison."""
    seed_N = np.asarray(seed_N, np.float64)
    return seed_N + (np.asarray(loglik_NE, np.float64) - seed_N[:, None]) @ coefficient_E
