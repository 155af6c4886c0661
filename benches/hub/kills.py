"""kill -9 of the hub while volunteers claim, beat, commit, upload and submit and a verifier reports.

    python -m benches.hub.kills [--kills 300] [--seconds 1.5] [--people 6] [--seed 0]

The hub is a process of its own (uvicorn, SQLite, a folder). It is killed after a random time, started again, and goes on with the same
people, who only know what was acknowledged. At the end the history of acknowledged replies is compared with the database
(benches/hub/history.py), every blob with its digest, and the log, the ledger and the domains with one another. Most hubs are forked by a
process that has imported already, so a kill costs little; each thirtieth is a process of its own: `restart_s` is from its start to its
first answer, imports and all, the longest, and `restart_cpu_s` its CPU time until then; `forked_restart_s` is that of the others.
"""

import random
import signal
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from benches.common import Lines, parser, say
from benches.hub.history import History, check, read
from benches.hub.server import Nursery, Server
from elmwood.hub import care, signing
from elmwood.hub.home import Home, Hub
from elmwood.hub.messages import Gate, Limits
from elmwood.store import Store
from tests.hub.server.people import Person
from tests.hub.server.world import adapter, open_run

LIMITS = Limits(accounts_per_hour=10**6, requests_per_minute=10**6, chunk_bytes=200)
TLS = ssl.create_default_context()  # unused over http, and a client that makes its own takes 30 ms
FULL = 30  # of so many starts one is a process of its own
AWAY = (httpx.HTTPError, KeyError, AssertionError)  # a request that was cut; what it asked may have been done or not


class Knows:
    """Where the hub is now, and whether people may ask it."""

    def __init__(self) -> None:
        self.url, self.ended = "", False


def volunteer(knows: Knows, key: Any, kept: History, chance: random.Random) -> None:
    while not knows.ended:
        with suppress(*AWAY), httpx.Client(base_url=knows.url, timeout=10, verify=TLS) as client:
            me = Person(client, key)
            reply = me.post("/v1/leases", {"tier": "cpu", "boot_id": "b007b007"}, name=f"{chance.random()}")
            if reply.status_code != 201:
                time.sleep(0.05)
                continue
            grant = reply.json()
            about = {"lease": grant["lease"], "token": grant["token"]}
            kept.add("grant", domain=grant["domain"], key=me.public, **about)
            for step in range(1, chance.randrange(2, 5)):
                me.beat(grant, step)
                kept.add("beat", step=step, **about)
            if chance.random() < 0.3:
                me.post(f"/v1/leases/{grant['lease']}/release", {"token": grant["token"]}, status=200)
                kept.add("release", **about)
                continue
            submit(me, grant, adapter(chance.randrange(1 << 40)), kept)
        time.sleep(0.01)


def submit(me: Person, grant: Any, data: bytes, kept: History) -> None:
    kept.add("commitment", lease=grant["lease"], order=me.promise(grant, data).json()["order"])
    upload = me.begin(grant, len(data))
    for at in range(0, len(data), 200):
        me.part(f"/v1/uploads/{upload}", at, data[at : at + 200], status=204)
        kept.add("part", upload=upload, offset=min(at + 200, len(data)))
    body = me.submission(grant, data, upload)
    made = me.post("/v1/submissions", body, name=grant["lease"], status=202).json()
    kept.add("submission", lease=grant["lease"], submission=made["submission"], adapter=body["adapter"], expert=made["expert"])


def verifier(knows: Knows, roles: dict[str, Any], kept: History, chance: random.Random) -> None:
    while not knows.ended:
        with suppress(*AWAY), httpx.Client(base_url=knows.url, timeout=10, verify=TLS) as client:
            me = Person(client, roles["verifier"])
            reply = me.post("/v1/jobs", {"boot_id": "b007b007"})
            if reply.status_code == 201:
                job = reply.json()
                made = me.judge(job, chance.random() < 0.7, status=200).json()
                kept.add("report", submission=job["submission"], state=made["state"])
                if made["state"] == "accepted":  # its domain opens again
                    expert = client.get(f"/v1/submissions/{job['submission']}").json()["expert"]
                    Person(client, roles["admin"]).post(f"/v1/experts/{expert}/retire", {"reason": "other"})
        time.sleep(0.02)


def kills(folder: Path, count: int, seconds: float, people: int, seed: int) -> dict[str, Any]:
    """Run and kill; what was found. Raises AssertionError, Damaged."""
    hub = open_run(folder / "store", 2 * people, limits=LIMITS, gate=Gate(cooldown_s=0, at_once=4))
    roles = {name: signing.load_key(hub.home.key_path(name)) for name in ("admin", "verifier")}
    hub.close()
    kept, knows, chance, lines = History(folder / "history.jsonl"), Knows(), random.Random(seed), Lines()
    nursery = Nursery()
    server = Server(folder / "store")
    knows.url = server.url
    with httpx.Client(base_url=server.url, timeout=60) as client:
        keys = [Person(client).enter(f"member {n}").key for n in range(people)]
    work: list[tuple[Callable[..., None], Any]] = [(volunteer, key) for key in keys] + [(verifier, roles)]
    threads = [threading.Thread(target=fn, args=(knows, who, kept, random.Random(chance.random()))) for fn, who in work]
    for thread in threads:
        thread.start()
    slowest, took = {True: server.seconds, False: 0.0}, server.cpu()
    try:
        for number in range(1, count + 1):
            time.sleep(seconds * chance.random())
            server.stop(signal.SIGKILL)
            alone = number % FULL == 0
            server = Server(folder / "store", None if alone else nursery)
            slowest[alone] = max(slowest[alone], server.seconds)
            took = max(took, server.cpu()) if alone else took
            knows.url = server.url
            if number % FULL == 0:
                lines("kills", number, count, "kills")
    finally:
        knows.ended = True
        for thread in threads:
            thread.join()
        server.stop()
        nursery.close()
        kept.close()
    hub = Hub(Home("test", Store(folder / "store")))
    try:
        counts = hub.read(lambda c: check(c, read(folder / "history.jsonl")))
        bad = [f"{one.what}: {one.said}" for one in care.doctor(hub) if not one.good]
        assert not bad, bad
    finally:
        hub.close()
    left = list((folder / "store" / "blobs").rglob("*.tmp"))
    return counts | {
        "kills": count,
        "restart_s": slowest[True],
        "restart_cpu_s": took,
        "forked_restart_s": slowest[False],
        "temporary_files": len(left),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=300)
    options.add_argument("--seconds", type=float, default=1.5, help="of life between two kills, at most")
    options.add_argument("--people", type=int, default=6)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = kills(Path(folder), given.kills, given.seconds, given.people, given.seed)
    say("hub.kills", **found, minutes=(time.perf_counter() - began) / 60)


if __name__ == "__main__":
    main()
