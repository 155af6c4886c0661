"""Progress where stderr is no terminal: plain lines, with the clock as an argument."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from elmwood.cli.screen import Lines, bars
from elmwood.engine import NOTE
from elmwood.study.demo import sum_progress
from elmwood.study.tasks import named


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_and_clock() -> tuple[Lines, Clock, list[str]]:
    clock, written = Clock(), []
    return Lines(written.append, clock), clock, written


def test_a_line_when_a_task_begins_every_five_seconds_and_when_it_is_done():
    lines, clock, written = lines_and_clock()
    for second in range(13):
        clock.now = second
        lines.progress("train", 100 * second, 1200, "tokens")
    lines.progress("train", 1200, 1200, "tokens")  # said again
    assert written == [
        "train: 0 of 1.2k tokens",
        "train: 500 of 1.2k tokens, 100 tokens/s, 7 s left",
        "train: 1k of 1.2k tokens, 100 tokens/s, 2 s left",
        "train: done, 1.2k tokens in 12 s",
    ]


def test_what_many_tasks_note_is_said_once():
    lines, _, written = lines_and_clock()
    for task in ("a", "b"):
        progress = named(task, sum_progress("both", {task: 9}, lines.progress) if task == "b" else lines.progress)
        progress("trains on cuda:0", 0, 0, NOTE)
        progress("read", 9, 9, "tokens")
    assert written == ["trains on cuda:0", "a: done, 9 tokens in 0 s", "both: done, 9 tokens in 0 s"]


def test_a_resumed_task_has_the_speed_of_this_run():
    lines, clock, written = lines_and_clock()
    lines.progress("train", 1000, 2000, "tokens")
    clock.now = 5
    lines.progress("train", 1050, 2000, "tokens")
    assert written[1] == "train: 1.05k of 2k tokens, 10 tokens/s, 95 s left"


def test_a_silent_task_is_still_shown():
    lines, clock, written = lines_and_clock()
    lines.progress("import model", 0, 0, "")
    lines.progress("read", 10, 0, "documents")
    for clock.now in (1, 5, 6):
        lines.beat()
    lines.close()
    assert written == [
        "import model",
        "read: 10 documents",
        "import model: still at work, for 5 s",
        "read: 10 documents, for 5 s",
        "import model: done, in 6 s",
        "read: done, 10 documents in 6 s",
    ]


def test_what_is_found_done_is_one_line_and_a_new_unit_is_a_new_task():
    lines, clock, written = lines_and_clock()
    lines.progress("0 apache", 7, 7, "bytes")
    clock.now = 1
    lines.progress("0 apache", 0, 80, "tokens")
    lines.progress("0 apache", 80, 80, "tokens")
    assert written == ["0 apache: done, 7 bytes in 0 s", "0 apache: 0 of 80 tokens", "0 apache: done, 80 tokens in 0 s"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.floats(0, 3))))
def test_lines_of_one_task_are_never_closer_than_the_interval(events):
    clock, stamped = Clock(), []
    lines = Lines(lambda line: stamped.append((clock.now, line)), clock)
    for what, done, wait in events:
        clock.now += wait
        lines.progress(what, done, 100, "steps")
    for task in "abc":
        times = [when for when, line in stamped if line.startswith(task)]
        assert all(after - before >= lines.every for before, after in itertools.pairwise(times))


def test_bars_write_lines_where_stderr_is_no_terminal(capsys):
    with bars() as progress:
        progress("read [corpus]", 0, 10, "bytes")
        progress("read [corpus]", 10, 10, "bytes")
    shown = capsys.readouterr()
    assert (shown.out, shown.err.splitlines()[0]) == ("", "read [corpus]: 0 of 10 bytes")
    assert shown.err.splitlines()[1].startswith("read [corpus]: done, 10 bytes in ")
