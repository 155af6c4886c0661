"""The live table of a training: a row for each expert, whether it waits, reads, trains or is done.

Progress comes from the tasks; losses come from their logs in the store, so that they are the same from a process, from Ray and from another
machine at work on the same store.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from elmwood.cli.screen import duration, short, talk
from elmwood.engine import Progress
from elmwood.store import Store
from elmwood.study.training import Planned

STATES = {"training": "green", "reading": "cyan", "waiting": "dim", "done": ""}
LOOK = 0.5  # seconds between two looks at the store


class Seen(NamedTuple):
    """What progress said of a job."""

    done: float
    unit: str
    first: float  # tokens done when it was first heard of, in this run
    since: float  # and when
    now: float


class Line(NamedTuple):
    """An expert as it stands."""

    name: str
    state: str
    done: float  # tokens
    tokens: int
    loss: float | None  # nats per token
    speed: float | None  # tokens per second

    @property
    def left(self) -> float | None:
        """Seconds."""
        return (self.tokens - self.done) / self.speed if self.speed and self.state == "training" else None


class Board:
    """What is known of each expert."""

    def __init__(self, entries: Sequence[Planned], store: Store):
        self.entries, self.store = entries, store
        self.seen: dict[str, Seen] = {}
        self.final: dict[str, Line] = {}
        self.looked = -LOOK
        self.found: list[Line] = []

    def progress(self, job: str, done: float, total: float, unit: str) -> None:
        now, before = time.monotonic(), self.seen.get(job)
        first, since = (before.first, before.since) if before and before.unit == unit else (done, now)
        self.seen[job] = Seen(done, unit, first, since, now)

    def lines(self) -> list[Line]:
        if time.monotonic() - self.looked >= LOOK:
            self.found, self.looked = [self._line(entry) for entry in self.entries], time.monotonic()
        return self.found

    def _line(self, entry: Planned) -> Line:
        if entry.key in self.final:
            return self.final[entry.key]
        log = self.store.logged(entry.key)
        loss = next((line["loss"] for line in reversed(log) if line.get("event") == "point"), None)
        if self.store.done(entry.key):
            end: dict = next((line for line in reversed(log) if line.get("event") == "done"), {})
            speed = end["tokens"] / end["seconds"] if end.get("seconds") else None
            self.final[entry.key] = Line(entry.name, "done", end.get("tokens", entry.tokens), entry.tokens, loss, speed)
            return self.final[entry.key]
        seen = self.seen.get(entry.job)
        if seen is None:
            return Line(entry.name, "waiting", log[-1].get("tokens", 0) if log else 0, entry.tokens, loss, None)
        if seen.unit != "tokens":
            return Line(entry.name, "reading", 0, entry.tokens, loss, None)
        speed = (seen.done - seen.first) / (seen.now - seen.since) if seen.now > seen.since else None
        return Line(entry.name, "training", seen.done, entry.tokens, loss, speed)

    def __rich__(self) -> Group:
        room = max(3, talk.height - 4) if talk.is_terminal else len(self.entries)
        return Group(drawn(self.lines(), room), summary(self.lines()))


def drawn(lines: Sequence[Line], room: int) -> Table:
    """At most `room` rows: where experts are more, those that are at work come first, and the summary counts the rest."""
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for place, column in enumerate(("expert", "", "tokens", "loss", "tokens/s", "left")):
        grid.add_column(column, justify="left" if place < 2 else "right", no_wrap=True)
    if len(lines) > room:
        order = list(STATES)
        lines = sorted(lines, key=lambda line: order.index(line.state))[:room]
    for line in lines:
        grid.add_row(
            line.name, line.state, f"{short(line.done)}/{short(line.tokens)}", "" if line.loss is None else f"{line.loss:.3f}",
            "" if line.speed is None else short(line.speed), "" if line.left is None else duration(line.left), style=STATES[line.state],
        )  # fmt: skip
    return grid


def summary(lines: Sequence[Line]) -> Text:
    """How many stand where, the speed of all at work, and the time until the last is done."""
    counts = {state: sum(line.state == state for line in lines) for state in STATES}
    words = [", ".join(f"{number} {state}" for state, number in counts.items() if number)]
    if speed := sum(line.speed or 0 for line in lines if line.state == "training"):
        left = sum(line.tokens - line.done for line in lines if line.state != "done")
        words += [f"{short(speed)} tokens/s", f"about {duration(left / speed)} left"]
    return Text(" · ".join(words), style="bold")


@contextmanager
def live_table(entries: Sequence[Planned], store: Store) -> Iterator[Progress]:
    """Show the table while the tasks run, and leave it standing. Where stderr is no terminal it is printed once, at the end."""
    table = Board(entries, store)
    with Live(table, console=talk, refresh_per_second=2, vertical_overflow="crop"):
        yield table.progress
        table.looked = -LOOK
    if not talk.is_terminal:
        talk.line()
