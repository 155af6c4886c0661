"""The pass over the experts: each block of each tensor is read from all of them, and the sums of any number of rules come out.

N values of a block; E experts
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.merge.rules.base import Floats, Local, Rule, Settings, Total, chance
from elmwood.merge.rules.table import on
from elmwood.merge.statistics import ExpertStatistics
from elmwood.merge.sums.blocks import ALL, pieces_of, seed_values, share_of_tensors, span_of, step_of
from elmwood.merge.sums.inner_products import inner_products
from elmwood.merge.sums.thresholds import Cut, find_cuts
from elmwood.merge.sums.whole_tensor import TensorSum, sum_whole
from elmwood.weights import exact
from elmwood.weights.experts import Doubles, Source, Whole, delta, read_values
from elmwood.weights.tensors import BLOCK, PIECE, SIZES, ReadAhead, StoredTensor

GROUP = 32  # experts whose pieces stand in memory at once


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
    sums: list[list[Any]]  # [wanted][field] integers; nothing for those whose sums come with another piece of the tensor


class TensorRules(NamedTuple):
    """How one tensor is summed, for each of the wanted sums."""

    name: str
    rules: list[Rule]
    weights: list[Floats]  # of all experts
    cuts: list[list[Cut] | None]  # of all experts, where a rule trims
    seed: bool  # whether the seed's values are read

    @property
    def linear(self) -> bool:
        return all(rule.linear for rule in self.rules)


class Block(NamedTuple):
    """Sums of a block under way."""

    first: int
    at: int  # of its piece
    end: int
    sums: list[exact.Ints]  # [wanted] integers [F, block]; F is 0 for those whose sums come with another piece of the tensor


class Pass:
    """Reads experts of one seed. Weights are a function of the expert's place and the tensor's name."""

    def __init__(
        self,
        seed: Mapping[str, StoredTensor],
        sources: Sequence[Source],
        weight: Callable[[int, str], float],
        wanted: Sequence[Wanted],
        part: tuple[int, int] = ALL,
        progress: Progress = silent,
        statistics: Sequence[ExpertStatistics] = (),
    ):
        self.seed, self.sources, self.weight, self.wanted, self.part, self.progress = seed, sources, weight, wanted, part, progress
        self.statistics = statistics
        self.reach = [[0] * len(sources) for _ in wanted]  # the bound of what each expert added
        self.shares: list[dict[str, Floats]] = [{} for _ in wanted]  # weights that a rule chose, by tensor
        self.delta_N = np.empty(BLOCK)
        self.held = [np.empty((max(1, len(one.rule.fields)), PIECE), np.int64) for one in wanted]  # the sums of a piece, used again

    def names(self) -> list[str]:
        """Tensors that are merged: floating-point ones that some expert changes or has statistics of."""
        every = any(one.rule.needs for one in self.wanted)
        return [name for name, place in self.seed.items() if place.dtype in SIZES and (every or any(one.has(name) for one in self.sources))]

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
        names, order = self.names(), list(self.seed)
        spans = {name: span_of(self.seed[name].numbers, self.part) for name in names}
        total = sum(last - first for first, last in spans.values()) * max(1, len(self.sources))
        done = 0
        with ReadAhead(PIECE * 8) as reader:
            across = [self._cuts(one, names, reader) if one.rule.ranks and one.begins.get("across") else None for one in self.wanted]
            for name in names:
                whole = [number for number in range(len(self.wanted)) if self.rule(number, name).entire]
                if whole and share_of_tensors(order, name, self.part):
                    yield self._whole(name, whole, reader)
                if len(whole) < len(self.wanted):
                    for piece in self._tensor(self._rules(name, across, with_seed(name), reader), spans[name], reader):
                        done += (piece.last - piece.first) * len(self.sources)
                        self.progress("merge", done, total, "values")
                        yield piece
                else:
                    done += self.seed[name].numbers * len(self.sources)
                    self.progress("merge", min(done, total), total, "values")
        for reach in self.reach:
            exact.check_room(sum(reach))

    # ---- one tensor

    def _rules(self, name: str, across: Sequence[list[Cut] | None], with_seed: bool, reader: ReadAhead) -> TensorRules:
        """What must be known of a tensor before it is summed, for which it may be read before."""
        self._choose_weights(name, reader)
        cuts = [
            found if found or not one.rule.ranks else self._cuts(one, [name], reader)
            for one, found in zip(self.wanted, across, strict=True)
        ]
        count = range(len(self.wanted))
        rules, weights = [self.rule(number, name) for number in count], [self.weights(number, name) for number in count]
        return TensorRules(name, rules, weights, cuts, with_seed or self._needs_seed(name, rules))

    def _needs_seed(self, name: str, rules: Sequence[Rule]) -> bool:
        """Whether deltas of full experts are called for, which are differences from the seed."""
        numbers = self.seed[name].numbers
        full = [one for one in self.sources if isinstance(one, Whole)]
        return any(one.reads(name, numbers) < numbers for one in full) or (bool(full) and any(not rule.linear for rule in rules))

    def _tensor(self, how: TensorRules, span: tuple[int, int], reader: ReadAhead) -> Iterator[Piece]:
        here = [e for e, one in enumerate(self.sources) if one.has(how.name)]
        groups = [here[at : at + GROUP] for at in range(0, len(here), GROUP)] or [[]]  # nobody: another rule asks for this tensor
        seed = self.seed[how.name] if how.seed else None
        plan = [(*piece, group) for piece in pieces_of(span) for group in groups]
        steps = (step_of(how.name, seed, [self.sources[e] for e in group], first, last) for first, last, group in plan)
        totals: list[exact.Ints] = []
        for number, ((first, last, group), raws) in enumerate(zip(plan, reader.stream(steps), strict=True)):
            if number % len(groups) == 0:
                totals = self._begin(how, last - first)
            for at in range(0, last - first, BLOCK):
                end = min(last - first, at + BLOCK)
                self._block(how, Block(first + at, at, end, [total_FN[:, at:end] for total_FN in totals]), group, raws)
            if (number + 1) % len(groups) == 0:
                yield Piece(how.name, first, last, raws[0] if how.seed else None, [list(total_FN) for total_FN in totals])

    def _begin(self, how: TensorRules, count: int) -> list[exact.Ints]:
        """Sums of nothing, of a piece."""
        fields = [0 if rule.entire else len(rule.fields) for rule in how.rules]
        totals = [held_FN[:number, :count] for held_FN, number in zip(self.held, fields, strict=True)]
        for total_FN in totals:
            total_FN[:] = 0
        return totals

    def _block(self, how: TensorRules, block: Block, group: Sequence[int], raws: Sequence[Any]) -> None:
        """Add one block of some experts."""
        place, count, rest = self.seed[how.name], block.end - block.at, iter(raws[1:] if how.seed else raws)
        seed_N = seed_values(raws[0], place, block.at, block.end) if how.seed else None
        last = block.first + count
        for e in group:
            one = self.sources[e]
            raw = next(rest) if isinstance(one, Whole) else None
            value_N = read_values(one, how.name, block.first, last, place, raw, block.at, seed_N, bits=how.linear)
            delta_N: Doubles | None = None
            for number, (rule, total_FN) in enumerate(zip(how.rules, block.sums, strict=True)):
                weight = float(how.weights[number][e])
                if rule.entire or not (weight or rule.linear):  # at weight 0 a sum adds nothing, and still looks at the values
                    continue
                try:
                    if rule.linear:
                        reach = exact.add(total_FN[0], value_N, weight)
                    else:
                        if delta_N is None:
                            delta_N = delta(one, value_N, seed_N, self.delta_N[:count])
                        reach = self._add(how, number, e, block.first, delta_N, total_FN)
                except BadInput as error:
                    raise BadInput(f"expert {one.digest[:8]}: {how.name}: {error}; leave it out") from error
                self.reach[number][e] = max(self.reach[number][e], exact.bound(reach))

    def _add(self, how: TensorRules, number: int, e: int, first: int, delta_N: Doubles, total_FN: exact.Ints) -> float:
        """Add what a rule makes of a delta; the largest magnitude that was added."""
        rule, begins, weight = how.rules[number], self.wanted[number].begins, float(how.weights[number][e])
        cuts = how.cuts[number]
        low, high = cuts[e] if cuts else (0.0, np.inf)
        local = Local(low, high, chance(self.sources[e].digest, how.name, begins, first, len(delta_N)))
        (part_N,) = rule.part(delta_N, weight, local, begins)
        return exact.vote(total_FN, part_N, weight) if rule.ballot else exact.add(total_FN[0], part_N)

    def _whole(self, name: str, whole: Sequence[int], reader: ReadAhead) -> Piece:
        """The sums of those that look at a whole tensor."""
        asked = [TensorSum(self.rule(number, name), self.wanted[number].begins, self.weights(number, name)) for number in whole]
        raw, found, reach = sum_whole(name, self.seed[name], self.sources, asked, self.statistics, reader.files)
        sums: list[list[Any]] = [[] for _ in self.wanted]
        for number, mine, most in zip(whole, found, reach, strict=True):
            sums[number] = mine
            self.reach[number] = [max(pair) for pair in zip(self.reach[number], most, strict=True)]
        return Piece(name, 0, self.seed[name].numbers, raw, sums)

    # ---- what is read before

    def _choose_weights(self, name: str, reader: ReadAhead) -> None:
        """Let the rules that see experts as points of a sphere choose their weights, from one reading of the tensor."""
        asked = [(number, one) for number, one in enumerate(self.wanted) if one.rule.share]
        for whole in {not one.begins["deltas"] for _, one in asked}:
            inner_EE = inner_products(name, self.seed[name], self.sources, whole, reader)
            for number, one in asked:
                if whole == (not one.begins["deltas"]):
                    assert one.rule.share is not None
                    weight_E = np.array([self.weight(e, name) for e in range(len(self.sources))])
                    self.shares[number][name] = one.rule.share(inner_EE, weight_E, one.begins) if weight_E.any() else weight_E

    def _cuts(self, wanted: Wanted, names: Sequence[str], reader: ReadAhead) -> list[Cut]:
        """For each expert the magnitudes that are kept of these tensors together."""
        assert wanted.rule.ranks is not None
        return find_cuts(wanted.rule.ranks(wanted.begins), {name: self.seed[name] for name in names}, self.sources, reader)
