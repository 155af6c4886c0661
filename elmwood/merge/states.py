"""Merges as values: states of experts, their sums and differences.

N values of a piece of one tensor
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmwood.corpus.tokens import same_tokenizer
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, ForeignExpert
from elmwood.lm.files import seed_folder
from elmwood.merge.layer_weights import depth_of, plain_weights, weight_of
from elmwood.merge.rules.base import Rule, Settings
from elmwood.merge.rules.table import RULES, Rules, code_of, on, settle
from elmwood.merge.statistics import ExpertStatistics, check_scales, find_statistics
from elmwood.merge.sums.blocks import ALL, share_of_tensors, span_of
from elmwood.merge.sums.stream import Pass, Wanted
from elmwood.records import Contribution, Expert, Seed, Share, State, Statistics, fingerprint
from elmwood.store import Store
from elmwood.weights import exact
from elmwood.weights.experts import Low, Source, Whole, seed_places
from elmwood.weights.tensors import PIECE, SIZES, Files, StoredTensor, pack_header, places

SUMS = "sums.safetensors"
Weights = tuple[Share, ...]


# ---- opened -----------------------------------------------------------------------------------------------------


def open_expert(expert: Expert, seed: Seed, tensors: dict[str, StoredTensor], store: Store, resize: bool = False) -> Source:
    """Raises ForeignExpert, BadInput, Damaged."""
    if expert.seed != seed.digest:
        raise ForeignExpert(
            f"expert {expert.digest[:8]} grew from seed {expert.seed[:8]}, not from {seed.digest[:8]} ({seed.name}): a merge needs one seed"
        )
    if expert.recipe.method == "dora":
        raise BadInput(f"expert {expert.digest[:8]} is weight-decomposed: what it adds is no product B A; train it with --method lora")
    folder = store.folder(expert.files)
    if expert.recipe.method != "full":
        return Low(expert.digest, folder, tensors)
    mine, its = expert.files.get("tokenizer.json"), seed.files.get("tokenizer.json")
    if mine and its and not resize and not same_tokenizer(store.get(mine), seed_folder(seed, store) / "tokenizer.json"):
        raise BadInput(
            f"expert {expert.digest[:8]} has another tokenizer than its seed: with --resize the rows they share are merged as they are"
        )
    return Whole(expert.digest, folder, tensors, resize)


def open_all(
    seed: Seed, members: Mapping[str, Weights], store: Store, resize: bool
) -> tuple[dict[str, StoredTensor], list[Source], list[Weights]]:
    """Tensors of the seed, and the experts by digest with their weights."""
    tensors = seed_places(seed, store)
    sources = [open_expert(store.load(digest, Expert), seed, tensors, store, resize) for digest in sorted(members)]
    return tensors, sources, [members[one.digest] for one in sources]


def open_pass(
    tensors: dict[str, StoredTensor], sources: Sequence[Source], weights: Sequence[Weights], wanted: Sequence[Wanted],
    part: tuple[int, int], store: Store, progress: Progress,
) -> Pass:  # fmt: skip
    """Raises BadInput where a rule needs statistics that some expert has not left."""
    depth = depth_of(tensors)
    left = statistics_of(any(one.rule.needs for one in wanted), [one.digest for one in sources], store)
    statistics = [ExpertStatistics(store.load(left[one.digest], Statistics), store) for one in sources] if left else []
    return Pass(tensors, sources, lambda e, name: weight_of(weights[e], name, depth), wanted, part, progress, statistics)


def contributions(
    sources: Sequence[Source], weights: Sequence[Weights], reach: Sequence[int], left: Mapping[str, str]
) -> tuple[Contribution, ...]:  # fmt: skip
    rows = zip(sources, weights, reach, strict=True)
    return tuple(
        Contribution(expert=one.digest, weight=weight, whole=one.whole, reach=most, statistics=left.get(one.digest))
        for one, weight, most in rows
    )


def statistics_of(needed: bool, members: Iterable[str], store: Store) -> dict[str, str]:
    """Expert -> its statistics, where they are needed. Raises BadInput where some are absent."""
    found = {digest: find_statistics(digest, store) for digest in sorted(members)} if needed else {}
    check_scales(found, store)
    return {expert: one.digest for expert, one in found.items()}


@contextmanager
def hold(keys: Sequence[str], store: Store, progress: Progress = silent) -> Iterator[None]:
    """Tasks held by one process at a time, as `Store.held`; in one order, so that two processes never wait for one another."""
    with ExitStack() as stack:
        for key in sorted(set(keys)):
            stack.enter_context(store.held(key, progress))
        yield


# ---- states -----------------------------------------------------------------------------------------------------


def state(
    seed: Seed, members: Mapping[str, Weights], method: str, settings: Settings, store: Store,
    part: tuple[int, int] = ALL, progress: Progress = silent, rules: Rules = RULES,
) -> State:  # fmt: skip
    """The sum of one expert or more: expert's digest -> weight. Raises ForeignExpert, BadInput, UnknownName."""
    rule, begins, _ = settle(method, settings, rules)
    fields = {"seed": seed.digest, "method": method, "settings": begins, "part": part}
    plain = plain_weights(members)
    left = statistics_of(bool(rule.needs), members, store)
    key = fingerprint("state", seed, method, begins, part, plain, *([left] if left else []), *code_of(method, rules))
    with store.held(key, progress):
        if done := store.done(key):
            return store.load(done, State)
        tensors, sources, weights = open_all(seed, members, store, False)
        if not rule.sums:
            made = State(**fields, contributions=contributions(sources, weights, [0] * len(sources), left), files={})
            store.finish(key, made)
            return made
        work = open_pass(tensors, sources, weights, [Wanted(rule, begins)], part, store, progress)
        layout = layout_of(rule, tensors, work.names(), part)

        def pieces() -> Iterator[tuple[str, int, exact.Ints]]:
            for piece in work.run(lambda name: False):
                mine = on(rule, piece.name, tensors[piece.name].shape)
                at = 0 if mine.entire else piece.first - span_of(tensors[piece.name].numbers, part)[0]
                yield from ((f"{piece.name}|{field}", at, sum_N) for field, sum_N in zip(mine.stored(), piece.sums[0], strict=True))

        files = _write_sums(store, key, layout, pieces())
        made = State(**fields, contributions=contributions(sources, weights, work.reach[0], left), files=files)
        store.finish(key, made)
        return made


