"""From the proposals of a round to the next version: gates, the outer step, and what is undone where it made the held-out loss worse.

A function of files and of a judge; it writes the new weights and changes nothing else, so a killed one is simply run again.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from elmwood.errors import BadInput, Damaged
from elmwood.outer import gates, round
from elmwood.outer.compress import Floats, Sent, open_delta
from elmwood.outer.gates import Facts, Gains
from elmwood.outer.round import Pending, Ruling, State
from elmwood.outer.step import LEAST, Part, Written, read_tensors, shapes_of, step, weight_of
from elmwood.records import Blob, Fate, OuterStep, Star, Version


class Judge(Protocol):
    """Whoever can compute losses. `secret` text is drawn anew for each version."""

    def gains(self, one: Pending, delta: Callable[[str], Floats]) -> Gains: ...

    def losses(self, weights: Path) -> Floats: ...


class Base(NamedTuple):
    """The version that a round changes, as files."""

    version: Version
    weights: Path
    velocity: Path | None = None
    error: Path | None = None


class Settled(NamedTuple):
    """What comes of a round; `written` is None where the weights stay as they are."""

    how: str
    fates: list[Fate]
    written: Written | None
    keeps_velocity: bool
    norm: float | None
    guilty: tuple[str, ...]
    gains: dict[str, Gains]
    sketches: dict[str, Floats]  # of the proposals that can be read


def settle(
    star: Star, base: Base, state: State, files: Mapping[str, Path], judge: Judge | None, folder: Path, earlier: Sequence[Floats] = (),
    at: Callable[[str], None] = lambda place: None,
) -> Settled:  # fmt: skip
    """Decide on the closing round of a state. `files`: delta by id of its proposal. `earlier`: sketches of what was applied in the last
    versions. `at` is told where it is, for tests that stop it."""
    ones, shapes = round.round_of(state), shapes_of(base.weights)
    sent = _open(ones, files, star, shapes)
    found = gates.measure(shapes, {id: one.values for id, one in sent.items()})
    norms = {one.id: found[one.id].norm if one.id in found else None for one in ones}  # of one that cannot be read all is dropped
    codes, scales = gates.judge_norms([Facts(*one) for one in norms.items()], state.norm)
    passed = sorted((one for one in ones if one.id not in codes), key=lambda one: one.number)
    sketches = {one.id: found[one.id].sketch for one in passed}
    codes |= dict.fromkeys(gates.find_copies(sketches, _last_step(base), earlier), "copy")
    at("gated")
    gains: dict[str, Gains] = {}
    for one in passed:
        if judge and one.id not in codes:
            gains[one.id] = judge.gains(one, sent[one.id].values)
            if code := gates.judge_gains(gains[one.id]):
                codes[one.id] = code
    at("judged")
    rulings = {one.id: Ruling(codes.get(one.id, ""), scales.get(one.id, 1.0)) for one in ones}
    fates, guilty = round.fates(state, rulings), list[str]()
    norm = gates.reference_norm([norms[fate.proposal] or 0.0 for fate in fates if fate.fate == "applied"])
    before = judge.losses(base.weights) if judge else None
    while merged := round.weights_of(fates, state.number + 1, star.outer):
        how = "mean" if judge or len(merged) < LEAST else "median"
        written = _step(base, parts_of(merged, sent, star.outer), star.outer, how, folder)
        at("stepped")
        if judge is None or before is None or not gates.is_worse(before, judge.losses(written.weights.path)):
            return Settled(how, fates, written, True, norm, tuple(guilty), gains, sketches)
        worst = gates.most_guilty({fate.proposal: gains[fate.proposal] for fate, _ in merged})[0]
        guilty.append(worst)
        fates = [_worse(fate) if fate.proposal == worst else fate for fate in fates]
    blamed = () if len(guilty) == len(scales) else tuple(guilty)  # where nobody is left, momentum or the rate may have done it
    return Settled("none", fates, None, not guilty, None, blamed, gains, sketches)


def blobs_of(parent: Version, written: Written | None, keeps_velocity: bool) -> dict[str, Blob | None]:
    """What a version says of its files."""
    if written:
        return {kind: f"sha256:{file.sha}" for kind, file in written._asdict().items()}
    return {"weights": parent.weights, "velocity": parent.velocity if keeps_velocity else None, "error": parent.error, "step": None}


def _step(base: Base, parts: Sequence[Part], outer: OuterStep, how: str, folder: Path) -> Written:
    return step(base.weights, base.velocity, base.error, parts, outer, how, folder)


def parts_of(merged: Sequence[tuple[Fate, int]], sent: Mapping[str, Sent], outer: OuterStep) -> list[Part]:
    """Applied proposals as the step takes them."""
    return [Part(sent[fate.proposal].values, weight_of(fate.tokens, behind, outer), fate.scale) for fate, behind in merged]


def _worse(fate: Fate) -> Fate:
    return fate.model_copy(update={"fate": "rejected", "code": "worse", "scale": 1.0})


def _open(ones: Sequence[Pending], files: Mapping[str, Path], star: Star, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Sent]:
    """By id, the deltas whose files are what they should be."""
    sent: dict[str, Sent] = {}
    for one in ones:
        with suppress(BadInput, Damaged):
            sent[one.id] = open_delta(files[one.id], shapes, star.form)
    return sent


def _last_step(base: Base) -> list[Floats]:
    """The sketch of the velocity, which everybody can compute; none at the start."""
    if base.velocity is None:
        return []
    speed = dict(read_tensors(base.velocity))
    return [gates.sketch(speed, speed.__getitem__)]


def sketch_file(path: Path, star: Star, shapes: Mapping[str, tuple[int, ...]]) -> Floats:
    """Of a delta that was applied."""
    return gates.sketch(shapes, open_delta(path, shapes, star.form).values)


# ---- again -----------------------------------------------------------------------------------------------------------


def replay(star: Star, base: Base, version: Version, files: Mapping[str, Path], folder: Path) -> Version:
    """A version, computed again from its parent and the deltas that it applied. Raises BadInput."""
    written = None
    if version.how != "none":
        merged, shapes = round.weights_of(version.fates, version.number, star.outer), shapes_of(base.weights)
        sent = {fate.proposal: open_delta(files[fate.proposal], shapes, star.form) for fate, _ in merged}
        written = _step(base, parts_of(merged, sent, star.outer), star.outer, version.how, folder)
    return version.model_copy(update=blobs_of(base.version, written, version.velocity is not None))
