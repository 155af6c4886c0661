"""The pass over the experts: each block of each tensor is read from all of them, and the sums of any number of rules come out.

N numbers of a block; E experts
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.merge import fixed
from elmwood.merge.rules import Local, Rule, Settings
from elmwood.merge.select import Kth
from elmwood.merge.sources import Source, Whole
from elmwood.merge.tensors import BLOCK, PIECE, SIZES, Place, Reader, Request, decode

Floats = NDArray[np.floating[Any]]
GROUP = 32  # experts whose pieces stand in memory at once
SAMPLE = 1 << 17  # magnitudes that say about where a threshold lies


class Wanted(NamedTuple):
    """One sum to be made: a rule and the settings that decide its state."""

    rule: Rule
    begins: Settings


class Piece(NamedTuple):
    """Sums over a part of a tensor."""

    name: str
    first: int
    last: int
    seed: NDArray[np.uint8] | None  # its bytes, where they were asked for
    sums: list[list[fixed.Ints]]  # [wanted][field]


class Pass:
    """Reads experts of one seed. Weights are a function of the expert's place and the tensor's name."""

    def __init__(
        self,
        seed: Mapping[str, Place],
        sources: Sequence[Source],
        weight: Callable[[int, str], float],
        wanted: Sequence[Wanted],
        part: tuple[int, int] = (0, 1),
        progress: Progress = silent,
    ):
        self.seed, self.sources, self.weight, self.wanted, self.part, self.progress = seed, sources, weight, wanted, part, progress
        self.reach = [[0] * len(sources) for _ in wanted]  # the bound of what each expert added
        self.scratch_N = np.empty(BLOCK)

    def names(self) -> list[str]:
        """Tensors that are merged: those of numbers, that some expert changes."""
        return [name for name, place in self.seed.items() if place.dtype in SIZES and any(one.has(name) for one in self.sources)]

    def span(self, name: str) -> tuple[int, int]:
        """The numbers of a tensor that belong to this part of the work: whole blocks, in about equal shares."""
        numbers, (mine, of) = self.seed[name].numbers, self.part
        blocks = -(-numbers // BLOCK)
        return min(numbers, blocks * mine // of * BLOCK), min(numbers, blocks * (mine + 1) // of * BLOCK)

    def run(self, with_seed: Callable[[str], bool]) -> Iterator[Piece]:
        """The sums of every piece of every tensor; `with_seed` says where the seed's own bytes are asked for too. Raises BadInput."""
        names = self.names()
        total = sum(last - first for first, last in map(self.span, names)) * max(1, len(self.sources))
        done = 0
        with Reader(PIECE * 8) as reader:
            across = [self._cuts(one, names, reader) if one.begins.get("across") else None for one in self.wanted]
            for name in names:
                cuts = [
                    found if found or not one.rule.ranks else self._cuts(one, [name], reader)
                    for one, found in zip(self.wanted, across, strict=True)
                ]
                for piece in self._tensor(name, cuts, reader, with_seed(name)):
                    done += (piece.last - piece.first) * len(self.sources)
                    self.progress("merge", done, total, "numbers")
                    yield piece
        for reach in self.reach:
            fixed.check_room(sum(reach))

    # ---- one tensor

    def _needs_seed(self, name: str) -> bool:
        """Whether deltas of full experts are called for, which are differences from the seed."""
        numbers = self.seed[name].numbers
        full = [one for one in self.sources if isinstance(one, Whole)]
        return any(one.reads(name, numbers) < numbers for one in full) or (bool(full) and any(not one.rule.linear for one in self.wanted))

    def _plan(self, name: str, seed: bool, groups: Sequence[Sequence[Source]]) -> Iterator[tuple[int, int, int, list[Request]]]:
        """(first, last, group, what to read) for each step."""
        start, stop = self.span(name)
        for first in range(start, stop, PIECE):
            last = min(stop, first + PIECE)
            for number, group in enumerate(groups):
                step: list[Request] = [(self.seed[name], first, last)] if seed else []
                for one in group:
                    if isinstance(one, Whole):
                        known = one.reads(name, last)
                        step.append((one.places[name], min(first, known), known))
                yield first, last, number, step

    def _tensor(self, name: str, cuts: Sequence[Any], reader: Reader, with_seed: bool) -> Iterator[Piece]:
        seed = with_seed or self._needs_seed(name)
        places = [e for e, one in enumerate(self.sources) if one.has(name)]
        groups = [places[at : at + GROUP] for at in range(0, len(places), GROUP)]
        plan = list(self._plan(name, seed, [[self.sources[e] for e in group] for group in groups]))
        sums: list[list[list[fixed.Sum]]] = []
        for (first, last, number, _), raws in zip(plan, reader.stream(step for *_, step in plan), strict=True):
            starts = range(0, last - first, BLOCK)
            if number == 0:
                sums = [[[fixed.Sum(min(BLOCK, last - first - at)) for _ in one.rule.fields] for at in starts] for one in self.wanted]
            for block, at in enumerate(starts):
                self._block(name, first, at, min(last - first, at + BLOCK), groups[number], raws, seed, cuts, [one[block] for one in sums])
            if number == len(groups) - 1:
                fields = [[_joined([block[f] for block in one]) for f in range(len(one[0]))] for one in sums]
                yield Piece(name, first, last, raws[0] if seed else None, fields)

    def _block(
        self, name: str, first: int, at: int, end: int, group: Sequence[int], raws: Sequence[Any], seed: bool, cuts: Sequence[Any],
        sums: Sequence[Sequence[fixed.Sum]],
    ) -> None:  # fmt: skip
        """Add one block of some experts."""
        place = self.seed[name]
        seed_N = decode(raws[0][at * place.width : end * place.width], place.dtype).astype(np.float64) if seed else None
        rest = iter(raws[1:] if seed else raws)
        scratch_N = self.scratch_N[: end - at]
        for e in group:
            one = self.sources[e]
            raw = next(rest) if isinstance(one, Whole) else None
            weight = self.weight(e, name)
            value_N, delta_N = _numbers(one, name, first + at, first + end, at, place, raw, seed_N)
            largest = _finite_reach(value_N, one, name)
            for number, (wanted, mine) in enumerate(zip(self.wanted, sums, strict=True)):
                if not weight:
                    continue
                if wanted.rule.linear:
                    scaled = fixed.reach(np.array([largest * weight]))
                    parts: Sequence[Floats] = (value_N if weight == 1 else value_N.astype(np.float64) * weight,)
                else:
                    if delta_N is None:
                        delta_N = value_N if seed_N is None or not one.whole else value_N.astype(np.float64) - seed_N
                    low, high = cuts[number][e] if cuts[number] else (0.0, np.inf)
                    chance = _chance(one.digest, name, wanted.begins, first + at, end - at)
                    parts = wanted.rule.part(delta_N, weight, Local(low, high, chance), wanted.begins)
                    scaled = None
                for sum_N, part_N in zip(mine, parts, strict=True):
                    reach = scaled if scaled is not None else fixed.reach(part_N)
                    self.reach[number][e] = max(self.reach[number][e], fixed.bound(reach))
                    sum_N.add(part_N, reach, scratch_N)

    # ---- thresholds

    def _cuts(self, wanted: Wanted, names: Sequence[str], reader: Reader) -> list[tuple[float, float]]:
        """For each expert the magnitudes between which numbers are kept, over all these tensors together."""
        assert wanted.rule.ranks is not None
        numbers = sum(self.seed[name].numbers for name in names)
        wanted_ranks = [int(share * numbers) for share in wanted.rule.ranks(wanted.begins)]
        found: list[tuple[float, float]] = []
        for start in range(0, len(self.sources), 8):
            group = self.sources[start : start + 8]
            samples = [self._sample(one, names, numbers, reader) if numbers > 4 * BLOCK else None for one in group]
            kths = [[Kth(numbers, rank, sample) for rank in wanted_ranks] for sample in samples]
            while not all([one.settle() for pair in kths for one in pair]):  # noqa: C419  (each of them must look)
                for name in names:
                    self._push(name, group, kths, reader)
            found += [(low.found or 0.0, high.found if high.found is not None else np.inf) for low, high in kths]
        return found

    def _push(self, name: str, group: Sequence[Source], kths: Sequence[Sequence[Kth]], reader: Reader) -> None:
        """Show every magnitude of a tensor of these experts, whole, whatever part this pass is of."""
        place, whole = self.seed[name], self.part
        self.part = (0, 1)
        plan = list(self._plan(name, True, [group]))
        self.part = whole
        for (first, last, _, _), raws in zip(plan, reader.stream(step for *_, step in plan), strict=True):
            for at in range(0, last - first, BLOCK):
                end = min(last - first, at + BLOCK)
                seed_N = decode(raws[0][at * place.width : end * place.width], place.dtype).astype(np.float64)
                rest = iter(raws[1:])
                for one, pair in zip(group, kths, strict=True):
                    raw = next(rest) if isinstance(one, Whole) else None
                    magnitude_N = _magnitude(one, name, first + at, first + end, at, place, raw, seed_N)
                    for kth in pair:
                        kth.push(magnitude_N)

    def _sample(self, one: Source, names: Sequence[str], numbers: int, reader: Reader) -> Floats:
        """Magnitudes from strips evenly over the tensors."""
        strip, found = 1024, []
        for name in names:
            place = self.seed[name]
            count = max(1, SAMPLE * place.numbers // numbers // strip)
            for first in np.linspace(0, max(0, place.numbers - strip), count).astype(int).tolist():
                last = min(place.numbers, first + strip)
                seed_N = decode(reader.files.read(place, first, last), place.dtype).astype(np.float64)
                raw = None
                if isinstance(one, Whole):
                    known = one.reads(name, last)
                    raw = reader.files.read(one.places[name], min(first, known), known)
                found.append(_magnitude(one, name, first, last, 0, place, raw, seed_N))
        return np.concatenate(found)


def _numbers(
    one: Source, name: str, first: int, last: int, at: int, place: Place, raw: Any, seed_N: Floats | None
) -> tuple[Floats, Floats | None]:
    """What a linear rule adds: an expert's own numbers, or its delta; and the delta where that is the same."""
    if isinstance(one, Whole):
        mine = one.places[name]
        value_N = decode(raw[at * mine.width : (at + last - first) * mine.width], mine.dtype)
        if value_N.size < last - first:  # rows the expert does not have are the seed's
            assert seed_N is not None
            value_N = np.concatenate([value_N, seed_N[value_N.size :]])
        return value_N, None
    if not one.has(name):
        zero_N = np.zeros(last - first)
        return zero_N, zero_N
    delta_N = one.delta(name, first, last, place.shape[-1])
    return delta_N, delta_N


def _magnitude(one: Source, name: str, first: int, last: int, at: int, place: Place, raw: Any, seed_N: Floats) -> Floats:
    value_N, delta_N = _numbers(one, name, first, last, at, place, raw, seed_N)
    magnitude_N = np.abs(value_N - seed_N if delta_N is None else delta_N).astype(np.float32)
    _finite_reach(magnitude_N, one, name)  # a threshold among numbers that are none would never be found
    return magnitude_N


def _finite_reach(value_N: Floats, one: Source, name: str) -> float:
    """The largest magnitude. Raises BadInput for a number that is not finite."""
    largest = fixed.reach(value_N)
    if not largest < np.inf:
        raise BadInput(f"expert {one.digest[:8]}: {name} holds a number that is not finite: its training went astray; leave it out")
    return largest


def _joined(blocks: Sequence[fixed.Sum]) -> fixed.Ints:
    return blocks[0].close() if len(blocks) == 1 else np.concatenate([block.close() for block in blocks])


def _chance(digest: str, name: str, begins: Settings, first: int, count: int) -> Callable[[], Floats]:
    """Uniform numbers for a part of an expert's tensor: by what they are for, not by when they are drawn."""

    def draw() -> Floats:
        key = hashlib.sha256(f"{digest} {name} {begins.get('rng_seed', 0.0)}".encode()).digest()
        source = np.random.Philox(key=np.frombuffer(key[:16], np.uint64))
        source.advance(first // 4)  # four numbers to a step
        raw_N = source.random_raw(count + first % 4)[first % 4 :]
        return (raw_N >> np.uint64(11)) * 2.0**-53

    return draw