def layout_of(rule: Rule, tensors: Mapping[str, StoredTensor], names: Iterable[str], part: tuple[int, int]) -> dict[str, int]:
    """The sums of a part of a state, by name, with the number of their values."""
    layout: dict[str, int] = {}
    order = list(tensors)
    for name in names:
        shape = tensors[name].shape
        mine = on(rule, name, shape)
        first, last = span_of(tensors[name].numbers, part)
        sizes = [math.prod(size) for size in mine.sizes(shape) for _ in "ab"] if mine.entire else [last - first] * len(mine.fields)
        if not mine.entire or share_of_tensors(order, name, part):
            layout |= {f"{name}|{field}": size for field, size in zip(mine.stored(), sizes, strict=True)}
    return layout


def check(one: State, store: Store, rules: Rules = RULES) -> None:
    """Look at a state that somebody else made: whether its sums are those of its rule and seed, and within the bounds that its
    contributions give, so that nothing overflows later. Reads it all. Raises BadInput, ForeignExpert, UnknownName."""
    held = sum_places(one, store) if one.files else {}
    check_layout(one, held, store, rules)
    check_sums(one, held, store, rules)


def check_layout(one: State, held: Mapping[str, StoredTensor], store: Store, rules: Rules = RULES) -> None:
    """Whether a state has the tensors of its rule and seed; only the header of its file is read. Raises as `check`."""
    rule, begins, _ = settle(one.method, one.settings, rules)
    if begins != one.settings or not 0 <= one.part[0] < one.part[1]:
        raise BadInput(f"this state of {one.method} has the settings {one.settings} and the part {one.part}: none that elmwood makes")
    experts = [row.expert for row in one.contributions]
    if experts != sorted(set(experts)):
        raise BadInput("this state names an expert twice, or its experts in another order than elmwood's: do not use it")
    if set(one.files) != ({SUMS} if rule.sums else set()):
        raise BadInput(f"this state of {one.method} has the files {sorted(one.files)}, which is not what elmwood makes: do not use it")
    if not rule.sums:
        return
    tensors = seed_places(store.load(one.seed, Seed), store)
    names = {key.rpartition("|")[0] for key in held}
    if strange := sorted(name for name in names if name not in tensors or tensors[name].dtype not in SIZES):
        raise ForeignExpert(f"this state sums {strange[0]!r}, which its seed does not have: ask for the state of this seed")
    if rule.needs or any(row.whole for row in one.contributions):  # only adapters leave tensors out
        names = {name for name, place in tensors.items() if place.dtype in SIZES}
    wanted = layout_of(rule, tensors, names, one.part)
    found = {key: place.numbers if place.dtype == "I64" else -1 for key, place in held.items()}
    if wrong := sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)):
        raise BadInput(f"this state holds no sums of {wrong[0]!r} as {one.method} makes them for this seed: do not use it")
    exact.check_room(sum(row.reach for row in one.contributions))


