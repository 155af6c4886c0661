"""Several servers of one model behind a gateway: processes of this machine, or actors on Ray. One that dies is started again."""

import multiprocessing
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol, Self

import httpx2 as httpx

from elmwood.engine import connect_ray, cores, gpus
from elmwood.ensemble.batch.interface import USUAL, Limits
from elmwood.errors import BadInput, ElmwoodError
from elmwood.registry import lookup
from elmwood.serve.gateway.upstream import Unreachable
from elmwood.store import Store
from elmwood.study.ancestry import name_of

PATIENCE = 600.0  # seconds until a replica serves
ADOPTION = 120.0  # seconds that replicas get to serve a newer model
LOOK = 1.0  # seconds between two looks of a replica for a newer one
ENDING = 10.0  # seconds that one gets to end


class Plan(NamedTuple):
    """What replicas serve."""

    model: str  # a name in the store, or a digest
    name: str  # what clients call it
    store: str  # a folder that all machines see
    key: str  # that the gateway sends with each request
    limits: Limits = USUAL
    mixing: str | None = None
    settings: Mapping[str, str] | None = None
    watch: bool = False  # serve what the name means by then

    @classmethod
    def of(cls, model: str, store: Store, name: str | None = None, **more: Any) -> Self:
        return cls(model, name or name_of(model, store), str(store.root.resolve()), secrets.token_urlsafe(32), **more)

    def resolve(self) -> str:
        """The digest of the model by now. Raises UnknownName."""
        return Store(self.store).resolve(self.model)

    @property
    def requests(self) -> int:
        """At once, at one replica."""
        return self.limits.queue + self.limits.running


class Replicas(Protocol):
    """Servers by number. Methods may be called from any thread."""

    def find(self, number: int) -> str:
        """The address of one, which is started where it does not run. Raises Unreachable."""
        ...

    def close(self) -> None: ...


def serve_plan(plan: Plan, host: str, ready: Callable[[str], None]) -> None:
    """Serve until the process is told to stop, or ends."""
    from elmwood.serve.live import Source
    from elmwood.serve.logs import start_log
    from elmwood.serve.model import open_served
    from elmwood.serve.run import serve

    start_log("none")
    opening = partial(
        open_served, store=Store(plan.store), mixing=plan.mixing, settings=plan.settings, limits=plan.limits, name=plan.name
    )  # fmt: skip
    first = plan.resolve()
    source = Source(plan.resolve, opening, LOOK, first) if plan.watch else None
    serve(opening(first), host, 0, keys=[plan.key], names=[host], source=source, drain_s=ENDING, ready=ready)


def await_model(urls: Sequence[str], model: str) -> None:
    """Wait until all of these servers serve a model, by its digest; those that do not answer are started anew, with it. Raises BadInput."""
    until, left = time.monotonic() + ADOPTION, list(urls)
    with httpx.Client(trust_env=False, timeout=10.0) as client:
        while left:
            try:
                found = client.get(f"{left[0]}/readyz").json().get("model")
            except httpx.HTTPError:
                found = model
            if found == model:
                left.pop(0)
            elif time.monotonic() > until:
                raise BadInput(f"a replica still serves {str(found)[:8]} after {ADOPTION:.0f} s, and not {model[:8]}")
            else:
                time.sleep(LOOK / 4)


# ---- processes of this machine ---------------------------------------------------------------------------------------


class Processes:
    """Each replica is a process; with several GPUs, each has one of its own."""

    def __init__(self, plan: Plan, count: int):
        self.plan, self.count, self.closed = plan, count, False
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[int, tuple[Any, str]] = {}  # process and address
        self._locks = [threading.Lock() for _ in range(count)]

    def find(self, number: int) -> str:
        with self._locks[number]:
            process, address = self._running.get(number, (None, ""))
            if process is not None and process.is_alive():
                return address
            if self.closed:
                raise Unreachable("the server closes")
            devices = gpus()
            here, there = self._context.Pipe(duplex=False)
            given = (self.plan, there, devices[number % len(devices)] if devices else None, max(1, cores() // self.count))
            process = self._context.Process(target=_child, args=given, name=f"elmwood-replica-{number}", daemon=True)
            process.start()
            there.close()
            self._running[number] = (process, "")
            with here:
                try:
                    address = here.recv() if here.poll(PATIENCE) else ""
                except EOFError:
                    address = ""
            if not address:
                process.kill()
                process.join()
                raise Unreachable(f"replica {number} ended before it served, with status {process.exitcode}")
            self._running[number] = (process, address)
            return address

    def close(self) -> None:
        self.closed = True
        for process, _ in self._running.values():
            process.terminate()
        for process, _ in self._running.values():
            process.join(ENDING)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._running.clear()


def _child(plan: Plan, said: Connection, device: str | None, threads: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch looks
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        assert parent
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    serve_plan(plan, "127.0.0.1", said.send)


# ---- Ray -------------------------------------------------------------------------------------------------------------


class Actors:
    """Each replica is an actor, on whichever machine of the cluster has room; Ray starts those again that die."""

    def __init__(self, plan: Plan, count: int):
        self.ray, _ = connect_ray(count)
        gpu = int(self.ray.cluster_resources().get("GPU", 0) > 0)
        options = {"num_cpus": 1, "num_gpus": gpu, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
        self.actors = [self.ray.remote(Actor).options(**options).remote(plan, os.getcwd()) for _ in range(count)]

    def find(self, number: int) -> str:
        try:
            return str(self.ray.get(self.actors[number].where.remote(), timeout=PATIENCE))
        except self.ray.exceptions.RayError as error:
            raise Unreachable(f"replica {number} does not run on Ray: {str(error)[-300:]}") from error

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)


class Actor:
    """One replica on Ray: a server in a thread of the actor's process."""

    def __init__(self, plan: Plan, folder: str):
        from ray.util import get_node_ip_address

        os.chdir(folder)
        self.address, self.error = "", ""
        served = threading.Event()

        def ready(address: str) -> None:
            self.address = address
            served.set()

        def run() -> None:
            try:
                serve_plan(plan, get_node_ip_address(), ready)
            except ElmwoodError as error:
                self.error = str(error)
            finally:
                served.set()

        threading.Thread(target=run, daemon=True).start()
        served.wait()

    def where(self) -> str:
        if not self.address:
            raise RuntimeError(self.error or "the server ended")
        return self.address


KINDS: dict[str, Callable[[Plan, int], Replicas]] = {"local": Processes, "ray": Actors}


def start(engine: str, plan: Plan, count: int) -> Replicas:
    """Raises UnknownName, MissingExtra, BadInput."""
    return lookup(KINDS, engine, "engine")(plan, count)
