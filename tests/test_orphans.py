"""Workers end with the process that started them; a process that waits for another says so."""

import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from elmwood.store import Store

SCRIPT = """
import signal, sys
from dying import endless
from elmwood import engine
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has its children ignore
engine.run(endless, [sys.argv[1]] * 2, workers=2)
"""
PATIENCE = 120  # seconds on a busy machine; nothing is waited for that long unless it fails


def read(handle: int) -> bytes:
    """What is in the pipe next, b"" when nobody holds it open."""
    assert select.select([handle], [], [], PATIENCE)[0], "nothing came"
    return os.read(handle, 4096)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_workers_end_when_their_parent_is_killed(tmp_path, number):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    handle, keeper = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), os.open(pipe, os.O_WRONLY)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    workers: list[int] = []
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(pipe)], env=environment) as parent:
        try:
            came = b""
            while came.count(b"\n") < 2:
                came += read(handle)
            workers = [int(line) for line in came.split()]
            os.close(keeper)
            parent.send_signal(number)
            assert read(handle) == b"", "both closed it: they ended"
            workers.clear()
        finally:
            for pid in (*workers, parent.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.close(handle)


def test_a_run_that_waits_for_another_says_so(tmp_path):
    """The one that waits reports it, and lets the other go on by doing so: without a report both would stand still."""
    store, told = Store(tmp_path / "store"), threading.Event()
    seen = []

    def hear(what: str, done: float, total: float, unit: str) -> None:
        seen.append((what, done))
        told.set()

    with store.held("key", hear):
        pass
    assert not seen, "nobody held it"

    def work() -> None:
        with store.held("key", hear):
            pass

    with store.held("key"):
        other = threading.Thread(target=work)
        other.start()
        assert told.wait(PATIENCE)
    other.join(PATIENCE)
    assert seen == [("waiting for another process at this", 0), ("waiting for another process at this", 1)]
