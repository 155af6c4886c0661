"""Tasks whose worker is killed or never ends, for tests of engines. Light to import: every worker does."""

import os
import signal
import threading

from elmwood.merge.parallel import StateJob, make_state

VICTIM = 1  # the part whose worker dies


def killed_once(job: StateJob, progress) -> str:
    """make_state, but the first worker that is in the middle of the victim's part is killed as by `kill -9`."""
    marker = job.store / f"killed-{job.method}"

    def told(what: str, done: float, total: float, unit: str) -> None:
        if job.part[0] == VICTIM and 0 < done < total and not marker.exists():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        progress(what, done, total, unit)

    return make_state(job, told)


def endless(pipe: str, progress) -> None:
    """Write the worker's process id to a named pipe, and never end. The pipe stays open as long as the process lives."""
    handle = os.open(pipe, os.O_WRONLY)
    os.write(handle, f"{os.getpid()}\n".encode())
    threading.Event().wait()
