"""Columns -> losses. No model runs here.

N scored tokens, E models (experts, perhaps the seed last), D documents, B blocks, K domains
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.evaluate.holdout import Holdout
from elmwood.records import Row

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

CHUNK = 1 << 18  # tokens mixed at once


class Estimate(NamedTuple):
    """A mean over documents and its standard error; a positive difference means that the first is worse."""

    value: float
    standard_error: float


def mix(loglik_NE: Floats, weight_NE: Floats) -> Floats:
    """log sum_e w_e p_e per token [N] float64: the ensemble's log-likelihood, in probability space."""
    mixed = [np.zeros(0)]
    for start in range(0, len(loglik_NE), CHUNK):
        loglik = np.asarray(loglik_NE[start : start + CHUNK], np.float64)
        weight = weight_NE[start : start + CHUNK]
        peak = np.where(weight > 0, loglik, -np.inf).max(1)
        mixed.append(peak + np.log((weight * np.exp(np.minimum(loglik - peak[:, None], 0))).sum(1)))
    return np.concatenate(mixed)


def nats(loglik_N: Floats, holdout: Holdout) -> Floats:
    """Loss of each document [D], nats."""
    return np.bincount(holdout.document_N, -np.asarray(loglik_N, np.float64), len(holdout.bytes_D)).astype(np.float64)


def block_nats(loglik_N: Floats, holdout: Holdout) -> Floats:
    """Loss of each block [B], nats."""
    return np.bincount(holdout.block_N, -np.asarray(loglik_N, np.float64), len(holdout.split_B)).astype(np.float64)


def bits_per_byte(loglik_N: Floats, holdout: Holdout, among_D: Bools) -> Estimate:
    """Bits per UTF-8 byte over some documents."""
    return _ratio(nats(loglik_N, holdout), holdout, among_D)


def difference(a_N: Floats, b_N: Floats, holdout: Holdout, among_D: Bools) -> Estimate:
    """Bits per byte of a minus b on the same documents, with the standard error of the paired difference."""
    return _ratio(nats(a_N, holdout) - nats(b_N, holdout), holdout, among_D)


def _ratio(nats_D: Floats, holdout: Holdout, among_D: Bools) -> Estimate:
    """Sum of bits over sum of bytes. The documents are the sample: its error is that of the linearised ratio."""
    bits, size = nats_D[among_D] / np.log(2), holdout.bytes_D[among_D].astype(np.float64)
    count, total = len(bits), size.sum()
    if count == 0:
        return Estimate(float("nan"), float("nan"))
    value = bits.sum() / total
    residual = bits - value * size
    error = np.sqrt(count / (count - 1) * np.square(residual).sum()) / total if count > 1 else np.nan
    return Estimate(float(value), float(error))


def perplexity(loglik_N: Floats, holdout: Holdout, among_D: Bools) -> float:
    """exp of the mean loss per token."""
    return float(np.exp(-np.asarray(loglik_N)[among_D[holdout.document_N]].mean(dtype=np.float64)))


def by_domain(loglik_N: Floats, holdout: Holdout, among_D: Bools, domains: int) -> tuple[float | None, ...]:
    """Bits per byte of each domain's documents [K]; None where there are none."""
    inside = [among_D & (holdout.domain_D == k) for k in range(domains)]
    return tuple(bits_per_byte(loglik_N, holdout, mine_D).value if mine_D.any() else None for mine_D in inside)


def row(name: str, loglik_N: Floats, holdout: Holdout, *, domains: int, against_N: Floats | None = None, **fields: Any) -> Row:
    """One line of a comparison, on the test half: `against_N` is what its gain is over, `fields` are its role and costs.

    Its bits per byte weigh domains by their bytes, its macro weighs them alike, as in Paloma (arXiv:2312.10523).
    """
    test_D = ~holdout.tune_D
    loss = bits_per_byte(loglik_N, holdout, test_D)
    gain = None if against_N is None else difference(against_N, loglik_N, holdout, test_D)
    each = by_domain(loglik_N, holdout, test_D, domains)
    met = [value for value in each if value is not None]
    return Row(
        name=name,
        bits_per_byte=loss.value,
        standard_error=loss.standard_error,
        perplexity=perplexity(loglik_N, holdout, test_D),
        gain=gain and gain.value,
        gain_error=gain and gain.standard_error,
        domains=each,
        macro=sum(met) / len(met) if met else None,
        **fields,
    )
