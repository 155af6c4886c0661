"""The pass over the experts: each block of each tensor is read from all of them, and the sums of any number of rules come out.

N numbers of a block; E experts
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.merge.rules.base import Local, Rule, Settings, Total
from elmwood.merge.rules.table import on
from elmwood.merge.statistics import Opened
from elmwood.merge.sums.kth import Kth
from elmwood.merge.sums.reading import chance, check_finite, numbers_of
from elmwood.merge.sums.whole_tensor import Asked, entire
from elmwood.weights import exact
from elmwood.weights.experts import Source, Whole
from elmwood.weights.tensors import BLOCK, PIECE, SIZES, Place, Reader, Request, decode

Floats = NDArray[np.floating[Any]]
GROUP = 32  # experts whose pieces stand in memory at once
SAMPLE, STRIP = 1 << 16, 1 << 12  # magnitudes that say about where a threshold lies, and how many of them stand side by side


class Wanted(NamedTuple):
    """One sum to be made: a rule and the settings that decide its state."""

    rule: Rule
    begins: Settings


class Piece(NamedTuple):
    """Sums over a part of a tensor; valid until the next piece is asked for."""

    name: str
    first: int
    last: int
    seed: NDArray[np.uint8] | None  # its bytes, where they were asked for
    sums: list[list[Any]]  # [wanted][key] whole numbers; nothing for those whose sums come with another piece of the tensor


class Block(NamedTuple):
    """Sums of a block under way."""

    name: str
    first: int
    at: int  # of its piece
    end: int
    sums: list[exact.Ints]  # [wanted] whole numbers [F, block]; F is 0 for those whose sums come with another piece of the tensor


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
        statistics: Sequence[Opened] = (),
    ):
        self.seed, self.sources, self.weight, self.wanted, self.part, self.progress = seed, sources, weight, wanted, part, progress
        self.statistics = statistics
        self.reach = [[0] * len(sources) for _ in wanted]  # the bound of what each expert added
        self.shares: list[dict[str, Floats]] = [{} for _ in wanted]  # weights that a rule chose, by tensor
        self.delta_N = np.empty(BLOCK)
        self.held = [np.empty((max(1, len(one.rule.fields)), PIECE), np.int64) for one in wanted]  # the sums of a piece, used again

    def names(self) -> list[str]:
        """Tensors that are merged: those of numbers, that some expert changes or has statistics of."""
        every = any(one.rule.needs for one in self.wanted)
        return [name for name, place in self.seed.items() if place.dtype in SIZES and (every or any(one.has(name) for one in self.sources))]

    def span(self, name: str) -> tuple[int, int]:
        """The numbers of a tensor that belong to this part of the work: whole blocks, in about equal shares."""
        numbers, (mine, of) = self.seed[name].numbers, self.part
        blocks = -(-numbers // BLOCK)
        return min(numbers, blocks * mine // of * BLOCK), min(numbers, blocks * (mine + 1) // of * BLOCK)

    def mine(self, name: str) -> bool:
        """Whether a tensor that is summed whole belongs to this part of the work."""
        return list(self.seed).index(name) % self.part[1] == self.part[0]

    def rule(self, number: int, name: str) -> Rule:
        """The rule that merges a tensor for one of the wanted sums."""
        return on(self.wanted[number].rule, name, self.seed[name].shape)

    def weights(self, number: int, name: str) -> Floats:
        """The weights of all experts in one of the sums."""
        chosen = self.shares[number].get(name)
        return np.array([self.weight(e, name) for e in range(len(self.sources))]) if chosen is None else chosen

    def total(self, number: int, name: str) -> Total:
        weight_E = self.weights(number, name)
        whole_E = np.array([one.whole for one in self.sources])
        return Total(*(float(value) for value in (weight_E.sum(), weight_E[whole_E].sum(), np.square(weight_E).sum())))

    def run(self, with_seed: Callable[[str], bool]) -> Iterator[Piece]:
        """The sums of every piece of every tensor; `with_seed` says where the seed's own bytes are asked for too. Raises BadInput."""
        names = self.names()
        total = sum(last - first for first, last in map(self.span, names)) * max(1, len(self.sources))
        done = 0
        with Reader(PIECE * 8) as reader:
            across = [self._cuts(one, names, reader) if one.begins.get("across") else None for one in self.wanted]
            for name in names:
                whole = {number for number in range(len(self.wanted)) if self.rule(number, name).entire}
                if whole and self.mine(name):
                    yield self._entire(name, whole, reader)
                if len(whole) < len(self.wanted):
                    self._share(name, reader)
                    cuts = [
                        found if found or not one.rule.ranks else self._cuts(one, [name], reader)
                        for one, found in zip(self.wanted, across, strict=True)
                    ]
                    for piece in self._tensor(name, cuts, reader, with_seed(name)):
                        done += (piece.last - piece.first) * len(self.sources)
                        self.progress("merge", done, total, "numbers")
                        yield piece
                else:
                    done += self.seed[name].numbers * len(self.sources)
                    self.progress("merge", min(done, total), total, "numbers")
        for reach in self.reach:
            exact.check_room(sum(reach))

    # ---- one tensor

    def _needs_seed(self, name: str) -> bool:
        """Whether deltas of full experts are called for, which are differences from the seed."""
        numbers = self.seed[name].numbers
        full = [one for one in self.sources if isinstance(one, Whole)]
        return any(one.reads(name, numbers) < numbers for one in full) or (
            bool(full) and any(not self.rule(number, name).linear for number in range(len(self.wanted)))
        )

    def _plan(self, name: str, seed: bool, groups: Sequence[Sequence[Source]]) -> Iterator[tuple[int, int, int, list[Request]]]:
        """(first, last, group, what to read) for each step."""
        start, stop = self.span(name)
        for first in range(start, stop, PIECE):
            last = min(stop, first + PIECE)
            for number, group in enumerate(groups):
                yield first, last, number, self._step(name, first, last, seed, group)

    def _step(self, name: str, first: int, last: int, seed: bool, group: Sequence[Source]) -> list[Request]:
        """The numbers of the seed, where they are called for, and of those that are full experts."""
        step: list[Request] = [(self.seed[name], first, last)] if seed else []
        for one in group:
            if isinstance(one, Whole):
                known = one.reads(name, last)
                step.append((one.places[name], min(first, known), known))
        return step

    def _tensor(self, name: str, cuts: Sequence[Any], reader: Reader, with_seed: bool) -> Iterator[Piece]:
        seed = with_seed or self._needs_seed(name)
        places = [e for e, one in enumerate(self.sources) if one.has(name)]
        groups = [places[at : at + GROUP] for at in range(0, len(places), GROUP)] or [[]]  # nobody: another rule asks for this tensor
        rules = [self.rule(number, name) for number in range(len(self.wanted))]
        weights = [self.weights(number, name) for number in range(len(self.wanted))]
        plan = list(self._plan(name, seed, [[self.sources[e] for e in group] for group in groups]))
        totals: list[exact.Ints] = []
        blocks: list[Block] = []
        for (first, last, number, _), raws in zip(plan, reader.stream(step for *_, step in plan), strict=True):
            if number == 0:
                fields = [0 if rule.entire else len(rule.fields) for rule in rules]
                totals = [held_FN[:count, : last - first] for held_FN, count in zip(self.held, fields, strict=True)]
                for total_FN in totals:
                    total_FN[:] = 0
                blocks = [
                    Block(name, first + at, at, end := min(last - first, at + BLOCK), [total_FN[:, at:end] for total_FN in totals])
                    for at in range(0, last - first, BLOCK)
                ]
            for block in blocks:
                self._block(block, groups[number], raws, seed, rules, weights, cuts)
            if number == len(groups) - 1:
                yield Piece(name, first, last, raws[0] if seed else None, [list(total_FN) for total_FN in totals])

    def _block(
        self, block: Block, group: Sequence[int], raws: Sequence[Any], seed: bool, rules: Sequence[Rule], weights: Sequence[Floats],
        cuts: Sequence[Any],
    ) -> None:  # fmt: skip
        """Add one block of some experts."""
        name, first, at, end, sums = block
        place, count = self.seed[name], end - at
        seed_N = decode(raws[0][at * place.width : end * place.width], place.dtype).astype(np.float64) if seed else None
        rest = iter(raws[1:] if seed else raws)
        linear = all(rule.linear for rule in rules)
        for e in group:
            one = self.sources[e]
            raw = next(rest) if isinstance(one, Whole) else None
            value_N, delta_N = numbers_of(one, name, first, first + count, at, place, raw, seed_N, bits=linear)
            for number, (wanted, rule, total_FN) in enumerate(zip(self.wanted, rules, sums, strict=True)):
                weight = float(weights[number][e])
                if rule.entire or not (weight or rule.linear):  # at weight 0 a sum adds nothing, and still looks at the numbers
                    continue
                try:
                    if rule.linear:
                        reach = exact.add(total_FN[0], value_N, weight)
                    else:
                        if delta_N is None:
                            delta_N = (
                                np.subtract(value_N, seed_N, out=self.delta_N[:count]) if one.whole and seed_N is not None else value_N
                            )
                        low, high = cuts[number][e] if cuts[number] else (0.0, np.inf)
                        local = Local(low, high, chance(one.digest, name, wanted.begins, first, count))
                        (part_N,) = rule.part(delta_N, weight, local, wanted.begins)
                        reach = exact.vote(total_FN, part_N, weight) if rule.ballot else exact.add(total_FN[0], part_N)
                except BadInput as error:
                    raise BadInput(f"expert {one.digest[:8]}: {name}: {error}; leave it out") from error
                self.reach[number][e] = max(self.reach[number][e], exact.bound(reach))

    def _entire(self, name: str, whole: set[int], reader: Reader) -> Piece:
        """The sums of those that look at a whole tensor."""
        asked = [Asked(self.rule(number, name), self.wanted[number].begins, self.weights(number, name)) for number in sorted(whole)]
        raw, found, reach = entire(name, self.seed[name], self.sources, asked, self.statistics, reader.files)
        sums: list[list[Any]] = [[] for _ in self.wanted]
        for number, mine, most in zip(sorted(whole), found, reach, strict=True):
            sums[number] = mine
            self.reach[number] = [max(pair) for pair in zip(self.reach[number], most, strict=True)]
        return Piece(name, 0, self.seed[name].numbers, raw, sums)

    # ---- inner products

    def _share(self, name: str, reader: Reader) -> None:
        """Let the rules that see experts as points of a sphere choose their weights, from one reading of the tensor."""
        asked = [(number, one) for number, one in enumerate(self.wanted) if one.rule.share]
        for whole in {not one.begins["deltas"] for _, one in asked}:
            inner_EE = self._inner(name, whole, reader)
            for number, one in asked:
                if whole == (not one.begins["deltas"]):
                    assert one.rule.share is not None
                    weight_E = np.array([self.weight(e, name) for e in range(len(self.sources))])
                    self.shares[number][name] = one.rule.share(inner_EE, weight_E, one.begins) if weight_E.any() else weight_E

    def _inner(self, name: str, whole: bool, reader: Reader) -> Floats:
        """Inner products [E, E] of the experts' deltas, or of their weights as they are. One more reading, pieces of all in memory."""
        place, count = self.seed[name], len(self.sources)
        found: dict[tuple[int, int], list[float]] = {(i, j): [] for i in range(count) for j in range(i + 1)}
        part, self.part = self.part, (0, 1)
        plan = list(self._plan(name, True, [self.sources]))
        self.part = part
        for (first, last, _, _), raws in zip(plan, reader.stream(step for *_, step in plan), strict=True):
            for at in range(0, last - first, BLOCK):
                end = min(last - first, at + BLOCK)
                seed_N = decode(raws[0][at * place.width : end * place.width], place.dtype).astype(np.float64)
                rest, point_EN = iter(raws[1:]), []
                for one in self.sources:
                    raw = next(rest) if isinstance(one, Whole) else None
                    value_N, delta_N = numbers_of(one, name, first + at, first + end, at, place, raw, seed_N)
                    check_finite(value_N, one, name)
                    delta_N = value_N.astype(np.float64) - seed_N if delta_N is None else delta_N
                    point_EN.append(delta_N + seed_N if whole else delta_N)
                for (i, j), sums in found.items():
                    sums.append(exact.block_inner(point_EN[i], point_EN[j]))
        inner_EE = np.zeros((count, count))
        for (i, j), sums in found.items():
            inner_EE[i, j] = inner_EE[j, i] = math.fsum(sums)
        return inner_EE

    # ---- thresholds

    def _cuts(self, wanted: Wanted, names: Sequence[str], reader: Reader) -> list[tuple[float, float]]:
        """For each expert the magnitudes between which numbers are kept, over all these tensors together."""
        assert wanted.rule.ranks is not None
        numbers = sum(self.seed[name].numbers for name in names)
        wanted_ranks = [int(share * numbers) for share in wanted.rule.ranks(wanted.begins)]
        found: list[tuple[float, float]] = []
        for start in range(0, len(self.sources), 8):
            group = self.sources[start : start + 8]
            samples = self._samples(group, names, numbers, reader) if numbers > 4 * BLOCK else [None] * len(group)
            kths = [[Kth(numbers, rank, sample) for rank in wanted_ranks] for sample in samples]
            while any(one.found is None for pair in kths for one in pair):
                for name in names:
                    self._push(name, group, kths, reader)
                for one in (one for pair in kths for one in pair):
                    one.settle()
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

    def _samples(self, group: Sequence[Source], names: Sequence[str], numbers: int, reader: Reader) -> list[Floats | None]:
        """Magnitudes of each expert, from strips evenly over the tensors."""
        found: list[list[Floats]] = [[] for _ in group]
        for name in names:
            place = self.seed[name]
            count = max(1, max(SAMPLE, numbers >> 8) * place.numbers // numbers // STRIP)  # what a window holds grows with the root alone
            firsts = np.linspace(0, max(0, place.numbers - STRIP), count).astype(int).tolist()
            strips = [(first, min(place.numbers, first + STRIP)) for first in firsts]
            plan = [self._step(name, *strip, True, group) for strip in strips]
            for (first, last), raws in zip(strips, reader.stream(plan), strict=True):
                seed_N = decode(raws[0], place.dtype).astype(np.float64)
                rest = iter(raws[1:])
                for one, mine in zip(group, found, strict=True):
                    raw = next(rest) if isinstance(one, Whole) else None
                    mine.append(_magnitude(one, name, first, last, 0, place, raw, seed_N))
        return [np.concatenate(mine) for mine in found]


def _magnitude(one: Source, name: str, first: int, last: int, at: int, place: Place, raw: Any, seed_N: Floats) -> Floats:
    value_N, delta_N = numbers_of(one, name, first, last, at, place, raw, seed_N)
    magnitude_N = np.subtract(value_N, seed_N) if delta_N is None else delta_N
    magnitude_N = np.abs(magnitude_N, out=magnitude_N if delta_N is None else None)
    check_finite(magnitude_N, one, name)  # a threshold among numbers that are none would never be found
    return magnitude_N
