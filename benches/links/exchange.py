"""What one exchange takes over links of a rate: real processes in network namespaces, real protocols, payloads of their real form.

    python -m benches.links.exchange [--workers 4,8] [--rates 20,100,1000] [--parameters 1000000] [--repeats 3] [--methods ddp,diloco,star]
        [--coordinator 1000]

`ddp`: gloo sums one gradient, in float32. `diloco`: `elmwood seed diloco`'s exchange (torchft: a quorum, a checksum, the sum). `star int8`
and `star top`: a machine that has a version fetches the step to the next one and uploads its delta, over HTTP through the star's own server
and client; the coordinator has a link of its own, of --coordinator Mbit/s. Nothing is trained. `seconds`: from the moment that all may
begin to the end of the last one, the median of the repeats. `sent` and `received`: bytes of a worker's interface, headers included, per
parameter. `ideal`: what the link takes for the bytes of the payload alone. `decision`: what the coordinator takes to check,
sum and store.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

from benches.common import integers, numbers, parser, say, words
from benches.links.network import Namespace, Network, network, why_not

PORT, LIGHTHOUSE, STAR = 29500, 29510, 8710
BITS = {"int8": 8.1, "top": 0.46}  # a parameter, as sent
STEP = "int8"  # form of what is fetched


# ---- what runs in a namespace -----------------------------------------------------------------------------------


def heed(work: dict[str, Callable[[], None]]) -> None:
    """Do what each line says, and say when it is done."""
    print("ready", flush=True)
    for line in sys.stdin:
        work[line.strip()]()
        print("done", flush=True)


def ring(rank: int, workers: int, parameters: int, folder: Path) -> None:
    """A worker of ddp and of diloco."""
    import os

    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    import torch
    import torch.distributed as dist

    from elmwood.lm.load import new_model
    from elmwood.records import Diloco, Recipe, Shape
    from elmwood.train.sites.site import Site, open_manager

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://10.77.0.1:{PORT}", rank=rank, world_size=workers)
    grad = torch.ones(parameters)
    model = new_model(Shape(layers=1, width=64, heads=1, feed_forward=64, vocabulary=max(2, parameters // 128), context=8), 0)
    plan = Diloco(seed="0" * 64, corpus="0" * 64, recipe=Recipe(steps=10_000, batch=workers, length=8), sites=workers, steps=1)
    folder.mkdir(parents=True)
    site = Site(model, plan, folder)
    size = sum(one.numel() for one in site.whole.values())
    site.save = lambda: None  # type: ignore[method-assign]  # the disk is no part of this
    with open_manager(site, rank, f"http://10.77.0.1:{LIGHTHOUSE}", f"10.77.0.{rank + 1}", 300.0) as (manager, _):

        def diloco() -> None:
            assert site.end(manager, site.begin(manager, plan.tokens, 1.0))

        print(size, flush=True)
        heed({"ddp": lambda: dist.all_reduce(grad), "diloco": diloco})


def machine(rank: int, folder: Path, address: str) -> None:
    """A machine of a star that sends random numbers."""
    import numpy as np

    from elmwood.hub import signing
    from elmwood.hub.client import http
    from elmwood.hub.star.messages import GrantReply, StarReply
    from elmwood.hub.star.worker import Machine, await_fate, fetch_base, fetch_version, offer
    from elmwood.outer.compress import write_delta
    from elmwood.outer.step import shapes_of
    from elmwood.records import Star, parse
    from elmwood.store import Store

    key, store = signing.load_or_make_key(folder / f"key-{rank}"), Store(folder / f"store-{rank}")
    http.check_url = lambda url: url  # which asks for TLS beyond this machine, and these namespaces are on it
    hub = http.Hub(f"http://{address}:{STAR}", key)
    rng, held = np.random.default_rng(rank), dict[str, Any]()
    star = parse(hub.get(f"/v1/records/{StarReply.model_validate(hub.get('/train').json()).star}").body)
    assert isinstance(star, Star)
    ready = Machine(hub, store, SimpleNamespace(folder=folder / f"local-{rank}"), 1e6)  # type: ignore[arg-type]

    def prepare() -> None:
        held["grant"] = GrantReply.model_validate(hub.request("POST", "/train/grants").json())

    def down() -> None:
        held["base"] = fetch_base(fetch_version(held["grant"].base, hub), ready)

    def make() -> None:
        shapes = shapes_of(held["base"])
        values = {name: rng.standard_normal(int(np.prod(shape))).astype(np.float32) * 1e-3 for name, shape in shapes.items()}
        held["delta"] = folder / f"delta-{rank}"
        write_delta(held["delta"], values, shapes, star.form)

    heed({
        "prepare": prepare, "down": down, "make": make, "up": lambda: offer(held["delta"], held["grant"], hub, lambda *_: None),
        "fate": lambda: print(await_fate(held["grant"].id, hub).fate, file=sys.stderr),
    })  # fmt: skip


def coordinator(folder: Path, workers: int, parameters: int, form: str, address: str) -> None:
    """The star's own server, of a seed of random numbers."""
    import numpy as np
    import safetensors.numpy

    from elmwood.hub import signing
    from elmwood.hub.star.app import serve
    from elmwood.hub.star.home import Home
    from elmwood.outer.round import Terms
    from elmwood.outer.step import OUTER
    from elmwood.records import Corpus, Recipe, Seed, Star
    from elmwood.store import Store

    store, side = Store(folder / "coordinator"), int(parameters**0.5)
    weights = {"layer": np.random.default_rng(0).standard_normal((side, side)).astype(np.float32)}
    seed = Seed(
        name="numbers", architecture="none", parameters=side**2, vocabulary=2, context=8, separator=0,
        files={"model.safetensors": store.put(safetensors.numpy.save(weights))},
    )  # fmt: skip
    corpus = Corpus(train=(), holdout=(), documents=0, bytes=0, holdout_share=0.1)
    recipe = Recipe(steps=10_000, batch=1, length=8)
    star = Star(name="bench", seed=store.add(seed), corpus=store.add(corpus), recipe=recipe, steps=1, parts=64, form=form, outer=OUTER)
    store.add(star)
    keys = {f"ed25519:{signing.public(signing.load_or_make_key(folder / f'key-{n}'))}": f"m{n}" for n in range(workers)}
    home = Home(star, store, Terms(least=workers, grace_s=0, beat_s=1e6, progress_s=1e6), keys)
    print("ready", flush=True)
    serve(home, address, STAR)


