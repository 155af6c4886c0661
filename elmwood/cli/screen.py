"""What people see: progress bars on stderr, tables and digests on stdout, numbers a person can read."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from elmwood.engine import Progress as Report
from elmwood.records import Record
from elmwood.store import Store
from elmwood.units import duration, short
from elmwood.units import parse_count as count

__all__ = ["bars", "count", "duration", "emit", "expand", "keep", "made", "out", "short", "table", "talk"]

talk = Console(stderr=True, highlight=False)
out = Console(highlight=False)


class _Rate(ProgressColumn):
    """Done of total, and how fast."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        speed = task.finished_speed or task.speed
        rate = f" {short(speed)} {unit}/s" if speed else ""
        of = f"/{short(task.total)}" if task.total else ""
        return Text(f"{short(task.completed)}{of}{rate or ' ' + unit}", style="dim", no_wrap=True)


@contextmanager
def bars() -> Iterator[Report]:
    """Progress bars on stderr: one per task, with rate and time left; finished ones stay."""
    left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    columns = (TextColumn("{task.description:<28}", table_column=Column(no_wrap=True)), BarColumn(16), _Rate(), left)
    with Progress(*columns, console=talk) as display:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: float, total: float, unit: str) -> None:
            if what not in tasks:
                tasks[what] = display.add_task(what, total=None, unit=unit)
            display.update(tasks[what], completed=done, total=total or None, unit=unit)  # 0: not known

        yield progress


def expand(store: Store, names: Sequence[str]) -> list[str]:
    """Names with those that end in '/' replaced by all names below them. Raises UnknownName."""
    return [name for name in store.expand(names) if isinstance(name, str)]


def made(record: Record, name: str | None, as_json: bool) -> None:
    """Print what a command made: its name and digest, or the record as JSON."""
    if as_json:
        emit({"name": name, "digest": record.digest, "record": record.model_dump(mode="json")})
    else:
        out.print(f"{record.digest}  {name or ''}".rstrip(), soft_wrap=True)


def keep(store: Store, record: Record, name: str | None, as_json: bool) -> None:
    """Give the record its name, and print it."""
    if name:
        store.name(name, record.digest)
    made(record, name, as_json)


def emit(value: Any) -> None:
    """One JSON value on stdout."""
    json.dump(value, sys.stdout, ensure_ascii=False, allow_nan=False)
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
    Console(file=to.file, width=width, highlight=False).print(grid)
