"""Run a list of idempotent tasks: in this process, in parallel processes, or on Ray.

A task is a module-level function `task(input, progress)`. It names its result by its inputs and skips what is done, so a retry
costs nothing.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from elmwood.errors import BadInput, DoesNotFit
from elmwood.registry import lookup, require

# (what, done, total, unit): called often
Progress = Callable[[str, float, float, str], None]
In = TypeVar("In")
Out = TypeVar("Out")
P = ParamSpec("P")
Task = Callable[[In, Progress], Out]
# (task, inputs, workers, gpu, progress) -> (index of the input, result), in the order of completion
Engine = Callable[[Task, Sequence[Any], int, bool, Progress], Iterator[tuple[int, Any]]]

LEVEL = "%"  # the unit of an event that is a level, such as the use of a device; its `what` names what is measured
NOTE = "note"  # the unit of an event that is said once
DEVICE = "ELMWOOD_DEVICE"  # the variable that names where to compute, for this process and its workers
AHEAD = "ELMWOOD_AHEAD"  # the variable that tells elmwood.ahead what to import
RETRIES = 3  # of a Ray task whose worker died
COPIES = sys.platform == "linux"  # whether workers are copies of a process that only imports; libraries of other systems do not bear it
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "dri/renderD*")  # device files
TICK = 0.2  # seconds between polls of the progress of Ray tasks
OBJECTS = 100_000_000  # bytes of a local Ray's object store: inputs and results are small records


def silent(what: str, done: float, total: float, unit: str) -> None:
    """Ignore progress."""


_device: ContextVar[str | None] = ContextVar("device", default=None)


def named_device() -> str | None:
    """The device that the call of a verb names, else ELMWOOD_DEVICE; None: the best there is (elmwood/lm/devices.py)."""
    return _device.get() or os.environ.get(DEVICE) or None


def placed(verb: Callable[P, Out]) -> Callable[P, Out]:
    """A function whose keyword `device` ("cpu", "cuda:1", ...) says where everything that it runs computes, its workers too."""

    @wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> Out:
        named = kwargs.get("device")
        token = _device.set(_device.get() if named is None else str(named))
        try:
            return verb(*args, **kwargs)
        finally:
            _device.reset(token)

    return call


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """The names of the CUDA devices that this process may use, without importing torch; none if it was told to use another device."""
    if (named_device() or "cuda") != "cuda":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)
    return found if named is None else [one.strip() for one in named.split(",") if one.strip() not in ("", "-1")]


def processes() -> tuple[int, int]:
    """The rank of this process among those of one run, and their number, where torchrun or Ray Train started them; else 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def run(
    task: Callable[[In, Progress], Out],
    inputs: Sequence[In],
    *,
    workers: int = 1,
    engine: str = "local",
    gpu: bool = False,
    what: str = "",
    torch: Sequence[str] = (),
    progress: Progress = silent,
) -> list[Out]:
    """[task(x) for x in inputs], with `workers` tasks in parallel; results in the order of the inputs.

    `engine` is a row of ENGINES or a module:function. `gpu`: tasks can use a GPU, and parallel ones get one each. `what` names a
    progress bar that counts finished tasks. `torch`: modules of `prepare`. The first error stops the other tasks and is raised;
    DoesNotFit if a worker was killed. Raises UnknownName, MissingExtra.
    """
    found: dict[int, Out] = {}
    if engine == "local" and min(workers, len(inputs)) > 1:
        prepare(task.__module__, torch=torch)
    if what:
        progress(what, 0, len(inputs), "tasks")
    for place, result in lookup(ENGINES, engine, "engine")(task, inputs, workers, gpu, progress):
        found[place] = result
        if what:
            progress(what, len(found), len(inputs), "tasks")
    return [found[place] for place in range(len(inputs))]


def each(items: Iterable[In], what: str, total: float, unit: str, progress: Progress) -> Iterable[In]:
    """Iterate over items and report progress."""
    progress(what, 0, total, unit)
    for done, item in enumerate(items, 1):
        yield item
        progress(what, done, total, unit)


# ---- local: processes of this machine --------------------------------------------------------------------------------


def _local(task: Task, inputs: Sequence[Any], workers: int, gpu: bool, progress: Progress) -> Iterator[tuple[int, Any]]:
    if workers <= 1 or len(inputs) <= 1:
        for place, item in enumerate(inputs):
            yield place, task(item, progress)
        return
    context: Any = multiprocessing.get_context(_method())
    events: Any = context.Queue()
    relay = threading.Thread(target=_relay, args=(events, progress), daemon=True)
    relay.start()
    workers, found = min(workers, len(inputs)), gpus() if gpu else []
    devices: Any = context.Queue()
    for number in range(workers if found else 0):
        devices.put(found[number % len(found)])
    given = (events, devices if found else None, named_device(), dict(os.environ))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_initialise, initargs=given)
    try:
        with _begin():
            places = {pool.submit(_call, task, item): place for place, item in enumerate(inputs)}
        for future in as_completed(places):
            yield places[future], future.result()
    except BrokenProcessPool as error:
        raise DoesNotFit(_killed(f"one of {workers} worker processes was killed")) from error
    except BaseException:
        for process in multiprocessing.active_children():  # tasks are idempotent: they resume from what they saved
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        events.put(None)  # after everything the workers put there
        relay.join(timeout=1)  # a terminated worker may have left the queue locked


_prepared = 0  # the process that has begun another whose copies its workers are
_with_torch = False  # whether that one may have imported torch


