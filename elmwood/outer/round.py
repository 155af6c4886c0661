"""The rules of a star as functions of a state, of seconds of the coordinator's uptime and of settings: grants, proposals, rounds.

Every granted token ends once: applied, rejected with a code, or lost with a grant that ended without a proposal. A state is a value;
whoever keeps it (a database row) replaces it whole.

    grant -> (beat, upload) -> propose -> close -> decide
          -> expire: lost, and its text is granted again
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from pydantic import Field

from elmwood.errors import BadInput
from elmwood.outer.gates import WRONGS
from elmwood.records import Blob, Digest, Fate, Frozen, OuterStep, Star, Version

PROBATION = 1  # proposals of a newcomer that are scored and not merged
QUARANTINE = 3  # the same after it did harm


class Refused(BadInput):
    """What the rules do not allow, with a code from a closed list."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Terms(Frozen):
    """When a round closes and how long a grant lives, in seconds of the coordinator's uptime."""

    least: int = Field(2, gt=0)  # proposals, and at least half of the machines
    grace_s: float = Field(30.0, ge=0)  # after the quorum, for the others
    beat_s: float = Field(30.0, gt=0)  # a machine is gone after three of them without a beat
    progress_s: float = Field(1800.0, gt=0)  # and so long without a further step


class Grant(Frozen):
    """A slice of the text for one machine: batches first ... first + steps - 1 of a part."""

    id: str
    key: str
    base: int  # version it begins at
    part: int
    first: int
    tokens: int
    due: float
    progress_due: float
    step: int = 0
    size: int = 0  # bytes of its upload; 0: not begun
    sent: tuple[int, ...] = ()  # bytes of the parts of it that are kept
    blob: Blob | None = None  # of the whole of it


class Pending(Frozen):
    """A proposal that waits for the end of its round."""

    id: str  # that of its grant
    key: str
    base: int
    part: int
    first: int
    tokens: int
    blob: Blob
    number: int  # order of arrival: of two equal ones the earlier is the original


class Worker(Frozen):
    """A named machine."""

    name: str
    probation: int = 0  # proposals that are only scored before one is merged
    offered: int = 0  # proposals decided so far
    here: bool = False  # it has taken part


class State(Frozen):
    """Everything that changes; its history is the chain of versions."""

    number: int = 0
    head: Digest
    uptime: float = 0.0
    counted: int = 0  # grants so far
    arrived: int = 0  # proposals so far
    grants: dict[str, Grant] = {}
    pending: tuple[Pending, ...] = ()
    closing: tuple[str, ...] = ()  # ids of a round that is being decided; others wait for the next
    quorum_at: float | None = None
    parts: dict[int, int] = {}  # part -> its next batch
    workers: dict[str, Worker] = {}
    norm: float | None = None  # median of the last round
    doors: tuple[Fate, ...] = ()  # rejected before a round, to be written into the next version
    lost: int = 0  # tokens, to be written into the next version
    granted: int = 0  # tokens, over all time; as are the three below
    applied: int = 0
    rejected: dict[str, int] = {}
    gone: int = 0

    @property
    def unended(self) -> "list[Grant | Pending]":
        """Grants and proposals whose tokens have not ended."""
        return [*self.grants.values(), *self.pending]

    @property
    def live(self) -> set[str]:
        """Machines that have a grant or wait for a decision."""
        return {one.key for one in self.unended}


class Wait(NamedTuple):
    """Why there is nothing to train now."""

    why: Literal["decided-soon", "no-part", "finished"]


class Ruling(NamedTuple):
    """What a judge found of one proposal."""

    code: str = ""  # why it is rejected; nothing: it passed
    scale: float = 1.0


# ---- grants ----------------------------------------------------------------------------------------------------------


def last_version(star: Star) -> int:
    """The number of the version that ends the run."""
    return star.recipe.steps // star.steps


def grant(state: State, star: Star, terms: Terms, key: str, now: float) -> tuple[State, Grant | Wait]:
    """The grant that a machine has, or a new one: a part of the text that nobody has, its own of last time if it can be. Raises Refused."""
    worker = _worker(state, key)
    if held := next((one for one in state.grants.values() if one.key == key), None):
        return state, held
    if any(one.key == key for one in state.pending):
        return state, Wait("decided-soon")
    if state.number >= last_version(star):
        return state, Wait("finished")
    taken = {one.part for one in state.unended}
    order = sorted(range(star.parts), key=lambda part: (state.parts.get(part, 0), (part + state.counted) % star.parts))
    part = next((one for one in order if one not in taken), None)
    if part is None:
        return state, Wait("no-part")
    made = Grant(
        id=f"{state.counted:08d}", key=key, base=state.number, part=part, first=state.parts.get(part, 0), tokens=star.tokens,
        due=now + 3 * terms.beat_s, progress_due=now + terms.progress_s,
    )  # fmt: skip
    if not worker.here:  # whoever is there from the beginning is no newcomer
        worker = worker.model_copy(update={"here": True, "probation": max(worker.probation, PROBATION if state.number else 0)})
    return _change(
        state, grants=state.grants | {made.id: made}, parts=state.parts | {part: made.first + star.steps}, counted=state.counted + 1,
        granted=state.granted + made.tokens, workers=state.workers | {key: worker},
    ), made  # fmt: skip


