"""The model that is served now. Another may take its place while it answers: requests that began with the old one end with it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from elmwood.ensemble.batch.interface import Counts, Ended, Engine, Event, Request
from elmwood.errors import BadInput, ElmwoodError
from elmwood.serve.logs import logger
from elmwood.serve.model import Served

OLD = 2  # models at once that are no more served and have requests at work
LONG = 600.0  # seconds that these get; those that are left then end with status 503
TRIAL = 120.0  # seconds of the one token that a new model says before it is served


class Source(NamedTuple):
    """Where newer models come from."""

    newest: Callable[[], str]  # the digest of what is to be served; may take long and raise anything
    open: Callable[..., Served]  # (digest, like=what is served): it, opened beside that
    every_s: float
    first: str = ""  # what is served at first


class Adopted(NamedTuple):
    """What became of newer models."""

    models: int = 0
    failed: int = 0
    seconds: float = 0.0  # of the last one, from the look at its source to its first request
    at: float = 0.0  # unix seconds; 0: there was none
    trouble: str = ""  # why the newest one is not served


class Live:
    """A model that is served, and those before it whose requests have not ended. Models may share an engine."""

    def __init__(self, served: Served):
        self.now, self.adopted = served, Adopted()
        self._old: list[Served] = []
        self._users: dict[int, int] = {}  # requests that may still be submitted, by the model
        self._past = Counts()  # what engines that are closed have counted
        self._closing = False
        self._changed = threading.Condition()

    @contextmanager
    def used(self) -> Iterator[Served]:
        """The model, for a request from its tokens to its submission. Its engine takes requests for as long."""
        with self._changed:
            served = self.now
            self._users[id(served)] = self._users.get(id(served), 0) + 1
        try:
            yield served
        finally:
            with self._changed:
                self._users[id(served)] -= 1
                if not self._users[id(served)]:
                    del self._users[id(served)]
                self._changed.notify_all()

    def adopt(self, served: Served) -> None:
        """Serve another model from now on. Returns at once, or, where `OLD` models have requests at work, when one of them has none."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._old) < OLD or self._closing)
            if self._closing:
                return served.engine.close()
            before, self.now = self.now, served
            self._old.append(before)
        threading.Thread(target=self._retire, args=(before,), name="elmwood-retire", daemon=True).start()

    def _retire(self, served: Served) -> None:
        """Let the requests of a model end, then close it."""
        until = time.monotonic() + LONG
        with self._changed:
            self._changed.wait_for(lambda: not self._users.get(id(served)) or self._closing, LONG)
        shared = served.engine is self.now.engine
        if not shared:
            served.engine.close(max(0.0, until - time.monotonic()))
        with self._changed:
            if not shared:
                counts = served.engine.counts()
                self._past = self._past._replace(
                    loads=self._past.loads + counts.loads, load_seconds=self._past.load_seconds + counts.load_seconds,
                    mismatches=self._past.mismatches + counts.mismatches, failed=self._past.failed + counts.failed,
                )  # fmt: skip
            self._old.remove(served)
            self._changed.notify_all()

    def counts(self) -> Counts:
        """Of all engines: requests and counters are summed, what is on the device is that of the model that is served."""
        with self._changed:
            old = {id(served.engine): served.engine for served in self._old if served.engine is not self.now.engine}
            now, others = self.now.engine.counts(), [self._past, *(engine.counts() for engine in old.values())]
        summed = ("waiting", "running", "rows", "loads", "load_seconds", "mismatches", "failed")
        return now._replace(**{name: getattr(now, name) + sum(getattr(other, name) for other in others) for name in summed})

    @property
    def engines(self) -> int:
        return 1 + len(self._old)

    def close(self) -> None:
        """End all that is at work."""
        with self._changed:
            self._closing = True
            engines = {id(served.engine): served.engine for served in (self.now, *self._old)}
            self._changed.notify_all()
        for engine in engines.values():
            engine.close()


class Follower:
    """A thread that looks for newer models, and serves them. One that cannot be had, opened or run is refused: the old one serves on."""

    def __init__(self, live: Live, source: Source):
        self.live, self.source, self.last = live, source, source.first
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elmwood-follow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is being fetched is left where it is, and goes on at the next start."""
        self._end.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._end.wait(self.source.every_s):
            self.look()

    def look(self) -> bool:
        """Look once; whether another model is served now."""
        began, live = time.monotonic(), self.live
        try:
            found = self.source.newest()
            if found == self.last:
                live.adopted = live.adopted._replace(trouble="")
                return False
            opened = self.source.open(found, like=live.now)
            if opened.engine is not live.now.engine:
                _try_or_close(opened.engine)
        except Exception as error:  # whatever it was, the old one serves on
            said = str(error) if isinstance(error, ElmwoodError) else f"{type(error).__name__}: {str(error)[:200]}"
            level = logger.warning if said != live.adopted.trouble else logger.debug  # a hub that is away says so once
            level("refused", extra={"fields": {"model": live.now.record.digest, "why": said}})
            live.adopted = live.adopted._replace(failed=live.adopted.failed + 1, trouble=said)
            return False
        self.last = found
        live.adopt(opened)
        taken = time.monotonic() - began
        live.adopted = live.adopted._replace(models=live.adopted.models + 1, seconds=taken, at=time.time(), trouble="")
        fields = {"model": opened.record.digest, "experts": len(opened.cards), "seconds": round(taken, 3)}
        logger.info("adopted", extra={"fields": fields})
        return True


def _try_or_close(engine: Engine) -> None:
    try:
        try_out(engine)
    except BaseException:
        engine.close()
        raise


def try_out(engine: Engine) -> None:
    """Let a new engine say one token. Raises BadInput where it cannot."""
    ended = threading.Event()
    events: list[Event] = []

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, Ended):
            ended.set()

    number = engine.submit(Request((engine.separator,), 1, 0.0), hear)
    if not ended.wait(TRIAL):
        with suppress(ElmwoodError):
            engine.cancel(number)
        raise BadInput(f"the new model said nothing for {TRIAL:.0f} s")
    last = events[-1]
    if isinstance(last, Ended) and last.reason in ("error", "cancelled"):
        raise BadInput(f"the new model cannot say a token: {last.detail or last.reason}")
