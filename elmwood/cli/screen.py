"""What people see: progress on stderr, tables and digests on stdout, numbers a person can read."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from elmwood.engine import LEVEL, NOTE, processes
from elmwood.engine import Progress as Report
from elmwood.records import Record
from elmwood.units import duration, printable, short

PLAIN: dict[str, Any] = {"highlight": False, "markup": False}  # names come from others: "[/x]" in one is text


class Screen(Console):
    """A console that prints names and texts of others as they are, never as commands to the terminal."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)


talk = Screen(stderr=True, **PLAIN)
out = Screen(**PLAIN)
EVERY = 5.0  # seconds between two lines of progress


class _Rate(ProgressColumn):
    """Done of total, and how fast."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        speed = task.finished_speed or task.speed
        rate = f" {short(speed)} {unit}/s" if speed else ""
        of = f"/{short(task.total)}" if task.total else ""
        return Text(f"{short(task.completed)}{of}{rate or ' ' + unit}{task.fields.get('level', '')}", style="dim", no_wrap=True)


@contextmanager
def bars() -> Iterator[Report]:
    """Progress on stderr. On a terminal a bar per task, with rate and time left; elsewhere, such as in a log file, plain lines."""
    if not talk.is_terminal:
        lines = Lines(write_line)
        with beating(lines.beat):
            yield lines.progress
        lines.close()
        return
    left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    columns = (TextColumn("{task.description:<28}", markup=False, table_column=Column(no_wrap=True)), BarColumn(16), _Rate(), left)
    with Progress(*columns, console=talk) as display:
        tasks: dict[str, TaskID] = {}
        said: set[str] = set()

        def progress(what: str, done: float, total: float, unit: str) -> None:
            if unit == NOTE:
                if what not in said:
                    said.add(what)
                    display.console.print(what)
                return
            if unit == LEVEL:
                for task in list(tasks.values())[-1:]:
                    display.update(task, level=_level(what, done))
                return
            if what not in tasks:
                tasks[what] = display.add_task(printable(what), total=None, unit=unit)
            display.update(tasks[what], completed=done, total=total or None, unit=unit)  # 0: not known

        yield progress


def is_first() -> bool:
    """Whether this process is the only one of its run, or the first of those that torchrun started: the others say nothing."""
    return processes()[0] == 0


def write_line(line: str) -> None:
    """A line on stderr, as it is."""
    talk.print(line, markup=False, soft_wrap=True)


@contextmanager
def beating(beat: Callable[[], None], every: float = 1.0) -> Iterator[None]:
    """Call a function every second, in a thread, until the block ends: a task that reports nothing for long is still shown."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(every):
            beat()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Running(NamedTuple):
    """What is known of a task."""

    unit: str
    done: float
    total: float  # 0: not known
    first: float  # what was done when the task began: a resumed one does not begin at 0
    began: float  # seconds on the clock
    written: float  # when its last line was written


class Lines:
    """Progress as plain lines: one when a task begins, one about every 5 seconds while it runs, and one when it is done."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic, every: float = EVERY):
        self.write, self.clock, self.every = write, clock, every
        self.running: dict[str, Running] = {}
        self.level = ""  # of the device's use, where a task measures it
        self.said: set[str] = set()  # notes
        self.ended: set[tuple[str, str]] = set()  # what and unit of finished tasks: they may report their end again
        self.lock = threading.RLock()  # the beat comes from another thread

    def progress(self, what: str, done: float, total: float, unit: str) -> None:
        """An event of a task. One whose unit changes (reading bytes, then training tokens) begins anew."""
        if unit == NOTE:
            if what not in self.said:
                self.said.add(what)
                self.write(what)
            return
        if unit == LEVEL:
            self.level = "," + _level(what, done)
            return
        with self.lock:
            now, task = self.clock(), self.running.get(what)
            complete = 0 < total <= done
            if complete and task is None and (what, unit) in self.ended:
                return
            if task is None or task.unit != unit:
                task = Running(unit, done, total, done, now, now)
                if not complete:
                    self.write(f"{what}: {_amount(task)}" if unit else what)
            task = self.running[what] = task._replace(done=done, total=total)
            if complete:
                self._end(what)
            else:
                self.beat()

    def beat(self) -> None:
        """Write a line for each running task that has had none for so long."""
        with self.lock:
            now = self.clock()
            for what, task in self.running.items():
                if now - task.written >= self.every:
                    self.write(f"{what}: {_amount(task)}{_speed(task, now)}{self.level if task.unit == 'tokens' else ''}")
                    self.running[what] = task._replace(written=now)

    def close(self) -> None:
        """End the tasks whose total was never known."""
        with self.lock:
            for what in list(self.running):
                self._end(what)

    def _end(self, what: str) -> None:
        task = self.running.pop(what)
        self.ended.add((what, task.unit))
        amount = f"{short(task.done)} {task.unit} " if task.unit else ""
        self.write(f"{what}: done, {amount}in {_time(self.clock() - task.began)}")


def _level(what: str, percent: float) -> str:
    """' 34 % MFU'."""
    return f" {percent:.2g} % {what}"


def _time(seconds: float) -> str:
    """A duration to a tenth of a second."""
    return duration(round(seconds, 1))


def _amount(task: Running) -> str:
    """'1.2M of 3M tokens', or as much of that as is known."""
    of = f" of {short(task.total)}" if task.total else ""
    return f"{short(task.done)}{of} {task.unit}" if task.unit else "still at work"


def _speed(task: Running, now: float) -> str:
    """', 45k tokens/s, 40 s left', or how long the task has run where it has no speed yet."""
    speed = (task.done - task.first) / (now - task.began) if now > task.began else 0
    if speed <= 0:
        return f", for {_time(now - task.began)}"
    left = f", {_time((task.total - task.done) / speed)} left" if task.total else ""
    return f", {short(speed)} {task.unit}/s{left}"


def made(record: Record, name: str | None, as_json: bool) -> None:
    """Print what a command made: its name and digest, or the record as JSON."""
    if as_json:
        emit({"name": name, "digest": record.digest, "record": record.model_dump(mode="json")})
    else:
        out.print(f"{record.digest}  {name or ''}".rstrip(), soft_wrap=True)


def verdicts(found: Sequence[Any], name: Callable[[Any], str], as_json: bool) -> None:
    """Print checks, records with `good` and `said`, and end with status 1 where one failed."""
    if as_json:
        emit([one._asdict() for one in found])
    else:
        for one in found:
            out.print(f"{'good' if one.good else 'BAD '} {name(one)}: {one.said}", soft_wrap=True, markup=False)
    if not all(one.good for one in found):
        sys.exit(1)


def emit(value: Any) -> None:
    """One JSON value on stdout."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    json.dump(value, sys.stdout, ensure_ascii=not utf8, allow_nan=False)
    sys.stdout.write("\n")


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = (), to: Console = out) -> None:
    """A table; the first column is text, the others are numbers."""
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for place, column in enumerate(head):
        grid.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    for place, row in enumerate(rows):
        grid.add_row(*row, style=styles[place] if styles else "")
    to.print(title, style="bold", soft_wrap=True)
    width = max(to.width, Measurement.get(to, to.options.update(width=1000), grid).maximum)  # never cut: a narrow terminal wraps
    Screen(file=to.file, width=width, **PLAIN).print(grid)
