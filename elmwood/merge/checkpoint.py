"""Checkpoints: of many experts in one reading, or of states.

N values of a piece of one tensor
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.lm.files import seed_folder
from elmwood.merge.export.card import EXACT, KERNELS, card
from elmwood.merge.layer_weights import check_weights, depth_of, layer_name, plain_weights, weight_of
from elmwood.merge.rules.base import REVISION, Floats, Rule, Settings, Total
from elmwood.merge.rules.table import RULES, Rules, code_of, on, settle
from elmwood.merge.states import Weights, check_alike, contributions, hold, open_all, open_pass, statistics_of, sum_places
from elmwood.merge.sums.blocks import ALL, span_of
from elmwood.merge.sums.stream import Pass, Piece, Wanted
from elmwood.records import Contribution, Merged, Seed, State, fingerprint
from elmwood.store import Store
from elmwood.weights import exact
from elmwood.weights.experts import seed_places
from elmwood.weights.tensors import PIECE, SIZES, Bytes, Files, StoredTensor, Twin, decode, encode_finite, places


class Answer(NamedTuple):
    """A checkpoint to be made: a rule with all its settings, given or by default."""

    method: str
    settings: Settings


# ---- checkpoints ------------------------------------------------------------------------------------------------


def merge(
    seed: Seed, members: Mapping[str, Weights], answers: Sequence[Answer], store: Store, resize: bool = False,
    progress: Progress = silent, rules: Rules = RULES,
) -> list[Merged]:  # fmt: skip
    """One reading of the experts, a checkpoint for each answer. Raises ForeignExpert, BadInput, UnknownName."""
    if len(members) < 2:
        raise BadInput("a merge takes two experts or more; one alone is exported as it is: `elmwood export`")
    plain = plain_weights(members)
    settled = [settle(*answer, rules) for answer in answers]
    left = statistics_of(any(rule.needs for rule, _, _ in settled), members, store)
    keys = [
        fingerprint(
            "merge", REVISION, seed, plain, a.method, begins, ends, resize, *([left] if rule.needs else []), *code_of(a.method, rules)
        )
        for a, (rule, begins, ends) in zip(answers, settled, strict=True)
    ]
    with hold(keys, store, progress):
        if all(store.done(key) for key in keys):
            return [store.load(store.done(key) or "", Merged) for key in keys]
        tensors, sources, weights = open_all(seed, members, store, resize)
        wanted: list[Wanted] = []
        for rule, begins, _ in settled:
            if Wanted(rule, begins) not in wanted:
                wanted.append(Wanted(rule, begins))
        work = open_pass(tensors, sources, weights, wanted, ALL, store, progress)
        names, depth = work.names(), depth_of(tensors)
        for answer, (rule, begins, ends) in zip(answers, settled, strict=True):
            check_weights(rule, answer.method, begins | ends, weights, names, depth)
        twins = [Twin(tensors, store.work(key) / "out", names) for key in keys]
        places = _write(work, settled, twins)
        made = []
        for answer, (rule, begins, ends), key, place, twin in zip(answers, settled, keys, places, twins, strict=True):
            rows = contributions(sources, weights, work.reach[place], left if rule.needs else {})
            made.append(_store(seed, answer.method, rule, begins | ends, rows, twin, store))
            store.finish(key, made[-1])
        return made


def _write(work: Pass, settled: Sequence[tuple[Rule, dict[str, float], dict[str, float]]], twins: Sequence[Twin]) -> list[int]:
    """Finish the sums of a pass into a twin for each answer; the place of each answer's sums among those of the pass."""
    places = [work.wanted.index(Wanted(rule, begins)) for rule, begins, _ in settled]
    finishers = [
        Finisher(rule, begins | ends, dict(work.seed), partial(work.total, place), twin)
        for (rule, begins, ends), place, twin in zip(settled, places, twins, strict=True)
    ]
    for piece in work.run(lambda name: any(one.with_seed(name) for one in finishers)):
        for place, one in zip(places, finishers, strict=True):
            if piece.sums[place]:
                one.write(piece, piece.sums[place])
    return places


