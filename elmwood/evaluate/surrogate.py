"""Merges ranked without running them: what the columns of the experts say of the model whose weights are their weighted sum.

The merge is seed + sum_e c_e (expert_e - seed); its logits are near the seed's plus the same sum of differences, so it is near the
log-linear pool of the experts. No surrogate here knows trimming, votes or rotations: elmwood/merge/estimate.py does.

N scored tokens, E experts
"""

import numpy as np
from numpy.typing import NDArray

from elmwood.evaluate.losses import mix

Floats = NDArray[np.floating]


def pool(loglik_NE: Floats, seed_N: Floats, coefficient_E: Floats) -> Floats:
    """Log-likelihood of the log-linear pool [N], nats. Its normaliser needs the whole vocabulary; the mean of it is estimated from the
    tokens themselves, which are draws from nearly the mixture: log mean_t exp(pool_t - mixture_t). So means over many tokens count, not
    single entries."""
    seed_N = np.asarray(seed_N, np.float64)
    raw_N = seed_N + (np.asarray(loglik_NE, np.float64) - seed_N[:, None]) @ coefficient_E
    over_N = raw_N - mixture(loglik_NE, seed_N, coefficient_E)
    peak = over_N.max()
    return raw_N - (peak + np.log(np.exp(over_N - peak).mean()))


def mixture(loglik_NE: Floats, seed_N: Floats, coefficient_E: Floats) -> Floats:
    """Log-likelihood of the probability mixture with the same coefficients [N], nats; the seed has what is left of one, and where
    nothing is left the coefficients are scaled to sum to one."""
    weight_E = np.maximum(np.asarray(coefficient_E, np.float64), 0)
    weight_E = np.append(weight_E, max(0.0, 1 - weight_E.sum()))
    weight_E /= weight_E.sum()
    return mix(np.column_stack([loglik_NE, seed_N]), np.broadcast_to(weight_E, (len(seed_N), len(weight_E))))


def interpolation(loglik_NE: Floats, seed_N: Floats, coefficient_E: Floats) -> Floats:
    """The weighted mean of the log-likelihoods themselves [N]: the simplest estimate, for comparison."""
    seed_N = np.asarray(seed_N, np.float64)
    return seed_N + (np.asarray(loglik_NE, np.float64) - seed_N[:, None]) @ coefficient_E
