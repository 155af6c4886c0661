"""A star on disk, opened by its coordinator: <store>/star/<name>/ has star.sqlite and uploads/; versions are records of the store."""

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from elmwood.errors import BadInput, ElmwoodError, UnknownName
from elmwood.hub.blobs import Blobs
from elmwood.hub.home import Clock
from elmwood.hub.star.keeper import Deposed, Keeper
from elmwood.outer import round
from elmwood.outer.compress import Floats, size_of
from elmwood.outer.gates import MEMORY
from elmwood.outer.round import State, Terms, Worker
from elmwood.outer.settle import Base, Judge, blobs_of, replay, settle, sketch_file
from elmwood.outer.step import shapes_of
from elmwood.records import Corpus, Seed, Star, Version
from elmwood.store import Store
from elmwood.store.disk import temporary_folder

T = TypeVar("T")
logger = logging.getLogger("elmwood.star")
TICK = 1.0  # seconds between two looks at deadlines and at the round
WEIGHTS = "model.safetensors"
JudgeOf = Callable[[Base], Judge | None]


class Checked(NamedTuple):
    """A version and whether it was computed again to the same bytes."""

    number: int
    digest: str
    good: bool
    said: str


def first_version(star: Star, store: Store) -> Version:
    """Version 0: the seed's own weights. Raises BadInput."""
    seed = store.load(star.seed, Seed)
    if WEIGHTS not in seed.files:
        raise BadInput(f"seed {seed.name} has no {WEIGHTS} in the store: a star takes seeds whose weights are one file there")
    shapes_of(store.get(seed.files[WEIGHTS]))
    return Version(star=star.digest, number=0, weights=seed.files[WEIGHTS], how="start")


def base_of(version: Version, store: Store) -> Base:
    """A version as files. Raises Damaged."""
    velocity, error = (store.get(blob) if blob else None for blob in (version.velocity, version.error))
    return Base(version, store.get(version.weights), velocity, error)


def public_of(version: Version) -> list[str]:
    """Blobs that machines need to compute from a version."""
    return [version.weights, *([version.step] if version.step else [])]


def seed_of(star: Star, version: Version, store: Store) -> Seed:
    """A version as a seed, from which experts branch."""
    seed = store.load(star.seed, Seed)
    if not version.number:
        return seed
    files = seed.files | {WEIGHTS: version.weights}
    return seed.model_copy(update={"name": f"{star.name}-{version.number}", "files": files, "corpus": star.corpus, "recipe": star.recipe,
                                   "curve": ()})  # fmt: skip