# ---- the measure ----------------------------------------------------------------------------------------------


class Crew:
    """Processes that do the same thing at once."""

    def __init__(self, around: ExitStack, places: list[Namespace], commands: list[list[str]]):
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.places = places
        self.processes = [
            place.start([sys.executable, "-m", __spec__.name, *words], **pipes) for place, words in zip(places, commands, strict=True)
        ]
        for process in self.processes:
            around.callback(process.wait)
            around.callback(process.kill)

    def lines(self) -> list[str]:
        found = [process.stdout.readline().strip() for process in self.processes if process.stdout]
        if "" in found:
            raise RuntimeError(f"process {found.index('')} ended: see its error above")
        return found

    def do(self, what: str) -> tuple[float, int, int]:
        """Seconds until the last one is done, and the most bytes that one sent and received."""
        before = [place.moved() for place in self.places]
        began = perf_counter()
        for process in self.processes:
            assert process.stdin
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
        self.lines()
        seconds = perf_counter() - began
        after = [place.moved() for place in self.places]
        return seconds, *(max(late[way] - early[way] for late, early in zip(after, before, strict=True)) for way in (0, 1))


def repeat(crew: Crew, what: str, repeats: int) -> Iterator[tuple[float, int, int]]:
    for _ in range(repeats):
        yield crew.do(what)


def tell(
    method: str, workers: int, rate: float, parameters: int, ideal_bits: float, taken: list[tuple[float, int, int]], **more: Any
) -> None:
    seconds, sent, received = (statistics.median(one[place] for one in taken) for place in range(3))
    say(
        "links.exchange", method=method, workers=workers, rate=rate, parameters=parameters, seconds=seconds, ideal=ideal_bits / rate,
        sent=sent / parameters, received=received / parameters, **more,
    )  # fmt: skip


