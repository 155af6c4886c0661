"""May an expert join a forest? Evidence -> verdict: every check with its value and threshold. Pure functions; nothing is measured here.

E accepted experts. A delta is expert minus seed, all tensors as one vector; what is needed here are inner products of deltas.

Copies are detected on the deltas, not on files or factors: B A stays the same when its factors are written in another basis. A blend
of several experts may be far from each of them, so it is compared with the span of all.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from elmwood.records import Check, Digest, Frozen, Verdict

Floats = NDArray[np.floating]


FEW = 3  # accepted deltas


class Policy(Frozen):
    """Thresholds, fixed before the first submission."""

    min_effect: float = 0.002  # bits per byte better than the seed on the expert's own domain
    ensemble_effect: float = 0.0  # bits per byte better with it than without, on the blocks it touches
    harm: float = 0.005  # largest loss of a domain, bits per byte
    cosine: float = Field(0.85, ge=0, le=1)  # with an accepted delta; honest experts of the same domain stayed below 0.7
    novelty: float = Field(0.2, ge=0, le=1)  # share of the delta's squared length outside the span of accepted ones
    public_ratio: float = 1.8  # gain on published held-out text over that on secret text
    alpha: float = Field(0.05, gt=0, lt=1)  # error of "better than the seed" and "not harmed"; joining has the error budget
    beta: float = Field(0.1, gt=0, lt=1)  # error of a refusal because the effect is too small


class Evidence(Frozen):
    """The measurements of one expert. Lower ends are of confidence sequences (sequential/), bits per byte. None (not measured) fails."""

    expert: Digest
    own_low: float | None = None  # gain over the seed on its own domain
    ensemble_low: float | None = None  # gain of the ensemble with it, over that without
    ensemble_gain: float | None = None  # mean over all text, for the credit
    ensemble_wealth: float | None = None  # greatest log wealth against "no gain" at any look
    # gain of the ensemble over all text of each domain in which the expert has weight; a loss is below zero
    domain_low: dict[str, float] = Field(default_factory=dict)
    cosine: float | None = None  # greatest with an accepted delta; 0 where there is none
    novelty: float | None = None
    public_gain: float | None = None
    secret_gain: float | None = None
    finite: bool = False  # no NaN or Inf in the weights
    level: float | None = None  # the error level of this submission (error_budget.py), fixed before the test


def judge_evidence(evidence: Evidence, policy: Policy) -> Verdict:
    """All checks, cheapest first; the expert is accepted when every check passes."""
    worst = min(evidence.domain_low.items(), key=lambda item: item[1], default=None)
    needed = None if evidence.level is None or not evidence.level > 0 else -float(np.log(evidence.level))
    ratio = _ratio(evidence.public_gain, evidence.secret_gain)
    checks = (
        _check("weights are finite", float(evidence.finite), 1.0),
        _check("not a copy: cosine with any accepted delta", evidence.cosine, policy.cosine, "at most"),
        _check("not a blend: share outside the span of accepted deltas", evidence.novelty, policy.novelty),
        _check("better than the seed on its own domain, bits per byte at least", evidence.own_low, policy.min_effect),
        _check("ensemble better with it than without, bits per byte at least", evidence.ensemble_low, policy.ensemble_effect),
        _check("evidence for that, log wealth, against the error budget", evidence.ensemble_wealth, needed),
        _check(f"no domain harmed{f'; worst is {worst[0]}' if worst else ''}, bits per byte at least", worst and worst[1], -policy.harm),
        _check("gain on public over gain on secret text", ratio, policy.public_ratio, "at most"),
    )
    return Verdict(expert=evidence.expert, accepted=all(check.passed for check in checks), checks=checks)


def check_length(own2: float, other2_E: Floats, low: float, high: float) -> tuple[Check, ...]:
    """A delta's length, from squared lengths, in a band around the median of accepted ones. With few of them there is no check."""
    if len(other2_E) < FEW:
        return ()
    ratio = float(np.sqrt(own2 / np.median(other2_E))) if np.median(other2_E) > 0 else None
    name = "length of the delta over the median of accepted ones"
    return _check(name, ratio, low), _check(name, ratio, high, "at most")


def _check(name: str, value: float | None, threshold: float | None, side: Literal["at least", "at most"] = "at least") -> Check:
    """A value that is missing or not finite fails."""
    value, threshold = (None if number is None or not np.isfinite(number) else float(number) for number in (value, threshold))
    passed = value is not None and threshold is not None and (value - threshold) * (1 if side == "at least" else -1) >= 0
    return Check(name=name, value=value, threshold=threshold, side=side, passed=passed)


def _ratio(public: float | None, secret: float | None) -> float | None:
    """None where there is no gain on secret text."""
    return None if public is None or secret is None or not secret > 0 else public / secret


# ---- copies and blends ----------------------------------------------------------------------------------------------


def cosine(own: float, with_E: Floats, gram_EE: Floats) -> float:
    """Greatest cosine of a delta with accepted ones; 0 where there are none, or either is zero."""
    length2_E = own * np.diag(gram_EE)
    return float(np.max(np.where(length2_E > 0, with_E / np.sqrt(np.where(length2_E > 0, length2_E, 1)), 0.0), initial=0.0))


def novelty(own: float, with_E: Floats, gram_EE: Floats) -> float:
    """Share of a delta's squared norm outside the span of the accepted ones, from their Gram matrix: 0 a blend, 1 all new.

    `own`: its squared norm; `with_E`: its inner products with them. A delta of zero has novelty 0.
    """
    if not own > 0:
        return 0.0
    scale_E = np.sqrt(np.maximum(np.diag(gram_EE), 0))
    scale_E = np.where(scale_E > 0, scale_E, 1)
    unit_EE, onto_E = gram_EE / np.outer(scale_E, scale_E), with_E / scale_E
    inside = float(onto_E @ np.linalg.pinv(unit_EE, rcond=1e-9, hermitian=True) @ onto_E)
    return float(np.clip(1 - inside / own, 0.0, 1.0))
