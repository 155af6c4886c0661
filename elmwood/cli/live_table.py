"""The table of a training: a row for each expert, and whether it waits, reads, trains or is done.

Progress comes from the tasks. Losses come from their logs in the store, so they are the same from a process, from Ray and from another
machine that works on the same store. On a terminal the table is live; elsewhere, such as in a log file, plain lines say what changes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from elmwood.cli.screen import EVERY, beating, talk, write_line
from elmwood.engine import LEVEL, NOTE, Progress
from elmwood.store import Store
from elmwood.study.training import Planned
from elmwood.units import duration, short

STAGES = {"training": "green", "reading": "cyan", "waiting": "dim", "done": ""}
LOOK = 0.5  # seconds between two looks at the store


class JobProgress(NamedTuple):
    """The last event of a job, and the first one in this run."""

    done: float
    unit: str
    first: float  # what was done at the first event
    since: float  # seconds on the clock, of the first event
    now: float  # and of the last


class ExpertRow(NamedTuple):
    """What the table shows of an expert."""

    name: str
    stage: str
    done: float  # tokens
    tokens: int
    loss: float | None  # nats per token
    speed: float | None  # tokens per second

    @property
    def left(self) -> float | None:
        """Seconds."""
        return (self.tokens - self.done) / self.speed if self.speed and self.stage == "training" else None


class LiveTable:
    """What is known of each expert."""

    def __init__(self, planned: Sequence[Planned], store: Store, clock: Callable[[], float] = time.monotonic):
        self.planned, self.store, self.clock = planned, store, clock
        self.jobs: dict[str, JobProgress] = {}
        self.final: dict[str, ExpertRow] = {}
        self.looked: float | None = None
        self.found: list[ExpertRow] = []

    def progress(self, job: str, done: float, total: float, unit: str) -> None:
        """An event of a job."""
        if unit in (LEVEL, NOTE):
            return
        now, before = self.clock(), self.jobs.get(job)
        first, since = (before.first, before.since) if before and before.unit == unit else (done, now)
        self.jobs[job] = JobProgress(done, unit, first, since, now)

    def rows(self, *, fresh: bool = False) -> list[ExpertRow]:
        """A row for each expert; the store is read every half second, or now if `fresh`."""
        now = self.clock()
        if fresh or self.looked is None or now - self.looked >= LOOK:
            self.found, self.looked = [self._row(expert) for expert in self.planned], now
        return self.found

    def _row(self, expert: Planned) -> ExpertRow:
        if expert.key in self.final:
            return self.final[expert.key]
        log = self.store.logged(expert.key)
        loss = next((line["loss"] for line in reversed(log) if line.get("event") == "point"), None)
        if self.store.done(expert.key):
            end: dict = next((line for line in reversed(log) if line.get("event") == "done"), {})
            speed = end["tokens"] / end["seconds"] if end.get("seconds") else None
            self.final[expert.key] = ExpertRow(expert.name, "done", end.get("tokens", expert.tokens), expert.tokens, loss, speed)
            return self.final[expert.key]
        job = self.jobs.get(expert.job)
        if job is None:
            return ExpertRow(expert.name, "waiting", log[-1].get("tokens", 0) if log else 0, expert.tokens, loss, None)
        if job.unit != "tokens":
            return ExpertRow(expert.name, "reading", 0, expert.tokens, loss, None)
        speed = (job.done - job.first) / (job.now - job.since) if job.now > job.since else None
        return ExpertRow(expert.name, "training", job.done, expert.tokens, loss, speed)

    def __rich__(self) -> Group:
        room = max(3, talk.height - 4) if talk.is_terminal else len(self.planned)
        return Group(draw_rows(self.rows(), room), Text(summarise(self.rows()), style="bold"))


def draw_rows(rows: Sequence[ExpertRow], room: int) -> Table:
    """At most `room` rows. If there are more experts, those at work come first; the summary counts the rest."""
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for place, column in enumerate(("expert", "", "tokens", "loss", "tokens/s", "left")):
        grid.add_column(column, justify="left" if place < 2 else "right", no_wrap=True)
    if len(rows) > room:
        order = list(STAGES)
        rows = sorted(rows, key=lambda row: order.index(row.stage))[:room]
    for row in rows:
        grid.add_row(
            row.name, row.stage, f"{short(row.done)}/{short(row.tokens)}", "" if row.loss is None else f"{row.loss:.3f}",
            "" if row.speed is None else short(row.speed), "" if row.left is None else duration(row.left), style=STAGES[row.stage],
        )  # fmt: skip
    return grid


def summarise(rows: Sequence[ExpertRow]) -> str:
    """How many experts are at each stage, the speed of all at work, and the time until the last is done."""
    counts = {stage: sum(row.stage == stage for row in rows) for stage in STAGES}
    words = [", ".join(f"{number} {stage}" for stage, number in counts.items() if number)]
    if speed := sum(row.speed or 0 for row in rows if row.stage == "training"):
        left = sum(row.tokens - row.done for row in rows if row.stage != "done")
        words += [f"{short(speed)} tokens/s", f"about {duration(left / speed)} left"]
    return " · ".join(words)


class TableLines:
    """The table as plain lines: one when an expert changes its stage, and a summary about every 5 seconds."""

    def __init__(self, table: LiveTable, write: Callable[[str], None], every: float = EVERY):
        self.table, self.write, self.every = table, write, every
        self.stages: dict[str, str] = {}  # by key of the expert's task
        self.written: float | None = None  # seconds on the table's clock

    def beat(self) -> None:
        """Write what has changed."""
        rows, now = self.table.rows(), self.table.clock()
        for expert, row in zip(self.table.planned, rows, strict=True):
            if self.stages.get(expert.key, "waiting") != row.stage:
                self.write(f"{row.name}: {describe(row)}")
            self.stages[expert.key] = row.stage
        if self.written is None or now - self.written >= self.every:
            self.write(f"{len(rows)} experts: {summarise(rows)}")
            self.written = now


def describe(row: ExpertRow) -> str:
    """'done, 800 tokens, loss 2.500, 150 tokens/s', or as much of that as is known."""
    words = [row.stage, *([f"{short(row.done)} tokens"] if row.stage == "done" else [])]
    words += [f"loss {row.loss:.3f}"] if row.loss is not None else []
    return ", ".join(words + ([f"{short(row.speed)} tokens/s"] if row.speed else []))


@contextmanager
def live_table(planned: Sequence[Planned], store: Store) -> Iterator[Progress]:
    """Show the table while the tasks run, and leave it there. If stderr is not a terminal, plain lines are written instead."""
    table = LiveTable(planned, store)
    if talk.is_terminal:
        with Live(table, console=talk, refresh_per_second=2, vertical_overflow="crop"):
            yield table.progress
            table.rows(fresh=True)
        return
    lines = TableLines(table, write_line)
    lines.beat()
    with beating(lines.beat):
        yield table.progress
    table.rows(fresh=True)
    lines.beat()
    talk.print(table)