def finalize(
    states: Sequence[State], settings: Settings, store: Store, progress: Progress = silent, rules: Rules = RULES
) -> Merged:  # fmt: skip
    """The checkpoint of a state, or of all the parts of one. Raises BadInput."""
    first = states[0]
    _check_parts(states)
    rule, begins, ends = settle(first.method, {**first.settings, **settings}, rules)
    if begins != first.settings:
        raise BadInput(f"{sorted(set(settings) & set(begins))} decided this state when it was made: make the state again to change them")
    seed = store.load(first.seed, Seed)
    key = fingerprint("finalize", REVISION, *sorted(one.digest for one in states), ends, *code_of(first.method, rules))
    with store.held(key, progress):
        if done := store.done(key):
            return store.load(done, Merged)
        if rule.sums:
            made = _finish_sums(states, rule, begins | ends, seed, store.work(key) / "out", store)
        else:  # its experts are looked at together, and now
            members = {c.expert: c.weight for c in first.contributions}
            (made,) = merge(seed, members, [Answer(first.method, begins | ends)], store, False, progress, rules)
        store.finish(key, made)
        return made


def _check_parts(states: Sequence[State]) -> None:
    """Raises BadInput where these are not all the parts of one state."""
    first = states[0]
    for other in states[1:]:
        check_alike(first, other.model_copy(update={"part": first.part}))
        if {c.expert: c.weight for c in other.contributions} != {c.expert: c.weight for c in first.contributions}:
            raise BadInput("the parts of a state must be of the same experts and weights: add the missing ones with `elmwood state add`")
    parts = sorted({one.part for one in states})
    if len(parts) != len(states) or parts != [(i, len(parts)) for i in range(len(parts))]:
        raise BadInput(f"these are the parts {parts}; a checkpoint needs each of them once: name them all")
    if len(first.contributions) < 2:
        raise BadInput("a merge takes two experts or more, this state holds one: add others first")


def _finish_sums(states: Sequence[State], rule: Rule, settings: dict[str, float], seed: Seed, folder: Path, store: Store) -> Merged:
    """The checkpoint of the sums of all parts."""
    first, tensors = states[0], seed_places(seed, store)
    held = [(one, sum_places(one, store)) for one in sorted(states, key=lambda one: one.part)]
    summed = {key.rpartition("|")[0] for _, found in held for key in found}
    check_weights(rule, first.method, settings, [row.weight for row in first.contributions], summed, depth_of(tensors))
    twin = Twin(tensors, folder, summed)
    finisher, files = Finisher(rule, settings, tensors, _totals_of(first, tensors), twin), Files()
    for name in (name for name in tensors if name in summed):
        mine = on(rule, name, tensors[name].shape)
        keys = [f"{name}|{field}" for field in mine.stored()]
        for one, found in held:
            if keys[0] not in found:  # it is whole in another part
                continue
            begin, end = span_of(tensors[name].numbers, ALL if mine.entire else one.part)
            for start in range(begin, end, end - begin if mine.entire else PIECE):
                stop = end if mine.entire else min(end, start + PIECE)
                size = {key: found[key].numbers if mine.entire else stop - start for key in keys}
                sums = [files.read(found[key], start - begin, start - begin + size[key]).view(np.int64) for key in keys]
                seed_raw = files.read(tensors[name], start, stop) if finisher.with_seed(name) else None
                finisher.write(Piece(name, start, stop, seed_raw, []), sums)
    files.close()
    rows = tuple(
        row.model_copy(update={"reach": max(c.reach for one in states for c in one.contributions if c.expert == row.expert)})
        for row in first.contributions
    )
    return _store(seed, first.method, rule, settings, rows, twin, store)


def assemble(choice: Mapping[str, Merged], store: Store) -> Merged:
    """A checkpoint whose layers ("0", "1", …, "outside") come from several merges of the same experts. Raises BadInput."""
    first = next(iter(choice.values()))
    if any(
        (one.seed, {c.expert for c in one.contributions}) != (first.seed, {c.expert for c in first.contributions})
        for one in choice.values()
    ):
        raise BadInput("layers are chosen among merges of the same experts of one seed: merge them anew")
    layers = {layer: one.digest for layer, one in sorted(choice.items())}
    key = fingerprint("assemble", layers)
    with store.held(key):
        if done := store.done(key):
            return store.load(done, Merged)
        seed = store.load(first.seed, Seed)
        tensors, files = seed_places(seed, store), Files()
        held = {layer: places(sorted(store.folder(one.files).glob("*.safetensors"))) for layer, one in choice.items()}
        chosen = [name for name, place in tensors.items() if layer_name(name) in held and place.dtype in SIZES]
        twin = Twin(tensors, store.work(key) / "out", chosen)
        for name in chosen:
            place, mine = tensors[name], held[layer_name(name)][name]
            for start in range(0, place.numbers, PIECE):
                twin.put(place, start, files.read(mine, start, min(place.numbers, start + PIECE)))
        files.close()
        rows = tuple(row.model_copy(update={"statistics": None, "reach": 0}) for row in first.contributions)
        made = _store(seed, "by_layer", None, {}, rows, twin, store).model_copy(update={"layers": layers})
        store.finish(key, made)
        return made


