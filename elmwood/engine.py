"""Run a list of idempotent tasks: in this process, or side by side in others.

A task is a module-level function `task(input, progress)`. It names its own result by its inputs and skips what is
done, so a retry is free; the engine knows nothing of that.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from elmwood.errors import DoesNotFit

# (what, done, total, unit): called often; cheap to ignore
Progress = Callable[[str, float, float, str], None]
In = TypeVar("In")
Out = TypeVar("Out")


def silent(what: str, done: float, total: float, unit: str) -> None:
    """The progress nobody watches."""


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(task: Callable[[In, Progress], Out], inputs: Sequence[In], *, workers: int = 1, progress: Progress = silent) -> list[Out]:
    """[task(x) for x in inputs], by `workers` processes; results in the order of the inputs.

    The first error stops the rest and is raised; DoesNotFit where a worker was killed.
    """
    if workers <= 1 or len(inputs) <= 1:
        return [task(item, progress) for item in inputs]
    context = multiprocessing.get_context("spawn")
    events: Any = context.Queue()
    relay = threading.Thread(target=_relay, args=(events, progress), daemon=True)
    relay.start()
    pool = ProcessPoolExecutor(min(workers, len(inputs)), mp_context=context, initializer=_initialise, initargs=(events,))
    try:
        return list(pool.map(_call, [task] * len(inputs), inputs))
    except BrokenProcessPool as error:
        raise DoesNotFit(
            f"one of {workers} worker processes was killed, most likely for want of memory; run the same command again with fewer "
            "--workers: what is done is kept"
        ) from error
    except BaseException:
        for process in multiprocessing.active_children():  # tasks are idempotent: what they had saved is found again
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        events.put(None)  # after everything the workers put there
        relay.join(timeout=1)  # a worker that was terminated may have left the queue locked


_events: Any = None  # in a worker process: the way back to the parent's progress bar


def _initialise(events: Any) -> None:
    global _events
    _events = events


def _call(task: Callable[[In, Progress], Out], item: In) -> Out:
    return task(item, lambda *event: _events.put(event))


def _relay(events: Any, progress: Progress) -> None:
    while (event := events.get()) is not None:
        progress(*event)


def each(items: Iterable[In], what: str, total: float, unit: str, progress: Progress) -> Iterable[In]:
    """Pass items through, telling progress how many have gone by."""
    progress(what, 0, total, unit)
    for done, item in enumerate(items, 1):
        yield item
        progress(what, done, total, unit)