def beat(state: State, terms: Terms, key: str, id: str, step: int, now: float) -> State:
    """A beat shows that a machine is there; only a further step is progress. Raises Refused."""
    held = find_grant(state, key, id)
    further = {"progress_due": now + terms.progress_s, "step": step} if step > held.step else {}
    return _with(state, held.model_copy(update={"due": now + 3 * terms.beat_s, **further}))


def moved(state: State, terms: Terms, key: str, id: str, now: float) -> State:
    """A part of an upload came: a sign of life, and progress. Raises Refused."""
    held = find_grant(state, key, id)
    return _with(state, held.model_copy(update={"due": now + 3 * terms.beat_s, "progress_due": now + terms.progress_s}))


def expire(state: State, now: float) -> State:
    """Grants whose machine is gone or stands still end; their text is granted again."""
    for one in [one for one in state.grants.values() if now > min(one.due, one.progress_due)]:
        state = _lose(state, one)
    return state


def give_back(state: State, key: str, id: str) -> State:
    """A machine ends its grant without a proposal. Raises Refused."""
    return _lose(state, find_grant(state, key, id))


def _lose(state: State, one: Grant) -> State:
    return _change(
        state, grants=_without(state, one.id), parts=state.parts | {one.part: one.first}, lost=state.lost + one.tokens,
        gone=state.gone + one.tokens,
    )  # fmt: skip


def find_grant(state: State, key: str, id: str) -> Grant:
    """A machine's own live grant. Raises Refused."""
    _worker(state, key)
    held = state.grants.get(id)
    if held is None or held.key != key:
        raise Refused("no-grant", f"grant {id} is not held by this key: it ended, or was never its own; ask for another")
    return held


# ---- uploads ---------------------------------------------------------------------------------------------------------


def begin_upload(state: State, key: str, id: str, size: int, wanted: int) -> State:
    """Raises Refused where the length is not that of a delta of this star."""
    held = find_grant(state, key, id)
    if size != wanted:
        raise Refused("form", f"a delta of this star has {wanted} bytes, not {size}: send what `elmwood star join` makes")
    return _with(state, held.model_copy(update={"size": size, "sent": held.sent if held.size == size else (), "blob": held.blob}))


def keep_part(state: State, key: str, id: str, offset: int, size: int, blob: Blob | None = None) -> State:
    """A further part of an upload is kept; `blob`: it is the last one, and this is the whole. Raises Refused."""
    held = find_grant(state, key, id)
    if offset != sum(held.sent) or not held.size or offset + size > held.size:
        raise Refused("offset", f"{sum(held.sent)} of {held.size} bytes are kept, and this part begins at {offset}: send what is missing")
    return _with(state, held.model_copy(update={"sent": (*held.sent, size), "blob": blob}))


# ---- proposals -------------------------------------------------------------------------------------------------------


def propose(state: State, star: Star, key: str, id: str, base: int, blob: Blob) -> State:
    """A finished grant becomes a proposal; or it is rejected at the door, and its tokens with it. Raises Refused: nothing changes."""
    if any(one.id == id and one.key == key for one in state.pending):
        return state  # it was sent twice
    held = find_grant(state, key, id)
    if held.blob != blob:
        raise Refused("no-upload", f"{blob[:19]}… is not what was uploaded for grant {id}: upload it first")
    if base != held.base:
        return refuse(state, held, "wrong-base", blob)
    if state.number - held.base > star.outer.most_stale:
        return refuse(state, held, "stale", blob)
    one = Pending(
        id=id, key=key, base=held.base, part=held.part, first=held.first, tokens=held.tokens, blob=blob, number=state.arrived,
    )  # fmt: skip
    return _change(state, grants=_without(state, id), pending=(*state.pending, one), arrived=state.arrived + 1)


def refuse(state: State, held: Grant, code: str, blob: Blob | None = None) -> State:
    """A proposal ends at the door."""
    fate = fate_of(held, "rejected", code, blob=blob)
    return _change(
        state, grants=_without(state, held.id), doors=(*state.doors, fate), rejected=_count(state.rejected, code, held.tokens)
    )  # fmt: skip


