"""Workers end with the process that started them."""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPT = """
import sys
from dying import endless
from elmwood import engine
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
