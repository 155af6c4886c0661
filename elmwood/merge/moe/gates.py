"""The gates of a mixture before any tuning: rows of a linear map from what enters a layer's feed-forward to a logit for each expert.

E experts, H width, D domains, R rank (of several adapters together), O what an adapted matrix gives out
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput
from elmwood.merge.moe.layout import FEED_FORWARD
from elmwood.threads import one_thread
from elmwood.weights.tensors import StoredTensor

Floats = NDArray[np.floating]


class GateInputs(NamedTuple):
    """What the gates of one layer are made from. What takes time is a function, to be called where it is needed."""

    layer: str  # as in model.layers.0
    width: int  # H
    experts: tuple[str, ...]  # digests, by their number in the mixture; the seed's own where its feed-forward is an expert
    scale: float  # rows are multiplied by it
    seed_bias: float  # added to the logit of the seed's own feed-forward
    rng_seed: int
    domains: Callable[[], Sequence[int | None]]  # of the experts; None for the seed's own. Raises BadInput for one of no domain
    hidden: Callable[[], tuple[Floats, Floats]]  # mean_DH and within_HH of what enters the feed-forward on each domain's text
    directions: Callable[[], Sequence[Floats | None]]  # of each expert the input [H] that its adapters change most


GatesFn = Callable[[GateInputs], Floats]  # rows [E, H] of one layer


def random_gates(inputs: GateInputs) -> Floats:
    """Normal numbers, 0.02 wide at scale 1, by layer and digest: so another expert changes no row but its own."""
    return _random(inputs.layer, inputs.width, inputs.experts, inputs.rng_seed, inputs.scale)


def hidden_gates(inputs: GateInputs) -> Floats:
    """Fisher's discriminant of the domains (`hidden_rows`)."""
    return hidden_rows(*inputs.hidden(), inputs.domains(), inputs.scale, inputs.seed_bias)


def arrow_gates(inputs: GateInputs) -> Floats:
    """The prototypes of Arrow, arXiv:2405.11157 (`arrow_rows`); where no expert adapts what it reads, as in layers that were left as they
    are, those of `hidden_gates`. Raises BadInput where some do and others do not."""
    found, domains = inputs.directions(), inputs.domains()
    blind = [digest for digest, way, k in zip(inputs.experts, found, domains, strict=True) if way is None and k is not None]
    if all(way is None for way in found):
        return hidden_gates(inputs)
    if blind:
        raise BadInput(
            f"gate_proj and up_proj of {inputs.layer}, which Arrow reads, are as in the seed for {_named(blind)}, never to be picked: "
            "take --gates hidden, or leave out who has none (--without)"
        )
    return arrow_rows(found, *inputs.hidden(), domains, inputs.scale, inputs.seed_bias)


# `elmwood mix --gates NAME`, or 'module:function' of one more
GATES: dict[str, GatesFn] = {"hidden": hidden_gates, "arrow": arrow_gates, "random": random_gates}


def check_rows(rows: Mapping[str, Floats], experts: Sequence[str], seed: str, top_k: int) -> None:
    """That each row is finite, none but the seed's own is zero, and none is hidden behind `top_k` equal ones, which come first. Raises
    BadInput with the experts that it is about."""
    for layer, wide_EH in rows.items():
        if len(wide_EH) != len(experts):
            continue  # where it is put, its shape is refused
        with np.errstate(over="ignore"):
            row_EH = np.asarray(wide_EH, np.float32)  # a router's own precision
        if wrong := [digest for digest, row_H in zip(experts, row_EH, strict=True) if not np.isfinite(row_H).all()]:
            raise BadInput(f"the gates of {layer} contain NaN or Inf for {_named(wrong)}: choose another scale, or another kind")
        if top_k >= len(experts):
            continue  # all are picked
        if wrong := [digest for digest, row_H in zip(experts, row_EH, strict=True) if digest != seed and not row_H.any()]:
            raise BadInput(
                f"the gates of {layer} are zero for {_named(wrong)}, which the text then does not choose: choose a scale above 0, "
                f"another kind of gates, or --top-k {len(experts)}"
            )
        seen: Counter[bytes] = Counter()
        for digest, row_H in zip(experts, row_EH, strict=True):
            seen[row_H.tobytes()] += 1
            if seen[row_H.tobytes()] > top_k:
                raise BadInput(
                    f"{_named([digest])} can never be picked in {layer}: {top_k} experts before it have the same gates, as experts of one "
                    "domain do: take --gates random and tune them, a larger --top-k, or leave it out (--without)"
                )