def _totals_of(one: State, tensors: dict[str, StoredTensor]) -> Callable[[str], Total]:
    depth = depth_of(tensors)

    def total(name: str) -> Total:
        weights = [(weight_of(c.weight, name, depth), c.whole) for c in one.contributions]
        return Total(
            sum(weight for weight, _ in weights), sum(weight for weight, whole in weights if whole), sum(weight**2 for weight, _ in weights)
        )

    return total


class Puts(Protocol):
    """Takes values from `first` on, as bytes, of the tensor that stands at `place` in the seed."""

    def put(self, place: StoredTensor, first: int, raw: Bytes) -> None: ...


class Finisher:
    """Ends sums and puts them where the seed's tensors stand in its twin, or wherever else `twin` puts them."""

    def __init__(self, rule: Rule, settings: Settings, tensors: dict[str, StoredTensor], total: Callable[[str], Total], twin: Puts):
        self.rule, self.settings, self.tensors, self.total, self.twin = rule, settings, tensors, total, twin

    def _rule(self, name: str) -> tuple[Rule, Settings]:
        """The rule of a tensor with its settings: what a rule of matrices leaves is averaged."""
        rule = on(self.rule, name, self.tensors[name].shape)
        return rule, self.settings if rule is self.rule else rule.ends

    def _silent(self, name: str) -> bool:
        """Whether nobody has a say here."""
        total = self.total(name)
        return not total.squares or (bool(self._rule(name)[1].get("normalise")) and not total.weight)

    def with_seed(self, name: str) -> bool:
        """Whether the seed's own values are part of the result."""
        (rule, settings), total = self._rule(name), self.total(name)
        if not rule.linear or rule.share or self._silent(name):
            return True
        return settings["scale"] * total.whole != (total.weight if settings["normalise"] else 1.0)

    def write(self, piece: Piece, sums: Sequence[exact.Ints]) -> None:
        (rule, settings), place = self._rule(piece.name), self.tensors[piece.name]
        total = self.total(piece.name) if rule.linear else self.total(piece.name)._replace(whole=0.0)
        if self._silent(piece.name) and piece.seed is not None:
            self.twin.put(place, piece.first, piece.seed)
            return
        if rule.entire:
            assert piece.seed is not None
            seed = decode(piece.seed, place.dtype).astype(np.float64).reshape(place.shape)
            theta = rule.finish(_shape_fields(rule, place, sums), seed, total, settings)
            self.twin.put(place, 0, encode_finite(np.ascontiguousarray(theta, np.float64).reshape(-1), place.dtype, piece.name))
            return
        for at in range(0, piece.last - piece.first, 1 << 16):
            end = min(at + (1 << 16), piece.last - piece.first)
            values = tuple(exact.value(sum_N[at:end]) for sum_N in sums)
            raw = None if piece.seed is None else piece.seed[at * place.width : end * place.width]
            seed_N = np.zeros(0) if raw is None else decode(raw, place.dtype).astype(np.float64)
            theta_N = rule.finish(values, seed_N, total, settings)
            self.twin.put(place, piece.first + at, encode_finite(theta_N.astype(np.float64, copy=False), place.dtype, piece.name))


def _shape_fields(rule: Rule, place: StoredTensor, sums: Sequence[Any]) -> tuple[Floats, ...]:
    """The fields of a whole tensor, in their shapes; what a set of experts came to stands there as it is."""
    if rule.together:
        return (sums[0],)
    pairs = zip(sums[::2], sums[1::2], rule.sizes(place.shape), strict=True)
    return tuple(exact.wide_value(high_N, low_N).reshape(size) for high_N, low_N, size in pairs)


def _store(
    seed: Seed, method: str, rule: Rule | None, settings: dict[str, float], rows: tuple[Contribution, ...], twin: Twin, store: Store
) -> Merged:  # fmt: skip
    """`rule`: none where layers come from several."""
    weights = {name: store.take(twin.folder / name, digest) for name, digest in sorted(twin.close().items())}
    source = seed_folder(seed, store)
    kept = {name: digest if seed.hub is None else store.put(source / name) for name, digest in seed.files.items() if name not in weights}
    about = KERNELS if rule is None or rule.matrices else EXACT
    text = card(seed, method, rule.paper if rule else "each layer from a merge of its own", settings, rows, weights, about=about)
    return Merged(
        seed=seed.digest,
        method=method,
        settings=settings,
        contributions=rows,
        files=kept | weights | {"README.md": store.put(text.encode())},
    )