def check_sums(one: State, held: Mapping[str, StoredTensor], store: Store, rules: Rules = RULES) -> None:
    """Whether the sums of a state are within the bounds that its contributions give. Raises BadInput."""
    rule, tensors = settle(one.method, one.settings, rules)[0], seed_places(store.load(one.seed, Seed), store)
    together, files = sum(row.reach for row in one.contributions), Files()
    for key, place in held.items():
        name, _, field = key.rpartition("|")
        if field.endswith(".low"):  # what is left of the value beside it
            continue
        entire = on(rule, name, tensors[name].shape).entire
        most = together * (exact.WIDER << exact.HIGH if entire else 1 << exact.BITS)
        for first in range(0, place.numbers, PIECE):
            sum_N = files.read(place, first, min(place.numbers, first + PIECE)).view(np.int64)
            if max(int(sum_N.max()), -int(sum_N.min())) > most:
                raise BadInput(f"this state's sums of {name} are larger than its contributions can be: do not use it")
    files.close()


def add(one: State, other: State, store: Store, rules: Rules = RULES) -> State:
    """The sum of both. What one of them holds already is not added again. Raises BadInput, ForeignExpert."""
    check_alike(one, other)
    left, right = ({c.expert: c for c in each.contributions} for each in (one, other))
    shared = left.keys() & right.keys()
    if differing := [digest for digest in shared if left[digest] != right[digest]]:
        raise BadInput(f"expert {differing[0][:8]} is in both states with different weights: remove it from one of them first")
    if shared == right.keys() or shared == left.keys():  # delivered again
        return one if shared == right.keys() else other
    if shared:
        raise BadInput(f"both states hold expert {sorted(shared)[0][:8]}, and each holds others: remove it from one of them first")
    both = tuple((left | right)[digest] for digest in sorted(left.keys() | right.keys()))
    return _combine(one, other, both, store, np.add, rules)


def remove(one: State, expert: str, store: Store, progress: Progress = silent, rules: Rules = RULES) -> State:
    """The sum without an expert, as if it had never been there. Needs the expert's files. Raises BadInput."""
    row = next((c for c in one.contributions if c.expert == expert), None)
    if row is None:
        raise BadInput(f"expert {expert[:8]} is not in this state; `elmwood show` lists what is")
    if len(one.contributions) == 1:
        raise BadInput(f"expert {expert[:8]} is the only one in this state: nothing would be left")
    alone = state(store.load(one.seed, Seed), {expert: row.weight}, one.method, one.settings, store, one.part, progress, rules)
    if alone.contributions != (row,):
        raise BadInput(f"expert {expert[:8]} has other statistics now than when it was added: sum the others anew")
    rest = tuple(c for c in one.contributions if c.expert != expert)
    return _combine(one, alone, rest, store, np.subtract, rules)