def _named(experts: Sequence[str]) -> str:
    return ("expert " if len(experts) == 1 else "experts ") + ", ".join(digest[:8] for digest in experts)


def layers_of(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    """The seed's layers with a feed-forward, and the width of what enters it."""
    found = ((FEED_FORWARD.fullmatch(name), place) for name, place in tensors.items())
    return {match["layer"]: place.shape[1] for match, place in found if match and match["part"] == "gate_proj"}


def random_rows(tensors: Mapping[str, StoredTensor], experts: Sequence[str], rng_seed: int, scale: float) -> dict[str, Floats]:
    """Random gates of every layer (`random_gates`)."""
    return {layer: _random(layer, width, experts, rng_seed, scale) for layer, width in layers_of(tensors).items()}


def _random(layer: str, width: int, experts: Sequence[str], rng_seed: int, scale: float) -> Floats:
    return scale * 0.02 * np.stack([_chance(f"{rng_seed} {layer} {digest}", width) for digest in experts])


def _chance(name: str, count: int) -> Floats:
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(count)


class Common(NamedTuple):
    """What the domains share in one layer."""

    overall_H: Floats  # mean of what enters the feed-forward
    cov_HH: Floats
    along_H: Floats  # a direction v with v.x near 1 for every x: biases stand along it, since a linear gate has none


def common(mean_DH: Floats, within_HH: Floats, shrink: float = 0.1) -> Common:
    """`shrink`: the share of a diagonal in the covariance. Raises BadInput."""
    overall_H = mean_DH.mean(0)
    width = len(overall_H)
    if not (np.isfinite(mean_DH).all() and np.isfinite(within_HH).all() and np.trace(within_HH) > 0):
        raise BadInput(
            "what enters a feed-forward layer is not finite, or the same everywhere: no gates can be made of it; take --gates random"
        )
    cov_HH = (1 - shrink) * within_HH + shrink * np.trace(within_HH) / width * np.eye(width)
    along_H = np.linalg.solve(cov_HH + np.outer(overall_H, overall_H), overall_H)
    return Common(overall_H, cov_HH, along_H / (along_H @ overall_H))


@one_thread
def hidden_rows(mean_DH: Floats, within_HH: Floats, domain_E: Sequence[int | None], scale: float, seed_bias: float) -> Floats:
    """Fisher's discriminant of the domains, as rows [E, H] of one layer: what a token of a domain looks like to the seed.

    The row of the seed's own expert (None) is a bias and nothing else.
    """
    shared = common(mean_DH, within_HH)
    solved_DH = np.linalg.solve(shared.cov_HH, (mean_DH - shared.overall_H).T).T
    bias_D = -0.5 * ((mean_DH + shared.overall_H) * solved_DH).sum(1)
    rows = [seed_bias * shared.along_H if k is None else scale * (solved_DH[k] + bias_D[k] * shared.along_H) for k in domain_E]
    return np.stack(rows)


@one_thread
def direction(pairs: Sequence[tuple[Floats, Floats, float]]) -> Floats | None:
    """The input [H] that a layer's adapters, each A [R, H], B [O, R] and a scale, change most: the first right singular vector of their
    products one above another (Arrow, arXiv:2405.11157). None without adapters, or where they change nothing."""
    if not pairs:
        return None
    small_RH = np.concatenate([scale * np.linalg.qr(b_OR).R @ a_RH for a_RH, b_OR, scale in pairs])  # B = QR, and Q turns nothing
    _, value_R, right_RH = np.linalg.svd(small_RH, full_matrices=False)
    return right_RH[0] if value_R[0] > 0 else None


@one_thread
def arrow_rows(
    direction_E: Sequence[Floats | None], mean_DH: Floats, within_HH: Floats, domain_E: Sequence[int | None], scale: float, seed_bias: float
) -> Floats:
    """Arrow's prototypes as rows [E, H] of one layer, around the mean of all domains.

    Arrow takes the magnitude of a projection. A standard gate is linear, so the side that the expert's own domain lies on counts.
    """
    shared = common(mean_DH, within_HH)
    rows = []
    for direction_H, k in zip(direction_E, domain_E, strict=True):
        if direction_H is None or k is None:
            rows.append(seed_bias * shared.along_H)
            continue
        row_H = direction_H - (direction_H @ shared.overall_H) * shared.along_H
        side = 1.0 if row_H @ (mean_DH[k] - shared.overall_H) >= 0 else -1.0
        rows.append(scale * side * row_H)
    return np.stack(rows)