class Home:
    """An opened star, led by this process. Everything it knows is in the database and the store; close it.

    `judge_of`: who computes losses for a version; None where nobody can, then proposals are averaged by their median. `at`: told where a
    decision is, for tests that stop it there.
    """

    def __init__(
        self, star: Star, store: Store, terms: Terms, workers: Mapping[str, str], judge_of: JudgeOf = lambda base: None, *,
        database: str | None = None, at: Callable[[str], None] = lambda place: None, **options: Any,
    ):  # fmt: skip
        self.star, self.store, self.terms, self.judge_of, self.at = star, store, terms, judge_of, at
        self.folder = store.root / "star" / star.name
        self.folder.mkdir(parents=True, exist_ok=True)
        start = first_version(star, store)
        store.add(star)
        store.add(start)
        holder = options.pop("holder", f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}")
        self.keeper = Keeper(database_url(star, store, database), star.digest, holder, **options)
        try:
            self.keeper.lead()
            self.keeper.begin(State(head=start.digest), start)
            self._name_workers(workers)
        except BaseException:
            self.keeper.close()
            raise
        self.blobs = Blobs(store.root.resolve() / "blobs", self.folder / "uploads")
        self.clock = Clock(self.keeper.read().uptime)
        self.size = size_of(shapes_of(store.get(start.weights)), star.form)
        self.public, self.sketches = self._public(), dict[str, Floats]()
        self._stop, self._threads = threading.Event(), list[threading.Thread]()
        self.ended: Exception | None = None

    def _name_workers(self, workers: Mapping[str, str]) -> None:
        def name(state: State) -> tuple[State, None]:
            named = {key: state.workers.get(key, Worker(name=one)).model_copy(update={"name": one}) for key, one in workers.items()}
            return (state, None) if state.workers == state.workers | named else (
                state.model_copy(update={"workers": state.workers | named}), None)  # fmt: skip

        self.keeper.write(name)

    def _public(self) -> set[str]:
        """Blobs that the named machines may fetch: the seed's files, the text to train on, weights. No held-out text, nobody's delta."""
        seed, corpus = self.store.load(self.star.seed, Seed), self.store.load(self.star.corpus, Corpus)
        versions = [self.store.load(digest, Version) for digest in self.keeper.chain()]
        return {*seed.files.values(), *(shard.blob for shard in corpus.train), *(blob for one in versions for blob in public_of(one))}

    def version(self, number: int | None = None) -> Version:
        """A version, by default the newest. Raises BadInput."""
        digest = self.keeper.read().head if number is None else self.keeper.digest(number)
        if digest is None:
            raise BadInput(f"there is no version {number} of {self.star.name} yet: the newest is {self.keeper.read().number}")
        return self.store.load(digest, Version)

    def write(self, fn: Callable[[State, float], tuple[State, T]]) -> T:
        """Change the state at the present moment of uptime. Raises Deposed, and what `fn` raises."""
        now = self.clock.now()

        def change(state: State) -> tuple[State, T]:
            after, made = fn(state, now)
            return (state if after is state else after.model_copy(update={"uptime": max(after.uptime, now)})), made

        return self.keeper.write(change)

    # ---- rounds

    def tick(self) -> bool:
        """End what is overdue, and decide a round whose time has come; whether a version was made. Raises Deposed."""
        self.clock.tick()

        def look(state: State, now: float) -> tuple[State, tuple[str, ...]]:
            after = round.close(round.expire(state, now), self.star, self.terms, now)
            return after, after.closing

        return bool(self.write(look)) and self.decide() is not None

    def decide(self) -> Version | None:
        """Make the next version of the closing round. Killed anywhere in here, the next process does it again: nothing is applied twice,
        because the version and the state that no longer has its proposals are written in one transaction."""
        state = self.keeper.read()
        ones = round.round_of(state)
        if not ones:
            return None
        base = base_of(self.version(), self.store)
        self.at("read")
        files = {one.id: self.store.path(one.blob) for one in ones}
        with temporary_folder(self.store.root / "work") as folder:
            made = settle(self.star, base, state, files, self.judge_of(base), folder, self._earlier(base), self.at)
            for file in made.written or ():
                self.store.take(*file)
                self.at("taken")
        self.at("stored")

        def commit(now: State) -> tuple[State, Version]:
            fates = tuple(sorted((*made.fates, *now.doors), key=lambda fate: fate.proposal))
            version = Version(
                star=self.star.digest, number=now.number + 1, parent=now.head, how=made.how, fates=fates, lost=now.lost,
                **blobs_of(base.version, made.written, made.keeps_velocity),
            )  # fmt: skip
            after = round.decide(now, version, made.norm, made.guilty)
            self.store.add(version)
            self.at("recorded")
            return after, version

        version = self.keeper.write(commit, lambda one: one)
        self.public.update(public_of(version))
        self.sketches |= {fate.blob: made.sketches[fate.proposal] for fate in made.fates if fate.fate == "applied" and fate.blob}
        self.at("committed")
        self.name_seed(version)
        self.at("named")
        return version

    def _earlier(self, base: Base) -> list[Floats]:
        """Sketches of what was applied in the last versions, computed once by each process."""
        shapes, kept, version = shapes_of(base.weights), dict[str, Floats](), base.version
        for _ in range(MEMORY):
            for blob in (fate.blob for fate in version.fates if fate.fate == "applied" and fate.blob):
                known = self.sketches.get(blob)
                kept[blob] = sketch_file(self.store.get(blob), self.star, shapes) if known is None else known
            if version.parent is None:
                break
            version = self.store.load(version.parent, Version)
        self.sketches = kept
        return list(kept.values())

    def name_seed(self, version: Version) -> None:
        """The newest version is the seed NAME/newest of the store."""
        self.store.name(f"{self.star.name}/newest", self.store.add(seed_of(self.star, version, self.store)))

    # ---- while it serves

    def start(self, failed: Callable[[Exception], None] = lambda error: None) -> None:
        """Renew the lead and decide rounds in two threads, until `close`. `failed` is told why one of them ended before, as is `ended`:
        another process leads, or a fault of ours."""

        def run(each: Callable[[], object], pause: float) -> None:
            while not self._stop.wait(pause):
                try:
                    each()
                except Exception as error:
                    if isinstance(error, ElmwoodError) and not isinstance(error, Deposed):  # the database or the disk is away, perhaps
                        logger.warning("%s; tried again in %.0f s", error, pause)
                        continue
                    self.ended = error
                    failed(error)
                    return

        self.name_seed(self.version())
        for each, pause in ((self.keeper.renew, self.keeper.hold / 4), (self.tick, TICK)):
            self._threads.append(threading.Thread(target=run, args=(each, pause), name="star", daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        with suppress(ElmwoodError):
            self.keeper.close()


def database_url(star: Star, store: Store, database: str | None) -> str:
    return database or f"sqlite:///{(store.root / 'star' / star.name / 'star.sqlite').resolve()}"


def open_chain(star: Star, store: Store, database: str | None = None) -> list[str]:
    """The digests of all versions, read beside a coordinator that may be at work. Raises UnknownName."""
    if database is None and not (store.root / "star" / star.name / "star.sqlite").exists():
        raise UnknownName(f"star {star.name!r} has no versions in {store.root}: `elmwood star serve` begins it")
    keeper = Keeper(database_url(star, store, database), star.digest)
    try:
        return keeper.chain()
    finally:
        keeper.close()


def seed_at(star: Star, chain: Sequence[str], number: int | None, store: Store) -> Seed:
    """A version as a seed. Raises BadInput."""
    number = len(chain) - 1 if number is None else number
    if not 0 <= number < len(chain):
        raise BadInput(f"there is no version {number} of {star.name}, which has 0 to {len(chain) - 1}")
    return seed_of(star, store.load(chain[number], Version), store)


def check_chain(star: Star, digests: list[str], store: Store) -> list[Checked]:
    """Compute every version again from its parent and the deltas that it applied."""
    found: list[Checked] = []
    parent: Version | None = None
    for number, digest in enumerate(digests):
        version = store.load(digest, Version)
        if parent is None:
            good = version == first_version(star, store)
            found.append(Checked(0, digest, good, "the seed's weights" if good else "it is not the seed's"))
        else:
            follows = version.parent == parent.digest and version.number == number and version.star == star.digest
            found.append(Checked(number, digest, *(_again(star, parent, version, store) if follows else (False, "it follows another"))))
        parent = version
    return found


def _again(star: Star, parent: Version, version: Version, store: Store) -> tuple[bool, str]:
    files: dict[str, Path] = {one.proposal: store.get(one.blob) for one in version.fates if one.fate == "applied" and one.blob}
    with temporary_folder(store.root / "work") as folder:
        good = replay(star, base_of(parent, store), version, files, folder) == version
    return good, f"{version.how} of {len(files)} of {len(version.fates)} proposals" if good else "other bytes come of its proposals"
