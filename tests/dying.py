"""A task whose worker is killed once, for tests of engines. Light to import: every worker does."""

import os
import signal

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
