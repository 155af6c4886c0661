"""kill -9 of a star's machines in every phase: nothing is applied twice, nothing that was computed is lost beyond a grant.

    python -m benches.star.machine_kills [--kills 60] [--machines 2] [--versions 10] [--form top] [--seed 0]

Real processes over HTTP on this machine: a coordinator without losses, and machines that train a tiny seed. A machine dies in a given
phase, at a place drawn by chance: before or after a request, in the middle of a download, between two steps, before or after a write of its
disk. It is started again at once, so that its grant lives, or after its grant ended.

`alone`: one machine whose grant always lives ends in the same versions, byte for byte, as one that nobody kills. `several`: sums of what
each machine computed, of what was applied of it and of what it keeps agree, and no more tokens are lost than one grant for each kill.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.request import Request, urlopen

import numpy as np
import safetensors.numpy
import uvicorn

from benches.common import parser, say
from benches.star.simulation import open_place
from elmwood.hub import signing
from elmwood.hub.client.http import Hub
from elmwood.hub.star import home as home_module
from elmwood.hub.star.app import create_app
from elmwood.hub.star.home import Home, check_chain
from elmwood.hub.star.worker import opened, take_part
from elmwood.outer import round
from elmwood.outer.compress import open_delta
from elmwood.outer.gates import WRONGS
from elmwood.outer.round import State, Terms
from elmwood.outer.step import OUTER, read_tensors, shapes_of
from elmwood.records import Recipe, Star, Version
from elmwood.store import Store
from elmwood.train import checkpoint
from elmwood.train.inner import phase
from elmwood.weights import exact

STEPS = 3
PHASES = ("download", "step", "compress", "upload", "receipt")  # the last one until the error is written
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "sailed", "over", "sea", "with", "captain", "his", "naive", "crew"]


class World(NamedTuple):
    """A star before anybody takes part."""

    folder: Path
    store: Store
    star: Star
    keys: list[Any]

    def home(self, **options: Any) -> Home:
        terms = Terms(least=min(2, len(self.keys)), grace_s=1e6, beat_s=1e6, progress_s=1e6)
        return Home(self.star, self.store, terms, {public(key): f"m{n}" for n, key in enumerate(self.keys)}, holder="bench", **options)


def public(key: Any) -> str:
    return f"ed25519:{signing.public(key)}"


def new_world(folder: Path, machines: int, versions: int, form: str, keys: list[Any] | None = None) -> World:
    folder.mkdir(parents=True)
    rng, text = np.random.default_rng(0), folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(rng.choice(WORDS, 30)) + f" {n}"}) for n in range(300)), encoding="utf-8")
    place = open_place(folder / "coordinator", [str(text)], 16, 300, 32)
    recipe = Recipe(steps=STEPS * versions, batch=2, length=32, learning_rate=3e-3)
    star = Star(name="tiny", seed=place.seed.digest, corpus=place.corpus, recipe=recipe, steps=STEPS, parts=8, form=form, outer=OUTER)  # type: ignore[arg-type]
    return World(folder, place.store, star, keys or [signing.new_key() for _ in range(machines)])


# ---- processes ---------------------------------------------------------------------------------------------------------


def run_to_end(fn: Callable[..., None], *arguments: Any) -> NoReturn:
    """All that a forked process does."""
    try:
        fn(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


@contextmanager
def coordinating(world: World) -> Iterator[str]:
    """A coordinator in a process of its own; POST /end-grants ends every grant as if its machine had been away too long."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)
    child = os.fork()
    if not child:
        run_to_end(coordinate, world, listening)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()
        with suppress(ProcessLookupError, ChildProcessError):  # it ended, and the reason stands in its traceback
            os.kill(child, signal.SIGTERM)
            assert os.waitpid(child, 0)[1] == 0, "the coordinator failed"


def coordinate(world: World, listening: socket.socket) -> None:
    home_module.TICK = 0.1
    home = world.home()
    app = create_app(home)

    @app.post("/end-grants")
    def end_grants() -> None:
        home.write(lambda state, now: (round.expire(state, now + 1e9), None))

    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))

    def stop(error: Exception) -> None:
        server.should_exit = True

    home.start(stop)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which uvicorn raises again at its end
    server.run(sockets=[listening])
    home.close()
    if home.ended:
        raise home.ended


