"""The merge of a run's experts, kept as a state: an acceptance adds to it and a retirement subtracts, exactly.

A process of the maintainer's does this beside the web process, without torch. It reads the experts that came or went.
"""

from functools import partial
from typing import NamedTuple

from sqlalchemy import bindparam, select

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput
from elmwood.hub.actions import experts
from elmwood.hub.database import Connection
from elmwood.hub.home import Hub
from elmwood.hub.tables import record
from elmwood.merge.checkpoint import finalize
from elmwood.merge.states import add, remove, state
from elmwood.records import Expert, Forest, Merged, Mixture, Seed, Share, State
from elmwood.store import Store

EQUALLY = (Share(values=(1.0,)),)

_body = select(record.c.body).where(record.c.digest == bindparam("digest"))


class Kept(NamedTuple):
    """What is kept of a snapshot. `state` is None where the forest has no expert, `merged` where it has fewer than two."""

    version: int  # of the snapshot
    state: State | None
    merged: Merged | None
    added: tuple[str, ...]
    removed: tuple[str, ...]


def keep_merge(hub: Hub, method: str = "average", progress: Progress = silent) -> Kept:
    """Bring the state and the merge of a run's experts to the newest snapshot, and name them RUN/state/METHOD and RUN/merge/METHOD.

    The bytes of both depend on the experts of the snapshot alone, not on which ones came and went. Raises BadInput, Damaged, Unreachable.
    """
    store, names = hub.home.store, tuple(f"{hub.home.run}/{what}/{method}" for what in ("state", "merge"))
    version, forest = hub.read(_newest_forest)
    held = store.load(names[0], State) if names[0] in store.names() else None
    if held is not None and held.seed != forest.seed:
        held = None
    have = {one.expert for one in held.contributions} if held else set()
    added, removed = sorted(set(forest.experts) - have), sorted(have - set(forest.experts))
    for digest in added:
        _bring(hub, digest)
    if held is None or not have & set(forest.experts):
        held = None
    else:
        for digest in removed:
            held = remove(held, digest, store, progress)
    if added:
        late = state(store.load(forest.seed, Seed), dict.fromkeys(added, EQUALLY), method, {}, store, progress=progress)
        held = late if held is None else add(held, late, store)
    merged = finalize([held], {}, store, progress) if held and len(held.contributions) > 1 else None
    for kind, name, made in (("state", names[0], held), ("merged", names[1], merged)):
        if made:
            store.name(name, made.digest)
            enter_derived(hub, name)
        else:
            store.unname(name)
            hub.database.write(partial(experts.forget_marked, kind=f"{kind} {name}"))
    return Kept(version, held, merged, tuple(added), tuple(removed))


def enter_derived(hub: Hub, name: str) -> bool:
    """Enter a state, merge or mixture of the run's experts by its name in the store: the pages and `hub status` then say when one of them
    is retired, until another one has the name and is entered. Whether it is as the newest snapshot allows. Raises BadInput, UnknownName."""
    made = hub.home.store.load(name)
    if not isinstance(made, State | Merged | Mixture):
        raise BadInput(f"{name} is a {made.kind}: a state, a merge or a mixture is made of experts")
    members = {one.expert for one in made.contributions}
    if isinstance(made, Mixture):
        members |= set(made.experts) - {made.seed}
    return hub.write(lambda c, when: experts.derive(c, made.digest, f"{made.kind} {name}", sorted(members), when))


def _newest_forest(c: Connection) -> tuple[int, Forest]:
    row = experts.newest(c)
    if row is None:
        raise BadInput("nothing is published: `elmwood hub publish` first")
    return row["version"], Forest.model_validate_json(c.value(_body, digest=row["forest"]))


def _bring(hub: Hub, digest: str) -> None:
    """An expert's record and files, from the hub's database and blobs into the store."""
    expert = Expert.model_validate_json(hub.read(lambda c: c.value(_body, digest=digest)))
    store: Store = hub.home.store
    for blob in expert.files.values():
        if not store.whole(blob):
            with hub.blobs.file(blob.removeprefix("sha256:")) as path:
                store.put(path)
    store.add(expert)
