"""While a lease is worked on: beats from a thread of their own, which carry the step; and pauses, asked for or needed."""

import threading
import time
from collections.abc import Callable
from typing import Any, Self

from elmwood.errors import ElmwoodError
from elmwood.hub.client.http import Hub, Problem, Unreachable
from elmwood.hub.client.probe import Watch, why_pause
from elmwood.hub.client.state import Folder, Options, Told, once
from elmwood.hub.messages import Beat, BeatReply, Grant, Held, Phase

LOOK = 5.0  # seconds between two looks at the load
SHARE = 0.8  # of the time between two beats that a lease allows


class LeaseLost(ElmwoodError):
    """The hub says that the lease is over."""


class Stopped(ElmwoodError):
    """The volunteer asked for an end; the lease is paused."""


class Beats:
    """A thread that keeps what a hub lent, until it is left. `lost`: why that is over."""

    def __init__(self, hub: Hub):
        self.hub, self.lost, self.end = hub, "", threading.Event()
        self.thread = threading.Thread(target=self._run, name="beats", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.end.set()
        self.thread.join()
        self.hub.close()

    def _run(self) -> None:
        raise NotImplementedError


class Beater(Beats):
    """Tells the hub of each step reached. A hub that cannot be reached ends nothing: training goes on."""

    def __init__(self, hub: Hub, grant: Grant):
        super().__init__(hub)
        self.grant, self.step, self.phase = grant, 0, "fetching"
        self.hub.sleep = self._sleep

    def _sleep(self, seconds: float) -> None:
        if self.end.wait(seconds):
            raise Unreachable("the work ended while the hub could not be reached")

    def _run(self) -> None:
        wait = self.beat()
        while not self.lost and not self.end.wait(wait):
            wait = self.beat()

    def beat(self) -> float:
        """One beat; seconds until the next."""
        grant = self.grant
        phase: Phase = self.phase  # type: ignore[assignment]
        body = Beat(token=grant.token, step=self.step, phase=phase)
        try:
            reply = self.hub.post(f"/v1/leases/{grant.lease}/beat", body, once("beat", grant.lease, time.time_ns()))
        except Problem as problem:
            if problem.status in (403, 404, 409, 410):
                self.lost = str(problem)
            return SHARE * grant.beat_s
        except ElmwoodError:
            return SHARE * grant.beat_s
        told = BeatReply.model_validate_json(reply.body)
        if not told.alive:
            self.lost = f"the lease of domain {grant.domain} is {told.state}"
        return SHARE * told.beat_s


class Pace:
    """What training asks after each step: is the lease still held, and is it time to pause or to stop?"""

    def __init__(
        self, beater: Beater, grant: Grant, folder: Folder, options: Options, device: str, until: float | None,
        tell: Callable[[Told], None], sleep: Callable[[float], None],
    ):  # fmt: skip
        self.beater, self.grant, self.folder, self.options, self.until = beater, grant, folder, options, until
        self.tell, self.sleep = tell, sleep
        self.watch = Watch(device) if options.pause_when_busy or options.max_temp is not None else None
        self.looked = time.monotonic()
        self.pauses = 0

    def begin(self, phase: Phase) -> None:
        """Enter a phase, which the next beats carry. Raises LeaseLost."""
        self.beater.phase = phase
        self._check()

    def step(self, done: int) -> None:
        """So many steps are done. Raises LeaseLost, Stopped."""
        self.beater.step = done
        self.tell(Told("training", step=done, steps=self.grant.recipe.steps, grant=self.grant))
        self._check()
        if self.options.step_pause:
            self.sleep(self.options.step_pause)
        if self.until is not None and time.monotonic() > self.until:
            self._say("pause")
            raise Stopped(f"the time is over at step {done}; the lease is paused, and the same command goes on")
        if reason := self._reason():
            self._pause(reason)

    def _check(self) -> None:
        if self.beater.lost:
            raise LeaseLost(self.beater.lost)

    def _reason(self) -> str:
        """Why to pause now, looked at every few seconds."""
        if self.folder.paused.exists():
            return "paused by you"
        if self.watch is None or time.monotonic() - self.looked < LOOK:
            return ""
        self.looked = time.monotonic()
        return why_pause(self.watch.look(), when_busy=self.options.pause_when_busy, most_degrees=self.options.max_temp)

    def _pause(self, reason: str) -> None:
        self._say("pause")
        self.tell(Told("paused", reason, grant=self.grant))
        while self._reason() or (self.watch is not None and time.monotonic() - self.looked < LOOK):
            self._check()
            self.sleep(1.0)
            if self.until is not None and time.monotonic() > self.until:
                raise Stopped("the time is over while it was paused; the same command goes on")
        self._say("resume")

    def _say(self, what: str) -> None:
        """Tell the hub of a pause or its end; a hub that cannot be reached hears of it by the beats."""
        self.pauses += 1
        target, grant = f"/v1/leases/{self.grant.lease}/{what}", self.grant
        try:
            self.beater.hub.post(target, Held(token=grant.token), once(what, grant.lease, time.time_ns()))
        except Problem as problem:
            if problem.status in (404, 409, 410):
                raise LeaseLost(str(problem)) from problem
        except ElmwoodError:
            pass
