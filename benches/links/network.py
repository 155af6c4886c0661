"""Links of a chosen rate between real processes: network namespaces shaped by tc where this user may make them, else a proxy.

Each site is a network namespace with one interface, `eth0`, on a bridge in a namespace of its own. A token bucket (tbf) on either end of
the pair shapes what the site sends and what it gets. The namespaces have no names: each lives as long as the process that holds it, and
that dies with this one, however it ends. So nothing is left behind, not even after kill -9.

    with network(4, rate=20e6) as net:
        net.sites[0].start([sys.executable, "-m", ...])      # the address of sites[n] is 10.77.0.(n + 1)
"""

import asyncio
import ctypes
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

PREFIX = "10.77.0"
LATENCY = "400ms"  # a packet that would wait longer is dropped
PR_SET_PDEATHSIG = 1


class Namespace(NamedTuple):
    """A network namespace, held by a process."""

    address: str
    holder: int

    def inside(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.holder}/ns/net", *command]

    def call(self, line: str) -> str:
        """Run a command in it. Raises CalledProcessError."""
        return subprocess.run(self.inside(line.split()), check=True, capture_output=True, text=True).stdout

    def start(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
        """Start a process in it, which dies with this one."""
        return subprocess.Popen(self.inside(command), text=True, preexec_fn=_die_with_parent, **options)

    def moved(self) -> tuple[int, int]:
        """Bytes sent and received through eth0 until now, headers included."""
        counts = json.loads(self.call("ip -s -j link show eth0"))[0]["stats64"]
        return counts["tx"]["bytes"], counts["rx"]["bytes"]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Network(NamedTuple):
    """Sites, and the namespace of the bridge between them."""

    sites: list[Namespace]
    switch: Namespace

    def set_rate(self, number: int, rate: float) -> None:
        """Of a site, in bits a second, from now on."""
        shape(self.switch, self.sites[number], number, rate)


def shape(switch: Namespace, site: Namespace, number: int, rate: float, latency: str = LATENCY) -> None:
    """What a site sends and what it gets, each through a token bucket."""
    burst = max(32_000, int(rate / 8 / 250))  # bytes: what passes in a tick of 4 ms
    for place, name in ((site, "eth0"), (switch, f"port{number}")):
        place.call(f"tc qdisc replace dev {name} root tbf rate {int(rate)}bit burst {burst} latency {latency}")


def why_not() -> str | None:
    """Why this user can make no namespaces; None where it can."""
    for tool in ("unshare", "nsenter", "ip", "tc"):
        if not shutil.which(tool):
            return f"there is no {tool}"
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return done.stderr.strip() or None


@contextmanager
def network(sites: int, rate: float | Sequence[float], latency: str = LATENCY) -> Iterator[Network]:
    """So many sites, each with its rate in both directions, in bits a second."""
    rates = [rate] * sites if isinstance(rate, int | float) else list(rate)
    with ExitStack() as around:

        def hold(address: str) -> Namespace:
            process = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], preexec_fn=_die_with_parent)
            around.callback(process.wait)
            around.callback(process.kill)
            made = Namespace(address, process.pid)
            own = _inode("self")
            while _inode(process.pid) == own:  # until unshare has made it
                if process.poll() is not None:
                    raise OSError("unshare --net failed: run as root, or use `proxied`")
            made.call("ip link set lo up")
            return made

        switch = hold(f"{PREFIX}.254")
        switch.call("ip link add bridge type bridge")
        switch.call("ip link set bridge up")
        found = []
        for number, bits in enumerate(rates):
            site = hold(f"{PREFIX}.{number + 1}")
            switch.call(f"ip link add port{number} type veth peer name eth0 netns {site.holder}")
            switch.call(f"ip link set port{number} master bridge up")
            site.call(f"ip address add {site.address}/24 dev eth0")
            site.call("ip link set eth0 up")
            found.append(site)
            shape(switch, site, number, bits, latency)
        yield Network(found, switch)


def _inode(process: int | str) -> int:
    return os.stat(f"/proc/{process}/ns/net").st_ino


# ---- where namespaces may not be made: a proxy before one server -----------------------------------------------


@contextmanager
def proxied(target: tuple[str, int], rate: float, delay_s: float = 0.0, host: str = "127.0.0.1") -> Iterator[tuple[str, int]]:
    """An address whose connections go on to `target`, all together at `rate` bits a second in each direction, each piece `delay_s` later.

    This shapes what goes through it: the requests of a machine to one server, not what machines send one another.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    buckets = [Bucket(rate, loop.time), Bucket(rate, loop.time)]
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*target)
        ways = (_pump(reader, back, buckets[0], delay_s), _pump(there, writer, buckets[1], delay_s))
        tasks.update(mine := [asyncio.ensure_future(way) for way in ways])
        await asyncio.gather(*mine, return_exceptions=True)
        tasks.difference_update(mine)
        for one in (writer, back):
            one.close()

    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, host, 0), loop).result()

    async def end() -> None:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()

    try:
        yield server.sockets[0].getsockname()
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Bucket:
    """When so many bytes may pass at a rate in bits a second. A burst of 32 kB passes at once."""

    def __init__(self, rate: float, now: Callable[[], float], burst: int = 32_000):
        self.rate, self.now, self.burst_s, self.free = rate / 8, now, burst * 8 / rate, 0.0

    def wait(self, size: int) -> float:
        """Seconds until `size` bytes may pass; they are taken."""
        now = self.now()
        self.free = max(self.free, now - self.burst_s) + size / self.rate
        return max(0.0, self.free - now)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bucket: Bucket, delay_s: float) -> None:
    with suppress(OSError):
        while piece := await reader.read(16_384):
            await asyncio.sleep(bucket.wait(len(piece)) + delay_s)
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