def check_alike(one: State, other: State) -> None:
    for field in ("seed", "method", "settings", "part"):
        if getattr(one, field) != getattr(other, field):
            kind = ForeignExpert if field == "seed" else BadInput
            raise kind(f"states of different {field} do not add: {getattr(one, field)} and {getattr(other, field)}; make one of them again")


def _combine(
    one: State, other: State, rows: tuple[Contribution, ...], store: Store, combine: Callable[..., Any], rules: Rules
) -> State:  # fmt: skip
    exact.check_room(sum(row.reach for row in rows))
    key = fingerprint("states", one, other, combine.__name__)
    with store.held(key):
        if done := store.done(key):
            return store.load(done, State)
        rule = settle(one.method, one.settings, rules)[0]
        if not rule.sums:  # the set of experts is all there is
            made = one.model_copy(update={"contributions": rows})
            store.finish(key, made)
            return made
        mine, its = sum_places(one, store), sum_places(other, store)
        # a tensor that no expert of a state changes is not in it: it counts as zero
        layout = {key: place.numbers for key, place in (mine | its).items()}
        names = {key.rpartition("|")[0] for key in layout}
        changed = names if combine is np.add or rule.needs else _changed_tensors(rows, names, store)
        layout = {key: numbers for key, numbers in layout.items() if key.rpartition("|")[0] in changed}
        files = Files()

        def read(held: dict[str, StoredTensor], key: str, first: int, last: int) -> NDArray[np.int64]:
            return files.read(held[key], first, last).view(np.int64) if key in held else np.zeros(last - first, np.int64)

        def pieces() -> Iterator[tuple[str, int, exact.Ints]]:
            for key, numbers in layout.items():
                for first in range(0, numbers, PIECE):
                    last = min(numbers, first + PIECE)
                    yield key, first, combine(read(mine, key, first, last), read(its, key, first, last))

        written = _write_sums(store, key, layout, pieces())
        files.close()
        made = one.model_copy(update={"contributions": rows, "files": written})
        store.finish(key, made)
        return made


def _changed_tensors(rows: tuple[Contribution, ...], names: set[str], store: Store) -> set[str]:
    """The tensors that these experts change."""
    changed: set[str] = set()
    for row in rows:
        if row.whole:
            return names
        expert = store.load(row.expert, Expert)
        folder = store.folder(expert.files)
        seed = seed_places(store.load(expert.seed, Seed), store)
        changed |= set(Low(row.expert, folder, seed).factors)
    return changed


def sum_places(one: State, store: Store) -> dict[str, StoredTensor]:
    return places([store.folder(one.files) / SUMS])


def _write_sums(store: Store, key: str, layout: Mapping[str, int], pieces: Iterator[tuple[str, int, exact.Ints]]) -> dict[str, str]:
    """The file of a state, tensors and their fields in the order of their names."""
    entries = [(name, "I64", (layout[name],), 8 * layout[name]) for name in sorted(layout)]
    top = pack_header(entries, {"format": "elmwood-state", "unit": "2^-44"})
    path = store.work(key) / SUMS
    with path.open("wb") as file:
        file.write(top)
    starts = _starts(entries, len(top))
    with path.open("r+b") as file:
        file.truncate(len(top) + sum(size for *_, size in entries))
        for name, first, sum_N in pieces:
            os.pwrite(file.fileno(), sum_N.tobytes(), starts[name] + 8 * first)
    return {SUMS: store.take(path)}


def _starts(entries: Sequence[tuple[str, str, tuple[int, ...], int]], begin: int) -> dict[str, int]:
    found = {}
    for name, _, _, size in entries:
        found[name] = begin
        begin += size
    return found
