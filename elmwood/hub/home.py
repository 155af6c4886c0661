"""A hub on disk and opened: <store>/hub/<run>/ has hub.sqlite, keys/ and uploads/; its clock counts the hub's uptime."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import bindparam, select, update

from elmwood.errors import BadInput, UnknownName
from elmwood.hub import signing
from elmwood.hub.actions import experts, jobs, leases, request, submissions
from elmwood.hub.actions.request import Moment
from elmwood.hub.blobs import Blobs
from elmwood.hub.database import Connection, Database
from elmwood.hub.migrations import upgrade
from elmwood.hub.signing import Office
from elmwood.hub.tables import clock
from elmwood.store import Store
from elmwood.store.disk import write_whole

T = TypeVar("T")
TICK = 5.0  # seconds between looks at deadlines; a restart forgets at most so much of the uptime
KEYS = ("root", "hub", "admin", "verifier")

_uptime = select(clock.c.uptime).where(clock.c.id == 1)
_tick = update(clock).where(clock.c.id == 1, clock.c.uptime < bindparam("now")).values(uptime=bindparam("now"))


class Clock:
    """Seconds that the hub was up. While it is down, or stands still for longer than two ticks, no time passes."""

    def __init__(self, uptime: float, monotonic: Callable[[], float] = time.monotonic):
        self._monotonic, self._lock = monotonic, threading.Lock()
        self._uptime, self._seen = uptime, monotonic()

    def now(self) -> float:
        """The uptime, in seconds."""
        with self._lock:
            return self._uptime + min(self._monotonic() - self._seen, 2 * TICK)

    def tick(self, known: float = 0.0) -> float:
        """Count the time since the last tick. `known`: what another process of this hub counted."""
        with self._lock:
            here = self._monotonic()
            self._uptime = max(self._uptime + min(here - self._seen, 2 * TICK), known)
            self._seen = here
            return self._uptime


class Home:
    """The folder of a hub: its keys, and where its database and blobs are."""

    def __init__(self, run: str, store: Store):
        self.run, self.store = run, store
        self.folder = store.root / "hub" / run

    @property
    def exists(self) -> bool:
        return (self.folder / "keys").is_dir()

    def key_path(self, name: str) -> Path:
        return self.folder / "keys" / f"{name}.key"

    def make_keys(self) -> None:
        """The keys of a new hub. The root key may be moved elsewhere after publishing."""
        for name in KEYS:
            signing.load_or_make_key(self.key_path(name))
        if not (path := self.folder / "keys" / "secret.key").exists():
            signing.save_key(signing.new_key(), path)

    @property
    def secret(self) -> bytes:
        return signing.load_key(self.folder / "keys" / "secret.key").private_bytes_raw()

    @property
    def settings(self) -> dict[str, str]:
        """Where database and blobs are, as `hub publish` was told."""
        path = self.folder / "hub.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def keep_settings(self, database: str | None, blobs: str | None) -> None:
        """Where database and blobs are from now on; None: as they are."""
        given = {name: value for name, value in (("database", database), ("blobs", blobs)) if value}
        if given:
            write_whole(self.folder / "hub.json", json.dumps(self.settings | given).encode())

    def database_url(self) -> str:
        return self.settings.get("database") or f"sqlite:///{(self.folder / 'hub.sqlite').resolve()}"

    def blobs_url(self) -> str | Path:
        return self.settings.get("blobs") or self.store.root.resolve() / "blobs"


class Hub:
    """An opened hub. Everything it knows is in the database and the blobs; close it."""

    def __init__(self, home: Home, database: str | None = None, blobs: str | None = None):
        if not home.exists:
            have = ", ".join(sorted(path.name for path in (home.store.root / "hub").glob("*"))) or "none"
            raise UnknownName(f"there is no run {home.run!r} in {home.store.root}, but {have}: `elmwood hub publish` makes one")
        self.home = home
        url = database or home.database_url()
        upgrade(url)
        self.database = Database(url)
        self.blobs = Blobs(blobs or home.blobs_url(), home.folder / "uploads")
        self.office = Office(signing.load_key(home.key_path("hub")), home.secret)
        self.clock = Clock(self.database.read(lambda c: c.value(_uptime)) or 0.0)
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None

    def moment(self) -> Moment:
        return Moment(self.clock.now(), time.time())

    def read(self, fn: Callable[[Connection], T]) -> T:
        return self.database.read(fn)

    def write(self, fn: Callable[[Connection, Moment], T]) -> T:
        """Run a write at the present moment, and wait until it is durable."""
        return self.database.write(lambda c: fn(c, self.moment()))

    # ---- upkeep

    def tick(self) -> None:
        """Count the uptime, and end what is overdue."""
        known = self.database.read(lambda c: c.value(_uptime))
        now = self.clock.tick(known or 0.0)
        gone = self.database.write(lambda c: upkeep(c, Moment(now, time.time()), self.office))
        for upload, parts in gone:
            self.blobs.drop_parts(upload, parts)

    def start(self) -> None:
        """Tick in a thread until `close`."""

        def run() -> None:
            while not self._stop.wait(TICK):
                try:
                    self.tick()
                except Exception:  # the database is away; the next tick tries again, and no time has passed for anybody
                    continue

        self._ticker = threading.Thread(target=run, name="hub-ticker", daemon=True)
        self._ticker.start()

    def close(self) -> None:
        self._stop.set()
        if self._ticker:
            self._ticker.join()
        now = self.clock.now()
        try:
            self.database.write(lambda c: c.run(_tick, now=now) and None)
        finally:
            self.database.close()


def upkeep(c: Connection, when: Moment, office: Office) -> list[tuple[str, int]]:
    """One look at all deadlines; uploads whose parts may go."""
    c.run(_tick, now=when.uptime)
    if experts.newest(c) is None:
        return []
    leases.reap(c, when)
    jobs.reap(c, when)
    experts.end_probation(c, when, office)
    if int(when.uptime / TICK) % 60 == 0:
        request.forget(c, when)
    return submissions.reap_uploads(c, when)


def find_home(run: str | None, store: Store) -> Home:
    """The hub of this name, or the only one. Raises UnknownName, BadInput."""
    if run:
        return Home(run, store)
    have = sorted(path.name for path in (store.root / "hub").glob("*"))
    if len(have) != 1:
        raise BadInput(f"{store.root} has {len(have)} runs ({', '.join(have) or 'none'}): name one")
    return Home(have[0], store)
