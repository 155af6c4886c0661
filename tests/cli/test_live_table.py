"""The table of a training, and its plain lines, with the clock as an argument."""

import io

import pytest
from rich.console import Console

from elmwood.cli.live_table import ExpertRow, LiveTable, TableLines, draw_rows, summarise
from elmwood.records import Merged
from elmwood.store import Store
from elmwood.study.training import Planned

DONE = Merged(seed="0" * 64, method="average", settings={}, contributions=(), files={})


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(tmp_path, clock) -> LiveTable:
    planned = [Planned("one", "key-one", "one", 800), Planned("two", "key-two", "pair", 800), Planned("three", "key-three", "pair", 800)]
    return LiveTable(planned, Store(tmp_path), clock)


def test_rows_wait_read_train_and_are_done(table, clock):
    assert [row.stage for row in table.rows()] == ["waiting"] * 3
    table.progress("pair", 10, 100, "bytes")
    clock.now = 10
    assert [row.stage for row in table.rows()] == ["waiting", "reading", "reading"]
    table.store.log("key-two", event="point", loss=2.5, tokens=400)
    table.progress("pair", 400, 800, "tokens")  # it resumes: these were trained before
    clock.now = 20
    table.progress("pair", 500, 800, "tokens")
    two, three = table.rows()[1:]
    assert (two.stage, two.done, two.loss, two.speed, two.left) == ("training", 500, 2.5, 10, 30)
    assert (three.stage, three.loss) == ("training", None)
    table.store.log("key-two", event="done", seconds=4.0, tokens=600)  # patience ran out
    table.store.finish("key-two", DONE)
    assert table.rows()[1] == two  # the store is not read again so soon
    assert table.rows(fresh=True)[1] == ExpertRow("two", "done", 600, 800, 2.5, 150)
    assert summarise(table.rows()).startswith("1 training, 1 waiting, 1 done")


def test_if_experts_are_many_those_at_work_come_first():
    rows = [ExpertRow(str(number), "training" if number > 97 else "waiting", 0, 10, None, None) for number in range(100)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(draw_rows(rows, 5))
    assert [line.split()[0] for line in console.export_text().splitlines()[1:]] == ["98", "99", "0", "1", "2"]


def test_lines_say_what_changes_and_where_it_stands(table, clock):
    written: list[str] = []
    lines = TableLines(table, written.append)
    lines.beat()
    table.progress("pair", 0, 800, "tokens")
    for clock.now in (1, 2, 3, 4, 5):
        table.progress("pair", 100 * clock.now, 800, "tokens")
        lines.beat()
    table.store.log("key-two", event="point", loss=2.5, tokens=800)
    table.store.log("key-two", event="done", seconds=8.0, tokens=800)
    table.store.finish("key-two", DONE)
    clock.now = 8
    lines.beat()
    assert written == [
        "3 experts: 3 waiting",
        "two: training, 100 tokens/s",
        "three: training, 100 tokens/s",
        "3 experts: 2 training, 1 waiting · 200 tokens/s · about 7 s left",
        "two: done, 800 tokens, loss 2.500, 100 tokens/s",
    ]
