"""Statistics that experts left beside their weights, found and opened.

I inputs of a linear layer
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput
from elmwood.records import Expert, Statistics
from elmwood.records.plain_json import parse_json
from elmwood.store import Store
from elmwood.store.headers import read_header
from elmwood.store.own import made_here
from elmwood.weights.tensors import Files, StoredTensor, decode, places

Doubles = NDArray[np.float64]

KINDS = ("gram", "factor", "rest", "fisher")
FACTOR = 2.0  # by which the mean that a claim states may differ from that of its numbers
SCALES = 100.0  # by which the inputs of one expert's layers may be larger than the median of all


def find_statistics(expert: str, store: Store) -> Statistics:
    """The statistics of an expert that are over the most tokens: those made in this store, else those of others, as far as they can be
    true. Raises BadInput where there are none."""
    have = [one for one in map(store.load, _named(expert, store)) if isinstance(one, Statistics) and one.expert == expert]
    if not have:
        raise BadInput(
            f"expert {expert[:8]} left no statistics: make them where its text is, `elmwood statistics {expert[:8]}`, or at training "
            "with --statistics"
        )
    here = made_here(store)
    if mine := [one for one in have if one.digest in here]:
        return max(mine, key=lambda one: (one.tokens, one.digest))
    best = max(have, key=lambda one: (one.tokens <= _most_tokens(one, store), one.tokens, one.digest))
    check(best, store)
    return best


def check(claim: Statistics, store: Store) -> None:
    """Whether statistics that somebody else made can be those of their expert. Reads them all. Raises BadInput."""
    who = f"statistics {claim.digest[:8]} of expert {claim.expert[:8]}"
    cure = f"do not use them; make them where its text is, `elmwood statistics {claim.expert[:8]}`"
    if claim.tokens > (most := _most_tokens(claim, store)):
        raise BadInput(f"{who} are over {claim.tokens:,} tokens, and {claim.rows:,} rows of its text have {most:,} at most: {cure}")
    held, total, numbers = ExpertStatistics(claim, store), 0.0, 0
    for key in held.places:
        value, (kind, _, name) = held.read(key), key.partition("|")
        bad = not np.isfinite(value).all() or (kind != "factor" and not _non_negative(value, kind)) or kind not in KINDS
        if bad or (kind == "gram" and not np.allclose(value, value.T, rtol=1e-3, atol=1e-6 * float(np.abs(value).max(initial=0)))):
            raise BadInput(f"{who}: {kind} of {name} is not finite, symmetric and at least 0 on its diagonal: {cure}")
        if kind == "fisher":
            total, numbers = total + float(value.sum()), numbers + value.size
    mean = total / max(1, numbers)
    if not (claim.fisher / FACTOR <= mean <= claim.fisher * FACTOR):
        raise BadInput(f"{who} say that squared gradients are {claim.fisher:.3g} on average, and they are {mean:.3g}: {cure}")


def _non_negative(value: Doubles, kind: str) -> bool:
    return bool(((np.diag(value) if kind == "gram" else value) >= 0).all())


def _most_tokens(claim: Statistics, store: Store) -> int:
    """The most tokens that so many rows of an expert's text can have."""
    return claim.rows * store.load(claim.expert, Expert).recipe.length


def check_scales(claims: Mapping[str, Statistics], store: Store) -> None:
    """Whether the inputs that the statistics of others tell of are as large as those of the other experts': else they would decide a merge
    alone, or count for nothing. Expert -> its statistics. Raises BadInput."""
    here = made_here(store)
    if len(claims) < 2 or all(one.digest in here for one in claims.values()):
        return
    held = {expert: ExpertStatistics(one, store) for expert, one in claims.items()}
    for key in sorted(set.intersection(*(set(one.places) for one in held.values()))):
        if not key.startswith("gram|"):
            continue
        size = {expert: float(np.trace(one.read(key))) for expert, one in held.items()}
        middle = float(np.median(list(size.values())))
        for expert, one in size.items():
            if claims[expert].digest not in here and not middle / SCALES <= one <= middle * SCALES:
                raise BadInput(
                    f"statistics {claims[expert].digest[:8]} of expert {expert[:8]}, which were not made here, have inputs of "
                    f"{key.partition('|')[2]} {one / middle if middle else np.inf:.3g} times as large as the experts' median; at most "
                    f"{SCALES:g} times is believed: leave the expert out, or make its statistics where its text is"
                )


def _named(expert: str, store: Store) -> list[str]:
    """Records of statistics that name an expert. Read as text: a store may hold thousands, and few are these."""
    text = f'"{expert}"'.encode()
    raw = ((digest, store.path(digest).read_bytes()) for digest in store.records())
    return [digest for digest, data in raw if b'"kind":"statistics"' in data and text in data]


class ExpertStatistics:
    """The values of one expert's statistics, by tensor."""

    def __init__(self, record: Statistics, store: Store):
        self.record, self.files = record, Files(most=2)
        path = store.folder(record.files) / "statistics.safetensors"
        self.places: dict[str, StoredTensor] = places([path])
        try:
            self.same: dict[str, str] = dict(parse_json(read_header(path).metadata.get("same", "{}").encode()))
        except (ValueError, TypeError) as error:
            raise BadInput(f"statistics {record.digest[:8]}: shared matrices cannot be read ({error}): do not use them") from error

    def _read(self, key: str) -> Doubles | None:
        return self.read(key) if key in self.places else None

    def read(self, key: str) -> Doubles:
        place = self.places[key]
        return decode(self.files.read(place, 0, place.numbers), place.dtype).astype(np.float64).reshape(place.shape)

    def gram(self, name: str) -> Doubles | None:
        """Mean xᵀx [I, I] of what the linear layer with this weight reads; None where it is no linear layer."""
        name = self.same.get(name, name)
        if (gram_II := self._read(f"gram|{name}")) is not None:
            return gram_II
        factor_RI, rest_I = self._read(f"factor|{name}"), self._read(f"rest|{name}")
        return None if factor_RI is None or rest_I is None else factor_RI.T @ factor_RI + np.diag(rest_I)

    def fisher(self, name: str) -> Doubles | None:
        """Squared gradients in the tensor's shape, 1 on average over the whole model; None where there are none."""
        value = self._read(f"fisher|{name}")
        return None if value is None else value / (self.record.fisher or 1.0)


def open_statistics(expert: str, store: Store) -> ExpertStatistics:
    """Raises BadInput, Damaged."""
    return ExpertStatistics(find_statistics(expert, store), store)
