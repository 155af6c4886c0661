"""Rules that look at each value by itself, or at its rank and the size of its tensor: what one expert adds, and what the sums come to.

N values of one tensor (or a block of it). `delta` is expert minus seed (the task vector).
"""

import numpy as np

from elmwood.merge.rules.base import Floats, Local, Settings, Total
from elmwood.weights import exact, kernels

# ---- parts: from one expert -------------------------------------------------------------------------------------


def scale(delta_N: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Weight times delta."""
    return (delta_N * weight,)


def drop(delta_N: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Each value kept with probability `density`, and made larger by as much (DARE, arXiv:2311.03099)."""
    return (delta_N * (weight / settings["density"]) * (local.chance() < settings["density"]),)


def trim(delta_N: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Without the smallest and the largest magnitudes (breadcrumbs, arXiv:2312.06795)."""
    part_N = np.empty_like(delta_N)
    kernels.trim(delta_N, weight, local.low, local.high, part_N)
    return (part_N,)


def split_votes(trimmed_N: Floats, weight: float) -> tuple[Floats, ...]:
    """A ballot (see exact.vote) as four addends: what speaks for plus, what for minus, and with what weight."""
    plus_N, minus_N = np.maximum(trimmed_N, 0), np.minimum(trimmed_N, 0)
    return plus_N, minus_N, (trimmed_N > 0) * weight, (trimmed_N < 0) * weight


def drop_by_rank(delta: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Each value kept with a probability that grows with its rank among the magnitudes of its row, and made larger by as much
    (MAGPRUNE of DELLA, arXiv:2406.11617): density - epsilon for the smallest, density + epsilon for the largest; all at density 1."""
    if settings["density"] >= 1:
        return (delta * weight,)
    magnitude_RN = np.abs(np.atleast_2d(delta)).astype(np.float32)
    place_RN = magnitude_RN.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable").reshape(delta.shape)
    share = place_RN / max(1, magnitude_RN.shape[-1] - 1)
    kept = settings["density"] - settings["epsilon"] + share * (2 * settings["epsilon"])
    return (delta * weight / kept * (local.chance() < kept),)


def vote_by_rank(delta: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """The ballot of what DELLA leaves of delta (arXiv:2406.11617)."""
    return split_votes(drop_by_rank(delta, weight, local, settings)[0], weight)


def vote_by_energy(delta: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Delta itself, for the sign; and its ballot with the weight of its squared length (SCE, arXiv:2408.07990, nothing selected)."""
    return (delta, *split_votes(delta * (mine := weight * exact.inner(delta, delta)), mine))


def add_direction(delta: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Delta, and its direction (model stock, arXiv:2403.19522)."""
    length = np.sqrt(exact.inner(delta, delta))
    return delta * weight, delta * (weight / length) if length else np.zeros_like(delta)


def weigh_by_fisher(delta: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """The diagonal Fisher, and delta weighed by it (arXiv:2111.09832). `floor`: what every value has of the average Fisher."""
    fisher = weight * (_fisher(delta, local) + settings["floor"])
    return fisher, fisher * delta


def add_curvature(delta: Floats, weight: float, local: Local, settings: Settings) -> tuple[Floats, ...]:
    """Natural parameters: curvature, and prior and curvature times delta (arXiv:2310.12808, the seed's curvature being `prior`)."""
    fisher = _fisher(delta, local)
    return weight * fisher, weight * (settings["prior"] + fisher) * delta


def _fisher(delta: Floats, local: Local) -> Floats:
    found = local.statistic("fisher")
    return np.ones_like(delta) if found is None else found.reshape(delta.shape)


# ---- ends: from the sums of all ---------------------------------------------------------------------------------


def shift_seed(sums: tuple[Floats, ...], seed_N: Floats, total: Total, settings: Settings) -> Floats:
    """seed + scale * sum / divisor: the weights together where `normalise` is on, else 1. Divided last, so that it is rounded once."""
    divisor = total.weight if settings["normalise"] else 1.0
    own = divisor - settings["scale"] * total.whole  # of the seed: what was added as a whole holds it already
    theta_N = sums[0] * settings["scale"]
    if own:
        theta_N += seed_N * own
    theta_N /= divisor
    return theta_N


def elect_sign(sums: tuple[Floats, ...], seed_N: Floats, total: Total, settings: Settings) -> Floats:
    """The side with more mass wins (plus, where they are equal); the mean of those on it (TIES, arXiv:2306.01708)."""
    theta_N = np.empty(seed_N.shape)
    flat = (one.reshape(-1) for one in (*sums, seed_N))
    kernels.elect(*flat, settings["scale"], bool(settings["normalise"]), theta_N.reshape(-1))
    return theta_N


def span(sums: tuple[Floats, ...], seed_N: Floats, total: Total, settings: Settings) -> Floats:
    """A combination of deltas on top of the seed, or of whole weights in its place. Its weights were chosen before."""
    own = (1.0 if settings["deltas"] else total.weight) - total.whole
    return sums[0] + seed_N * own if own else sums[0]


def erase_minority(sums: tuple[Floats, ...], seed_N: Floats, total: Total, settings: Settings) -> Floats:
    """The mean of those who agree with the sign of the plain sum, by their squared lengths (SCE, arXiv:2408.07990)."""
    plain, plus, minus, plus_weight, minus_weight = sums
    wins = plain >= 0
    weight, mass = np.where(wins, plus_weight, minus_weight), np.where(wins, plus, minus)
    return seed_N + settings["scale"] * np.divide(mass, weight, out=np.zeros_like(mass), where=weight != 0)


def shrink_to_seed(sums: tuple[Floats, ...], seed_N: Floats, total: Total, settings: Settings) -> Floats:
    """Between seed and average, nearer to the seed the wider the angle between the deltas (model stock, arXiv:2403.19522).

    The mean cosine comes from the length of the sum of directions: |U|^2 = sum of w_i w_j cos_ij."""
    pairs = total.weight**2 - total.squares
    cosine = (exact.inner(sums[1], sums[1]) - total.squares) / pairs if pairs else 1.0
    count = total.weight**2 / total.squares  # of experts, where they weigh the same
    apart = 1 + (count - 1) * cosine  # 0 where the directions cancel, as do those of experts that change nothing here
    share = count * cosine / apart if apart > 1e-12 else 0.0
    return seed_N + share * sums[0] / total.weight


def divide_by_curvature(sums: tuple[Floats, ...], seed_N: Floats, total: Total, settings: Settings) -> Floats:
    """Seed + what was weighed, over the weights (arXiv:2111.09832; arXiv:2310.12808 with `prior` in the divisor)."""
    return seed_N + settings["scale"] * sums[1] / (sums[0] + settings.get("prior", 0.0))