def measure_ring(net: Network, workers: int, given: Any, scratch: Path) -> None:
    places = net.sites[:workers]
    with ExitStack() as around:
        lighthouse = [str(Path(sys.executable).with_name("torchft_lighthouse"))]
        options = ["--bind", f"10.77.0.1:{LIGHTHOUSE}", "--min_replicas", str(workers), "--join_timeout_ms", "60000"]
        light = places[0].start([*lighthouse, *options], stderr=subprocess.DEVNULL)
        around.callback(light.wait)
        around.callback(light.kill)
        commands = [["--as", "ring", str(n), str(workers), str(given.parameters), str(scratch / f"site-{n}")] for n in range(workers)]
        crew = Crew(around, places, commands)
        size = int(crew.lines()[0])
        crew.lines()
        for what in ("ddp", "diloco"):
            crew.do(what)  # connections
        for rate in given.rates:
            for number in range(workers):
                net.set_rate(number, rate * 1e6)
            for what, count in (("ddp", given.parameters), ("diloco", size)):
                if what in given.methods:
                    bits = 2 * (workers - 1) / workers * 32 * count
                    tell(what, workers, rate * 1e6, count, bits, list(repeat(crew, what, given.repeats)))


def measure_star(net: Network, workers: int, form: str, given: Any, scratch: Path) -> None:
    places, middle, parameters = net.sites[:workers], net.sites[-1], int(given.parameters**0.5) ** 2
    net.set_rate(len(net.sites) - 1, given.coordinator * 1e6)
    with ExitStack() as around:
        words = ["--as", "coordinator", str(scratch), str(workers), str(given.parameters), form, middle.address]
        Crew(around, [middle], [words]).lines()
        crew = Crew(around, places, [["--as", "machine", str(n), str(scratch), middle.address] for n in range(workers)])
        crew.lines()
        for what in ("prepare", "down", "make", "up", "fate"):  # connections, and whole weights
            crew.do(what)
        for rate in given.rates:
            for number in range(workers):
                net.set_rate(number, rate * 1e6)
            downs, ups, fates = [], [], []
            for _ in range(given.repeats):
                crew.do("prepare")
                downs.append(crew.do("down"))
                crew.do("make")
                ups.append(crew.do("up"))
                fates.append(crew.do("fate")[0])
            more = {"decision": statistics.median(fates)}
            tell(f"star {form} down", workers, rate * 1e6, parameters, BITS[STEP] * parameters, downs)
            tell(f"star {form} up", workers, rate * 1e6, parameters, BITS[form] * parameters, ups, **more)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--workers", type=integers, default=[4, 8])
    options.add_argument("--rates", type=numbers, default=[20.0, 100.0, 1000.0], help="Mbit/s")
    options.add_argument("--methods", type=words, default=["ddp", "diloco", "star"])
    options.add_argument("--parameters", type=int, default=1_000_000)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--coordinator", type=float, default=1000.0, help="Mbit/s of its link")
    given = options.parse_args()
    if reason := why_not():
        raise SystemExit(f"network namespaces cannot be made here ({reason}): run as root; `proxied` shapes one machine's way to a star")
    with tempfile.TemporaryDirectory() as scratch, network(max(given.workers) + 1, 1e9) as net:
        for workers in given.workers:
            if {"ddp", "diloco"} & set(given.methods):
                measure_ring(net, workers, given, Path(scratch) / f"ring-{workers}")
            for form in BITS if "star" in given.methods else ():
                measure_star(net, workers, form, given, Path(scratch) / f"star-{workers}-{form}")


ROLES: dict[str, Callable[..., None]] = {
    "ring": lambda rank, workers, parameters, folder: ring(int(rank), int(workers), int(parameters), Path(folder)),
    "machine": lambda rank, folder, address: machine(int(rank), Path(folder), address),
    "coordinator": lambda folder, workers, parameters, form, address: coordinator(
        Path(folder), int(workers), int(parameters), form, address
    ),
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--as"]:
        ROLES[sys.argv[2]](*sys.argv[3:])
    else:
        main()
