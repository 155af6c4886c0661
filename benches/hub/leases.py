"""Durable lease lifecycles per second, and ten thousand workers that beat.

    python -m benches.hub.leases rate [--clients 1,8,32,128] [--seconds 5] [--database URL]
    python -m benches.hub.leases http [--clients 8,32,128] [--seconds 10]
    python -m benches.hub.leases swarm [--workers 10000] [--seconds 60] [--every 120] [--claims 2]

A lifecycle is a claim, two beats and a submission (with its commitment and its upload's rows): four durable writes, each guarded as over
HTTP (nonce, blocked keys, first replies). `rate` asks the database layer: `grouped` as the hub does it, `naive` with one transaction for
each request on a connection of its own, in the same run; `ratio` is grouped over naive. `of_it_clients`: what the clients take of the CPU
time. `fsync_ms` is one 4 kB write and fsync here. `http` is the real app in uvicorn, a process of its own, with signed requests. `swarm` is
the same app: workers that hold leases beat, and others claim, and never beat; seconds at the 50th and 99th per cent; `lost` counts workers'
leases that ever ended. The machine's load average and the CPU time of a lifecycle stand beside the rates: other work on the cores slows
them.
"""

import asyncio
import hashlib
import itertools
import json
import os
import secrets
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sqlalchemy import select

from benches.common import integers, parser, say
from benches.hub.server import Answer, Server, Wire
from elmwood.hub import signing
from elmwood.hub.actions import leases, members, submissions
from elmwood.hub.actions.request import Caller, Moment, Reply, Request, current, find_caller, perform
from elmwood.hub.database import Connection, Database, run_batch
from elmwood.hub.home import Home, Hub
from elmwood.hub.messages import Beat, Claim, Commitment, Consent, Grant, Limits, NewAccount, SubmissionRequest
from elmwood.hub.tables import event
from elmwood.store import Store
from tests.hub.server.world import open_run

BOOT, SALT = "b007" * 8, "5a" * 16
FREE = Limits(accounts_per_hour=10**6, requests_per_minute=10**6, leases_per_address=10**6)
_number = itertools.count()


def enter(hub: Hub, count: int) -> list[Any]:
    """Private keys of registered members who agreed to the licences."""
    keys = [signing.new_key() for _ in range(count)]

    def write(c: Connection) -> None:
        licences = current(c).licences
        for key in keys:
            name = signing.public(key)
            made = members.register(c, Caller(name, "", ""), NewAccount(name="x", recovery=name), hub.moment())
            members.agree(c, Caller(name, made.account, "member"), Consent(licences=licences, manifest=1), hub.moment(), "{}")

    hub.database.write(write)
    return keys


# ---- the database layer ----------------------------------------------------------------------------------------------


def lifecycle(key: str, when: Callable[[], Moment]) -> Iterator[Callable[[Connection], Any]]:
    """The four writes of one lifecycle; each yields a write and is sent its result."""

    def guarded(fn: Callable[[Connection, Caller], Any], status: int = 200, again: bool = False) -> Callable[[Connection], Any]:
        number = next(_number)
        known = Request(key, f"{number:032x}", int(time.time()), f"{number:064x}", "" if again else f"{number}")
        return lambda c: perform(c, known, fn, when(), status)

    reply = yield guarded(lambda c, who: leases.claim(c, who, Claim(tier="cpu", boot_id=BOOT), when()), 201)
    if not isinstance(reply, Reply):
        return
    grant = Grant.model_validate_json(reply.body)
    for step in (1, 2):
        yield guarded(lambda c, who, step=step: leases.beat(c, who, grant.lease, Beat(token=grant.token, step=step), when()), again=True)
    yield guarded(lambda c, who: give(c, who, grant, when()), 202)


def give(c: Connection, who: Caller, grant: Grant, when: Moment) -> Any:
    """Commitment, upload and submission in one write."""
    sha = hashlib.sha256(grant.lease.encode()).hexdigest()
    place = {"lease": grant.lease, "token": grant.token}
    submissions.promise(c, who, Commitment(commitment=signing.commit(sha, who.key, SALT), **place), when)
    upload = submissions.open_upload(c, who, grant.lease, grant.token, 10, when).upload
    submissions.advance(c, who, upload, 0, 10, sha, when)
    message = SubmissionRequest(upload=upload, adapter=sha, bytes=10, salt=SALT, **place)
    prepared, _ = submissions.prepare(c, who, message)
    return submissions.submit(c, who, message, prepared, when)