class Cut:
    """A download that stops at a place."""

    def __init__(self, answer: Any, place: Any):
        self.answer, self.place = answer, place

    def __getattr__(self, name: str) -> Any:
        return getattr(self.answer, name)

    def iter_raw(self) -> Iterator[bytes]:
        for piece in self.answer.iter_raw():
            yield piece[: len(piece) // 2]
            self.place()
            yield piece[len(piece) // 2 :]


def live(world: World, n: int, url: str, die_in: str, die_at: int) -> None:
    """One life of a machine: it dies at a place of a phase, or ends with the last version."""
    count, now, log = [0], ["start"], world.folder / f"log-{n}"
    log.mkdir(exist_ok=True)

    def place() -> None:
        count[0] += now[0] == die_in
        if count[0] == die_at:
            with (log / "deaths").open("a") as file:
                file.write(now[0] + "\n")
            os.kill(os.getpid(), signal.SIGKILL)

    stream, write, finish, keep = Hub.stream, checkpoint.write, phase._finish, phase.keep_whole

    @contextmanager
    def watched_stream(self: Hub, method: str, target: str, *rest: Any, **options: Any) -> Iterator[Any]:
        if "?wait=20" in target:
            now[0] = "receipt"
        place()
        with stream(self, method, target, *rest, **options) as answer:
            yield Cut(answer, place)
        place()

    def watched_write(*arguments: Any) -> None:
        place()
        write(*arguments)

    def watched_finish(local: Any, slice: Any, base: Path, sent: Path) -> Path:
        now[0] = "compress"
        moved = {name: local.weights[name].detach().numpy().reshape(-1) - value_N for name, value_N in read_tensors(base)}
        safetensors.numpy.save_file(moved, log / f"computed-{slice.id}")
        return finish(local, slice, base, sent)

    def watched_keep(temporary: Path, path: Path) -> None:
        place()
        keep(temporary, path)
        if path.name.startswith("whole-"):  # from here on it must not be lost
            (log / f"kept-{path.stem.removeprefix('whole-')}").touch()
        place()

    def tell(told: Any) -> None:
        now[0] = {"fetch": "download", "train": "step", "send": "upload"}.get(told.what, told.what)
        place()

    Hub.stream, checkpoint.write, phase._finish, phase.keep_whole = watched_stream, watched_write, watched_finish, watched_keep  # type: ignore
    phase.EVERY = 0.0
    with opened(url, Store(world.folder / f"m{n}"), world.keys[n]) as machine:
        now[0] = "grant"
        take_part(machine, tell=tell)


def train(world: World, kills: int, rng: np.random.Generator, away: float) -> Counter[str]:
    """Let the machines take part to the end, and kill so many. With probability `away` a killed one's grant has ended when it comes back.
    The phases in which they died."""
    left = kills
    with coordinating(world) as url:

        def start(n: int) -> int:
            nonlocal left
            die_in, die_at, left = PHASES[left % len(PHASES)], int(rng.integers(1, 5)) if left > 0 else -1, left - 1
            child = os.fork()
            if not child:
                run_to_end(live, world, n, url, die_in, die_at)
            return child

        running = {start(n): n for n in range(len(world.keys))}
        try:
            while running:
                child, status = os.wait()
                assert child in running, "the coordinator ended"
                n = running.pop(child)
                assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"machine {n} failed"
                if os.WIFSIGNALED(status):
                    if rng.random() < away:
                        urlopen(Request(f"{url}/end-grants", method="POST")).close()
                    running[start(n)] = n
        finally:
            for child in running:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    deaths = [path for n in range(len(world.keys)) if (path := world.folder / f"log-{n}" / "deaths").exists()]
    return Counter(word for path in deaths for word in path.read_text().split())


# ---- what is left ------------------------------------------------------------------------------------------------------


def read_end(world: World) -> tuple[State, list[Version]]:
    """The state, and the chain of versions, computed again."""
    home = world.home()
    try:
        state, chain = home.keeper.read(), home.keeper.chain()
        assert all(one.good for one in check_chain(world.star, chain, world.store)), "replay gives other bytes"
        return state, [world.store.load(digest, Version) for digest in chain]
    finally:
        home.close()


def check(world: World, died: int) -> dict[str, Any]:
    """Whether tokens and sums of deltas agree. Raises AssertionError."""
    state, chain = read_end(world)
    fates = [fate for one in chain for fate in one.fates]
    assert max(Counter(fate.proposal for fate in fates).values()) == 1, "a proposal stands in two versions"
    assert not (codes := {fate.code for fate in fates} & set(WRONGS)), f"honest proposals are rejected: {codes}"
    assert state.granted == state.applied + sum(state.rejected.values()) + state.gone + sum(one.tokens for one in state.unended)
    assert state.gone <= died * len(world.keys) * world.star.tokens, "more than one grant of each machine is lost for a kill"
    shapes, furthest = shapes_of(world.store.get(chain[0].weights)), 0.0
    for n, key in enumerate(world.keys):
        sums = {name: np.zeros(int(np.prod(shape))) for name, shape in shapes.items()}
        for path in (world.folder / f"log-{n}").glob("kept-*"):
            computed = safetensors.numpy.load_file(path.with_name(path.name.replace("kept", "computed")))
            for name in sums:
                sums[name] += computed[name]
        for fate in fates:
            if fate.worker == public(key) and fate.fate == "applied":
                sent = open_delta(world.store.get(str(fate.blob)), shapes, world.star.form)
                for name in sums:
                    sums[name] -= fate.scale * sent.values(name).astype(float)
        folder = next((world.folder / f"m{n}" / "star").iterdir())
        for name, value_N in safetensors.numpy.load_file(folder / "error.safetensors").items():
            sums[name] -= value_N
        furthest = max(furthest, *(float(np.abs(value_N).max()) for value_N in sums.values()))
    assert furthest < 1e-5, "what was computed is not what was applied and what is kept"
    return {
        "versions": state.number, "applied": sum(fate.fate == "applied" for fate in fates), "lost": state.gone // world.star.tokens,
        "difference": furthest,
    }  # fmt: skip


def alone(folder: Path, kills: int, versions: int, form: str, rng_seed: int) -> dict[str, Any]:
    """One machine, once undisturbed and once killed: the same chain and the same error. Raises AssertionError."""
    exact.add(np.zeros(4, np.int64), np.ones(4), 1.0)  # compiled before processes are forked
    calm = new_world(folder / "calm", 1, versions, form)
    train(calm, 0, np.random.default_rng(0), 0)
    killed = new_world(folder / "killed", 1, versions, form, calm.keys)
    deaths = train(killed, kills, np.random.default_rng(rng_seed), 0)
    assert [one.digest for one in read_end(killed)[1]] == [one.digest for one in read_end(calm)[1]], "the versions differ"
    errors = [next((one.folder / "m0" / "star").iterdir()) / "error.safetensors" for one in (calm, killed)]
    assert errors[0].read_bytes() == errors[1].read_bytes(), "what the machines keep differs"
    return {"kills": deaths.total(), "died": dict(deaths)} | check(killed, deaths.total())


def several(folder: Path, kills: int, machines: int, versions: int, form: str, rng_seed: int) -> dict[str, Any]:
    """Several machines, whose grants end in half of the kills. Raises AssertionError."""
    exact.add(np.zeros(4, np.int64), np.ones(4), 1.0)
    world = new_world(folder, machines, versions, form)
    deaths = train(world, kills, np.random.default_rng(rng_seed), 0.5)
    return {"kills": deaths.total(), "died": dict(deaths)} | check(world, deaths.total())


def main() -> None:
    options = parser(__doc__)
    for name, default in (("kills", 60), ("machines", 2), ("versions", 10), ("seed", 0)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--form", default="top")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root, half = Path(scratch), given.kills // 2
        say("star.machine_kills", run="alone", **alone(root / "alone", half, given.versions, given.form, given.seed))
        found = several(root / "several", given.kills - half, given.machines, given.versions, given.form, given.seed)
        say("star.machine_kills", run="several", machines=given.machines, **found)


if __name__ == "__main__":
    main()