def prepare(*names: str, torch: Sequence[str] = ()) -> None:
    """Begin to import modules in a process whose copies this one's workers will be; returns at once. Only the first call counts.

    A worker has them from its start, and imports others itself. `module:function` calls a function too. `torch`: those that import torch;
    they are left out where something other than the CPU may be used, which a copy could not.
    """
    global _prepared, _with_torch
    if COPIES and not _prepared:
        _prepared, _with_torch = os.getpid(), bool(torch) and _only_cpu()
        multiprocessing.set_forkserver_preload(["elmwood.ahead"])
        with _begin(**{AHEAD: " ".join([*names, *(torch if _with_torch else ())])}):
            forkserver.ensure_running()


def _method() -> str:
    """How workers start. A process that was forked has no copies of its parent's."""
    return "forkserver" if _prepared == os.getpid() and (_only_cpu() or not _with_torch) else "spawn"


def _only_cpu() -> bool:
    """Whether tasks are certain to compute on the CPU: told to, or there is nothing else."""
    named = named_device()
    return named == "cpu" or (named is None and not any(found for kind in ACCELERATORS for found in Path("/dev").glob(kind)))


@contextmanager
def _begin(**variables: str) -> Iterator[None]:
    """Processes that begin meanwhile import what this one does, and nothing from the working folder. They do not run the caller's script
    again, which may have no `if __name__ == "__main__"`. Ctrl-C is for this process, which ends them."""
    main: dict[str, Any] = vars(sys.modules["__main__"])  # type: ignore[assignment]
    hidden: dict[str, Any] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    variables |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        main.update(hidden)


def _killed(what: str) -> str:
    return f"{what}, most likely because memory ran out; run the command again with fewer --workers: it resumes"


_events: Any = None  # in a worker process: the queue to the parent's progress bar


def _initialise(events: Any, devices: Any, named: str | None, environment: dict[str, str]) -> None:
    global _events
    _events = events
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()  # that of the process it is a copy of
    os.environ.update(environment)
    if named:
        os.environ[DEVICE] = named
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()  # before torch looks


def _end_with_parent() -> None:
    """In a worker: wait for the end of the parent, however it ends, and end too. Tasks resume from what they saved."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _call(task: Task, item: Any) -> Any:
    return task(item, lambda *event: _events.put(event))


def _relay(events: Any, progress: Progress) -> None:
    while (event := events.get()) is not None:
        progress(*event)


# ---- ray: a cluster, or this machine ----------------------------------------------------------------------------------


def _ray(task: Task, inputs: Sequence[Any], workers: int, gpu: bool, progress: Progress) -> Iterator[tuple[int, Any]]:
    """On the cluster that this process is connected to, else on that of RAY_ADDRESS, else on a local one that ends with this process.

    `workers` limits the parallel tasks on a local one. A cluster runs as many as it has cores for, or GPUs if tasks can use one.
    """
    if not inputs:
        return
    ray, own = connect_ray(workers)
    board = ray.remote(_Board).options(num_cpus=0).remote()
    gpus = int(gpu and ray.cluster_resources().get("GPU", 0) > 0)
    call = ray.remote(_call_far).options(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
    waiting = deque(enumerate(inputs))
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and (not own or len(running) < workers):
                place, item = waiting.popleft()
                running[call.remote(task, item, board, os.getcwd(), named_device())] = place
            ready, _ = ray.wait(list(running), timeout=TICK)
            for event in ray.get(board.take.remote()):
                progress(*event)
            for reference in ready:
                yield running.pop(reference), ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # the error of the task itself
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
        raise DoesNotFit(_killed(f"a Ray worker was killed {RETRIES + 1} times")) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)  # tasks are idempotent: they resume from what they saved
        ray.kill(board)


def connect_ray(workers: int) -> tuple[Any, bool]:
    """The library, and whether the cluster was started here. Raises MissingExtra, BadInput."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = require("ray", "ray")
    address = os.environ.get("RAY_ADDRESS", "")
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if not address:
            quiet |= {"num_cpus": max(workers, cores()), "include_dashboard": False, "object_store_memory": OBJECTS}
        try:
            ray.init(address=address or "local", namespace=OWN if not address else None, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BadInput(
                f"no Ray cluster at {address or 'this machine'} ({error}): start one, or unset RAY_ADDRESS for one here"
            ) from error
    return ray, ray.get_runtime_context().namespace == OWN


OWN = "elmwood-local"  # the namespace of a Ray that was started here


class _Board:
    """The latest event of each progress bar, from the tasks to the process that draws them."""

    def __init__(self) -> None:
        self.events: dict[str, tuple] = {}

    def post(self, *event: Any) -> None:
        self.events[event[0]] = event

    def take(self) -> list[tuple]:
        """The events since the last call."""
        events, self.events = list(self.events.values()), {}
        return events


def _call_far(task: Task, item: Any, board: Any, folder: str, named: str | None) -> Any:
    """A task on Ray, in the parent's working folder. The store must be on a disk that all machines share."""
    os.chdir(folder)
    posted: dict[str, float] = {}

    def post(what: str, done: float, total: float, unit: str) -> None:
        now = time.monotonic()
        if done >= total or now - posted.get(what, -TICK) >= TICK:
            posted[what] = now
            board.post.remote(what, done, total, unit)

    token = _device.set(named)
    try:
        return task(item, post)
    finally:
        _device.reset(token)  # other tasks of this process may be of another run


ENGINES: dict[str, Engine] = {"local": _local, "ray": _ray}