def fate_of(
    one: Grant | Pending, fate: Literal["applied", "rejected"], code: str = "", scale: float = 1.0, blob: str | None = None
) -> Fate:
    return Fate(proposal=one.id, worker=one.key, blob=blob, base=one.base, tokens=one.tokens, fate=fate, code=code, scale=scale)


# ---- rounds ----------------------------------------------------------------------------------------------------------


def quorum(state: State, terms: Terms) -> int:
    """Proposals that a round needs."""
    return max(terms.least, -(-len(state.live) // 2))


def close(state: State, star: Star, terms: Terms, now: float) -> State:
    """Close the round where it is time: a quorum has been there for the grace, or everybody is. Proposals that arrive later wait."""
    if state.closing:
        return state
    state = _drop_stale(state, star)
    if len(state.pending) < quorum(state, terms):
        return state if state.quorum_at is None else _change(state, quorum_at=None)
    since = now if state.quorum_at is None else state.quorum_at
    if state.grants and now < since + terms.grace_s:
        return state if state.quorum_at is not None else _change(state, quorum_at=since)
    return _change(state, closing=tuple(sorted(one.id for one in state.pending)), quorum_at=None)


def _drop_stale(state: State, star: Star) -> State:
    """Proposals that waited while versions went by."""
    old = [one for one in state.pending if state.number - one.base > star.outer.most_stale]
    for one in old:
        state = _change(
            state, pending=tuple(held for held in state.pending if held.id != one.id),
            doors=(*state.doors, fate_of(one, "rejected", "stale", blob=one.blob)), rejected=_count(state.rejected, "stale", one.tokens),
        )  # fmt: skip
    return state


def round_of(state: State) -> list[Pending]:
    """The proposals of the closing round, by id: the order of all sums and decisions."""
    return sorted((one for one in state.pending if one.id in state.closing), key=lambda one: one.id)


def fates(state: State, rulings: Mapping[str, Ruling], merge: bool = True) -> list[Fate]:
    """What becomes of each proposal of the closing round. Who is on probation is scored, and not merged."""
    made = []
    for one in round_of(state):
        ruling = rulings[one.id]
        code = ruling.code or ("probation" if state.workers[one.key].probation else "") or ("" if merge else "worse")
        made.append(fate_of(one, "rejected" if code else "applied", code, ruling.scale if not code else 1.0, one.blob))
    return made


def decide(state: State, version: Version, norm: float | None, guilty: Iterable[str] = ()) -> State:
    """The state after a version was made of the closing round. `guilty`: proposals whose machines are quarantined. Raises Refused where
    the version does not follow."""
    mine = {fate.proposal: fate for fate in version.fates}
    if version.parent != state.head or version.number != state.number + 1 or not set(state.closing) <= mine.keys():
        raise Refused("wrong-version", f"version {version.number} does not follow version {state.number}: read the state again")
    workers, applied, rejected, guilty = dict(state.workers), state.applied, state.rejected, set(guilty)
    for one in round_of(state):
        fate, worker = mine[one.id], workers[one.key]
        left = max(0, worker.probation - 1)
        if fate.code in WRONGS or one.id in guilty:
            left = max(worker.probation, QUARANTINE)
        workers[one.key] = worker.model_copy(update={"probation": left, "offered": worker.offered + 1})
        if fate.fate == "applied":
            applied += one.tokens
        else:
            rejected = _count(rejected, fate.code, one.tokens)
    return _change(
        state, number=version.number, head=version.digest, pending=tuple(one for one in state.pending if one.id not in state.closing),
        closing=(), workers=workers, applied=applied, rejected=rejected, norm=norm or state.norm, doors=(), lost=0, quorum_at=None,
    )  # fmt: skip


def weights_of(version_fates: Iterable[Fate], number: int, outer: OuterStep) -> list[tuple[Fate, int]]:
    """Applied proposals with the versions that they are behind, for the step that makes version `number`."""
    return [(fate, number - 1 - fate.base) for fate in sorted(version_fates, key=lambda one: one.proposal) if fate.fate == "applied"]


# ---- plain pieces ----------------------------------------------------------------------------------------------------


def _worker(state: State, key: str) -> Worker:
    if key not in state.workers:
        raise Refused("unknown-key", f"key {key[-8:]} is not in this star's list: whoever runs it adds it with --worker")
    return state.workers[key]


def _change(state: State, **changes: object) -> State:
    return state.model_copy(update=changes)


def _with(state: State, held: Grant) -> State:
    return _change(state, grants=state.grants | {held.id: held})


def _without(state: State, id: str) -> dict[str, Grant]:
    return {name: one for name, one in state.grants.items() if name != id}


def _count(counts: Mapping[str, int], code: str, tokens: int) -> dict[str, int]:
    return {**counts, code: counts.get(code, 0) + tokens}
