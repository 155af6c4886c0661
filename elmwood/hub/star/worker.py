"""A machine of a star: fetch a version, train the slice that it was granted, send the delta, take the receipt. It resumes where it was.

Outbound requests only. Its folder, <store>/star/<plan>-<key>/, has its optimiser's moments and the error of its deltas.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged, ElmwoodError
from elmwood.hub import signing
from elmwood.hub.client.http import Hub, Problem
from elmwood.hub.client.transfer import begin_upload, fetch_blob, fetch_blobs, fetch_record, send
from elmwood.hub.star.app import WAIT
from elmwood.hub.star.messages import GrantReply, Receipt, StarReply
from elmwood.outer.compress import open_delta
from elmwood.outer.step import STEP, follow, shapes_of
from elmwood.records import Corpus, Fate, Seed, Star, Version, parse
from elmwood.store import Store, hash_file
from elmwood.store.disk import temporary_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from elmwood.train.inner.phase import Local

FEWER = 3  # steps that have fewer bytes than the whole weights
PAUSE = 1.0  # seconds until a machine asks again for something to train


class Told(NamedTuple):
    """What a machine does."""

    what: str  # fetch, train, send, receipt, wait, finished
    said: str = ""
    fate: Fate | None = None


class Ended(NamedTuple):
    """What a machine has done."""

    applied: int  # tokens
    rejected: dict[str, int]
    sent: int  # bytes of deltas


class Machine(NamedTuple):
    """A machine that is ready: its connection, its store, its model."""

    hub: Hub
    store: Store
    local: "Local"
    beat_s: float


@contextmanager
def opened(
    url: str, store: Store, key: "Ed25519PrivateKey", *, progress: Progress = silent, sleep: Callable[[float], None] = time.sleep,
    transport: Any = None,
) -> Iterator[Machine]:  # fmt: skip
    """Fetch the plan, the text and the seed, and open the model. Raises Problem, Unreachable, Damaged."""
    hub = Hub(url, key, sleep=sleep, transport=transport)
    try:
        plan = StarReply.model_validate(hub.get("/train").json())
        yield Machine(hub, store, open_machine(plan, hub, store, key, progress), plan.beat_s)
    finally:
        hub.close()


def take_part(
    machine: Machine, *, proposals: int | None = None, tell: Callable[[Told], None] = lambda told: None, progress: Progress = silent,
    on_step: Callable[[int], None] = lambda step: None,
) -> Ended:  # fmt: skip
    """Train and send until the last version, or for so many proposals. Raises Problem, Unreachable, Damaged, BadInput."""
    applied, rejected, sent, count = 0, dict[str, int](), 0, 0
    while proposals is None or count < proposals:
        reply = machine.hub.request("POST", "/train/grants")
        if reply.status == 204:
            why = reply.headers.get("elmwood-reason", "")
            tell(Told("finished" if why == "finished" else "wait", why))
            if why == "finished":
                settle_left(machine, "", tell)
                break
            machine.hub.sleep(PAUSE)
            continue
        grant = GrantReply.model_validate(reply.json())
        settle_left(machine, grant.id, tell)
        try:
            with beating(grant, machine, on_step) as step:
                path = train(grant, machine, tell, progress, step)
                size = path.stat().st_size
                tell(Told("send", f"{size:,} bytes"))
                offer(path, grant, machine.hub, progress)
        except Problem as problem:
            if problem.code != "no-grant":
                raise
            tell(Told("wait", str(problem)))
            settle(machine.local, grant.id, None)
            continue
        fate = await_fate(grant.id, machine.hub)
        settle(machine.local, grant.id, fate)
        sent, count = sent + size, count + 1
        tell(Told("receipt", f"version {grant.base}: {fate.fate} {fate.code}".strip(), fate))
        if fate.fate == "applied":
            applied += fate.tokens
        else:
            rejected[fate.code] = rejected.get(fate.code, 0) + fate.tokens
    return Ended(applied, rejected, sent)


def open_machine(plan: StarReply, hub: Hub, store: Store, key: "Ed25519PrivateKey", progress: Progress) -> "Local":
    """Everything that does not change during a run: text, tokenizer, model."""
    star = _known(fetch_record(plan.star, hub, store), Star)
    seed, corpus = _known(fetch_record(star.seed, hub, store), Seed), _known(fetch_record(star.corpus, hub, store), Corpus)
    fetch_blobs([*seed.files.values(), *(shard.blob for shard in corpus.train)], hub, store, progress, "fetch seed and text")
    from elmwood.corpus.tokens import pack
    from elmwood.lm.files import tokenizer
    from elmwood.lm.load import load_model  # torch
    from elmwood.train.inner.phase import open_local

    packed = pack(corpus.train, tokenizer(seed, store), seed.separator, store, progress)
    import torch

    model = load_model(seed, store, dtype=torch.float32)
    return open_local(model, packed, star, store.root / "star" / f"{star.digest[:16]}-{signing.public(key)[:16]}")


def _known(record: Any, kind: type) -> Any:
    if not isinstance(record, kind):
        raise ElmwoodError(f"record {record.digest[:8]} is a {record.kind}, a {kind.__name__.lower()} is needed: is this a star's address?")
    return record


@contextmanager
def beating(grant: GrantReply, machine: Machine, on_step: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """Show the coordinator that this machine is there, from the download to the end of the upload. What is given is told of each step, and
    raises Problem where the grant ended meanwhile."""
    ended, failure, done = threading.Event(), list[Problem](), [0]

    def beat() -> None:
        while not ended.wait(machine.beat_s):
            try:
                machine.hub.post(f"/train/grants/{grant.id}/beat", {"step": done[0]}, "")
            except Problem as problem:
                failure.append(problem)
                return
            except ElmwoodError:
                continue

    def step(count: int) -> None:
        done[0] = count
        if failure:
            raise failure[0]
        on_step(count)

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()
    try:
        yield step
    finally:
        ended.set()
        thread.join()


def train(
    grant: GrantReply, machine: Machine, tell: Callable[[Told], None], progress: Progress, on_step: Callable[[int], None]
) -> Path:  # fmt: skip
    """The delta of a grant, as a file. Raises Problem where the grant ended meanwhile."""
    from elmwood.train.inner.phase import Slice, run_phase

    version = fetch_version(grant.base, machine.hub)
    tell(Told("fetch", f"version {grant.base}"))
    base = fetch_base(version, machine)
    tell(Told("train", f"from version {grant.base}"))
    return run_phase(machine.local, Slice(grant.id, grant.base, grant.part, grant.first), base, on_step, progress)


def fetch_base(version: Version, machine: Machine) -> Path:
    """The weights of a version: by the steps from those that are here, else whole. Others are deleted: a machine needs one at a time."""
    kept = Store(machine.local.folder / "versions")
    base = _held(version, machine.store, kept) or _follow(version, machine, kept) or fetch_blob(version.weights, machine.hub, kept)
    for other in kept.root.glob("blobs/sha256/*/*"):
        if other != base:
            other.unlink()
    return base


def _held(version: Version, *stores: Store) -> Path | None:
    """The weights of a version, where they are here."""
    return next((store.get(version.weights) for store in stores if store.whole(version.weights)), None)


def _follow(version: Version, machine: Machine, kept: Store) -> Path | None:
    """The weights of a version by the steps since one that is here; none where that is too far behind, or other bytes come of it."""
    newest, steps = version, list[str]()
    while (held := _held(version, machine.store, kept)) is None:
        if len(steps) == FEWER or not version.number:
            return None
        steps += [version.step] if version.step else []
        version = fetch_version(version.number - 1, machine.hub)
    with suppress(BadInput, Damaged), temporary_folder(kept.root / "work") as folder:
        sent = [open_delta(fetch_blob(step, machine.hub, kept), shapes_of(held), STEP) for step in reversed(steps)]
        made = follow(held, sent, folder / "model.safetensors")
        if f"sha256:{made.sha}" == newest.weights:
            return kept.path(kept.take(*made))
    return None


def fetch_version(number: int, hub: Hub) -> Version:
    """Raises Problem, ElmwoodError."""
    return _known(parse(hub.get(f"/train/version/{number}").body), Version)


def offer(path: Path, grant: GrantReply, hub: Hub, progress: Progress) -> None:
    """Send a delta. May be done again after an interruption."""
    if _told(grant.id, hub) is None:
        upload = begin_upload(path, grant.id, 0, hub, "")
        send(path, upload, hub, progress)
        hub.post("/train/proposals", {"grant": grant.id, "base": grant.base, "blob": f"sha256:{hash_file(path)}"}, "")


def await_fate(id: str, hub: Hub) -> Fate:
    """What became of a proposal, once it is decided."""
    while (fate := _told(id, hub, WAIT)) is None:
        pass
    return fate


def _told(id: str, hub: Hub, wait: float = 0) -> Fate | None:
    return Receipt.model_validate(hub.get(f"/train/proposals/{id}?wait={wait:.0f}").json()).fate


def settle_left(machine: Machine, held: str, tell: Callable[[Told], None]) -> None:
    """Take the receipts of phases whose end this machine did not see: it was killed. Whoever holds a grant has no proposal that waits, so
    what has no receipt was lost with its grant."""
    from elmwood.train.inner.phase import unsettled

    for id in unsettled(machine.local):
        if id != held:
            fate = _told(id, machine.hub)
            settle(machine.local, id, fate)
            tell(Told("receipt", f"earlier: {f'{fate.fate} {fate.code}'.strip() if fate else 'lost'}", fate))


def settle(local: "Local", id: str, fate: Fate | None) -> None:
    """None: its grant ended; what was computed stays in the error of this machine."""
    from elmwood.train.inner.phase import settle_phase

    settle_phase(local, id, fate)