def grouped(hub: Hub, keys: list[str], seconds: float) -> tuple[int, list[float], float]:
    """Each client begins its next write when the last one is durable; lifecycles finished, seconds of each write, and CPU seconds that the
    clients took themselves."""
    end, done, taken, own = time.perf_counter() + seconds, [0], [], [0.0]
    idle = threading.Semaphore(0)

    def begin(key: str) -> None:
        work = lifecycle(key, hub.moment)
        follow(key, work, next(work))

    def follow(key: str, work: Any, write: Callable[[Connection], Any]) -> None:
        began = time.perf_counter()

        def durable(future: Future) -> None:
            taken.append(time.perf_counter() - began)
            thought = time.thread_time()
            try:
                following = work.send(future.result())
            except StopIteration:
                done[0] += 1
                begin(key) if time.perf_counter() < end else idle.release()
            else:
                own[0] += time.thread_time() - thought
                follow(key, work, following)

        hub.database.submit(write).add_done_callback(durable)

    for key in keys:
        begin(key)
    for _ in keys:
        idle.acquire()
    return done[0], taken, own[0]


def naive(database: Database, when: Callable[[], Moment], keys: list[str], seconds: float) -> tuple[int, list[float], float]:
    """The same writes, each in a transaction of its own on its client's connection."""
    end, done, taken, failed = time.perf_counter() + seconds, [0], [], []

    def live(key: str) -> None:
        connection = database.connect()
        while time.perf_counter() < end:
            work, result = lifecycle(key, when), None
            while True:
                try:
                    write = work.send(result)
                except StopIteration:
                    done[0] += 1
                    break
                began, future = time.perf_counter(), Future()
                try:
                    run_batch(connection, [(write, future)])
                except sqlite3.OperationalError:  # it waited longer than 30 s for the lock
                    failed.append(time.perf_counter() - began)
                    break
                taken.append(time.perf_counter() - began)
                result = future.result()
        connection.raw.close()

    threads = [threading.Thread(target=live, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done[0], taken + failed, 0.0


def rate(clients: list[int], seconds: float, database: str | None) -> None:
    for count in clients:
        found = {}
        for way in ("grouped", "naive"):
            with tempfile.TemporaryDirectory() as folder:
                hub = open_run(Path(folder), int(2500 * seconds) if way == "grouped" else int(400 * seconds) + count, database, limits=FREE)
                keys = [signing.public(key) for key in enter(hub, count)]
                began, cpu = time.perf_counter(), time.process_time()
                done, taken, own = grouped(hub, keys, seconds) if way == "grouped" else naive(hub.database, hub.moment, keys, seconds)
                found[way] = done / (time.perf_counter() - began)
                say(
                    f"hub.leases.{way}", clients=count, lifecycles_per_second=found[way], lifecycles=done,
                    write_p50_ms=1e3 * part(taken, 0.5), write_p99_ms=1e3 * part(taken, 0.99), database=hub.database.dialect,
                    fsync_ms=fsync_ms(Path(folder)), load=os.getloadavg()[0],
                    cpu_ms_per_lifecycle=1e3 * (time.process_time() - cpu) / max(done, 1), of_it_clients=1e3 * own / max(done, 1),
                )  # fmt: skip
                hub.close()
        say("hub.leases.ratio", clients=count, ratio=found["grouped"] / found["naive"])


def part(taken: list[float], share: float) -> float:
    return sorted(taken)[min(int(share * len(taken)), len(taken) - 1)]


def fsync_ms(folder: Path) -> float:
    """Milliseconds of one small durable write."""
    with (folder / "fsync").open("wb") as file:
        taken = []
        for _ in range(20):
            began = time.perf_counter()
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - began)
    return 1e3 * part(taken, 0.5)


# ---- the app ---------------------------------------------------------------------------------------------------------


async def ask(wire: Wire, key: Any, target: str, body: str, taken: list[float] | None = None) -> Answer:
    headers = signing.sign_request("POST", target, body.encode(), time.time(), key)
    headers |= {"Content-Type": "application/json", "Idempotency-Key": secrets.token_hex(8), "Elmwood-Client": "99"}
    began = time.perf_counter()
    try:
        reply = await wire.post(target, body, headers)
    except ConnectionError:  # the server closed an idle connection at that moment: asked again, as clients do
        return await ask(wire, key, target, body, taken)
    if taken is not None:
        taken.append(time.perf_counter() - began)
    return reply


CLAIM = Claim(tier="cpu", boot_id=BOOT).model_dump_json()


async def claim_and_beat(wire: Wire, key: Any, end: float, taken: list[float]) -> int:
    """Claims, two beats and a release, again and again."""
    done = 0
    while time.perf_counter() < end:
        grant = json.loads((await ask(wire, key, "/v1/leases", CLAIM, taken)).text)
        place = f"/v1/leases/{grant['lease']}"
        for step in (1, 2):
            await ask(wire, key, f"{place}/beat", Beat(token=grant["token"], step=step).model_dump_json(), taken)
        await ask(wire, key, f"{place}/release", f'{{"token":{grant["token"]}}}', taken)
        done += 1
    return done


def http(clients: list[int], seconds: float) -> None:
    for count in clients:
        with tempfile.TemporaryDirectory() as folder:
            hub = open_run(Path(folder), 2 * count, limits=FREE)
            keys = enter(hub, count)
            hub.close()
            server, taken = Server(Path(folder)), []

            async def run(server=server, keys=keys, taken=taken, count=count) -> int:
                wire = Wire(server.url, count)
                end = time.perf_counter() + seconds
                done = sum(await asyncio.gather(*(claim_and_beat(wire, key, end, taken) for key in keys)))
                await wire.close()
                return done

            began, cpu, server_cpu = time.perf_counter(), time.process_time(), server.cpu()
            done = asyncio.run(run())
            say(
                "hub.leases.http", clients=count, requests_per_second=len(taken) / (time.perf_counter() - began), lifecycles=done,
                p50_ms=1e3 * part(taken, 0.5), p99_ms=1e3 * part(taken, 0.99), start_s=server.seconds, load=os.getloadavg()[0],
                server_cpu_ms=1e3 * (server.cpu() - server_cpu) / len(taken), client_cpu_ms=1e3 * (time.process_time() - cpu) / len(taken),
            )  # fmt: skip
            server.stop()


def swarm(workers: int, seconds: float, every: float, claims: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        hub = open_run(Path(folder), workers + 100, limits=FREE)
        keys = enter(hub, workers)
        others = enter(hub, int(claims * seconds) + 1)

        def take_all(c: Connection) -> list[Grant]:
            found = []
            for key in keys:
                row = find_caller(c, signing.public(key))
                found.append(leases.claim(c, row, Claim(tier="cpu", boot_id=BOOT), hub.moment()))
            return found

        grants = hub.database.write(take_all)
        hub.close()
        server = Server(Path(folder))
        beats: list[float] = []
        claimed: list[float] = []
        statuses: dict[int, int] = {}

        async def run() -> None:
            wire = Wire(server.url, 200)
            began = time.perf_counter()

            async def worker(n: int) -> None:
                at = every * ((n * 0.6180339887) % 1)
                step = 1
                while at < seconds:
                    await asyncio.sleep(max(began + at - time.perf_counter(), 0))
                    body = Beat(token=grants[n].token, step=step).model_dump_json()
                    reply = await ask(wire, keys[n], f"/v1/leases/{grants[n].lease}/beat", body, beats)
                    assert reply.status_code == 200, reply.text
                    at, step = at + every, step + 1

            async def newcomer(n: int) -> None:
                await asyncio.sleep(n / claims)
                reply = await ask(wire, others[n], "/v1/leases", CLAIM, claimed)
                statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
                assert reply.status_code == 201 or "retry-after" in reply.headers, reply.text

            await asyncio.gather(*(worker(n) for n in range(workers)), *(newcomer(n) for n in range(int(claims * seconds))))
            await wire.close()

        cpu = time.process_time(), server.cpu()
        asyncio.run(run())
        asked = len(beats) + len(claimed)
        spent = {"client_cpu_ms": 1e3 * (time.process_time() - cpu[0]) / asked, "server_cpu_ms": 1e3 * (server.cpu() - cpu[1]) / asked}
        server.stop()
        found = Hub(Home("test", Store(folder)))
        ended = found.read(lambda c: {row["subject"] for row in c.all(select(event.c.subject).where(event.c.kind == "lease.expired"))})
        lost = sum(grant.lease in ended for grant in grants)
        found.close()
        say(
            "hub.leases.swarm", workers=workers, seconds=seconds, beat_every_s=every, beats=len(beats), beat_p50_ms=1e3 * part(beats, 0.5),
            beat_p99_ms=1e3 * part(beats, 0.99), claims=len(claimed), claim_p99_ms=1e3 * part(claimed, 0.99), lost=lost,
            statuses={str(code): count for code, count in statuses.items()}, load=os.getloadavg()[0],
            **spent,
        )  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    verbs = options.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("rate")
    one.add_argument("--clients", type=integers, default=[1, 8, 32, 128])
    one.add_argument("--seconds", type=float, default=5)
    one.add_argument("--database")
    one = verbs.add_parser("http")
    one.add_argument("--clients", type=integers, default=[8, 32, 128])
    one.add_argument("--seconds", type=float, default=10)
    one = verbs.add_parser("swarm")
    one.add_argument("--workers", type=int, default=10_000)
    one.add_argument("--seconds", type=float, default=60)
    one.add_argument("--every", type=float, default=120)
    one.add_argument("--claims", type=float, default=2, help="per second")
    given = vars(options.parse_args())
    verb = given.pop("verb")
    {"rate": rate, "http": http, "swarm": swarm}[verb](**given)


if __name__ == "__main__":
    main()
