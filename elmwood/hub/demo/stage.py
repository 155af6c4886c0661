"""The play: who comes when, what is waited for, and what came of it. It looks at the hub's database as its maintainer may."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from elmwood.corpus.build import build
from elmwood.domains.partition import partition as divide
from elmwood.engine import Progress, silent
from elmwood.errors import ElmwoodError
from elmwood.hub import care
from elmwood.hub.client.http import Hub as Client
from elmwood.hub.database import Connection
from elmwood.hub.demo.roles import Control, Volunteer, compare, quietly, serve_hub, step_file, verify, volunteer
from elmwood.hub.home import Home, Hub
from elmwood.hub.messages import Gate, Measurement, RunManifest, Terms
from elmwood.hub.pages import queries, statements
from elmwood.hub.pages.words import Told, tell
from elmwood.hub.publishing import draft_run, publish_run
from elmwood.records import Digest, Ensemble, Frozen, Partition, Recipe, Seed
from elmwood.store import AnyStore, Store
from elmwood.study.demo import SAMPLE
from elmwood.study.demo_seed import install_seed

RUN = "community"
SHARED = ("elmwood.hub.demo.roles", "elmwood.hub.app", "elmwood.train.tasks", "elmwood.ensemble.mixture", "elmwood.lm.experts", "peft")
LOOK = 0.5  # seconds between two looks at the hub
PEOPLE = (
    Volunteer("ada"),
    Volunteer("bert", slow=2.0),
    Volunteer("carol", slow=1.0),
    Volunteer("mallory", lies="against"),
    Volunteer("trudy", lies="copy"),
)


class Setting(Frozen):
    """The size of it. Where the figures come from: docs/log/community.md."""

    domains: int = 4
    tokens: int = 120_000  # of an expert
    rank: int = 64
    batch: int = 4
    learning_rate: float = 6e-3
    dense_rate: float = 1e-3
    temperature: float = 0.1
    seed_distance: float = 0.75
    budget: float = 0.2  # expected share of wrong acceptances among all
    documents: int | None = None  # held-out documents that verdicts and losses are of; None: all
    lag: float = 6.0  # seconds by which the training of the next slower machine is longer
    patience_s: float = 900.0  # the longest wait for one thing


class Stopped(ElmwoodError):
    """Something that the demo waits for did not happen, or one of its processes ended."""


class Play(NamedTuple):
    """What came of it."""

    url: str
    run: str
    filled: dict[int, str]  # domain -> name of the member whose expert it has
    refused: dict[str, str]  # member -> why
    resumed: tuple[int, int]  # the killed one: step when killed, steps of the recipe
    retired: Digest
    again: str  # who trained that domain again
    measured: Measurement
    seconds: float


def play(
    store: AnyStore = None, *, setting: Setting | None = None, made: tuple[Seed, Partition] | None = None, port: int = 0,
    progress: Progress = silent, on_event: Callable[[str], None] = lambda text: None, keep: Callable[[Play], None] | None = None,
) -> Play:  # fmt: skip
    """Run it. `made`: seed and partition, by default the packaged seed and the bundled text. `keep` is called when all is done, and
    the hub stands until it returns. Raises Stopped."""
    began, store, setting = time.monotonic(), Store(store), setting or Setting()
    seed, partition = made or prepare(setting, store, progress)
    on_event(f"published: {len(partition.domains)} domains, a seed of {seed.parameters:,} parameters")
    draft = draft_community(seed, partition, setting, store)
    publish_run(draft, store)
    with Stage(store, setting, draft.tiers["cpu"].recipe.steps, on_event, port) as stage:
        stage.begin(control(draft, partition, setting))
        found = follow(stage, draft)._replace(seconds=time.monotonic() - began)
        if keep:
            keep(found)
        return found


def prepare(setting: Setting, store: Store, progress: Progress = silent) -> tuple[Seed, Partition]:
    """The packaged seed, and the domains of the bundled text."""
    corpus = build([SAMPLE], store, progress=progress)
    return install_seed(corpus, store), divide(corpus, store, domains=setting.domains, method="balanced", progress=progress)


def draft_community(seed: Seed, partition: Partition, setting: Setting, store: Store) -> RunManifest:
    """A run whose leases end within seconds, on CPUs alone."""
    settings = Ensemble(
        forest=seed.digest, router="centroid", top_k=2, temperature=setting.temperature, seed_distance=setting.seed_distance
    )
    return draft_run(
        RUN, seed.digest, partition.digest, store, tokens=setting.tokens, rank=setting.rank, batch=setting.batch,
        learning_rate=setting.learning_rate, cards=False, ensemble=settings, terms=Terms(beat_s=10, progress_s=300),
        gate=Gate(budget=setting.budget, documents=setting.documents, cooldown_s=0, probation_s=0),
    )  # fmt: skip


def control(draft: RunManifest, partition: Partition, setting: Setting) -> Control:
    """One dense model, trained in full on all domains, on as many tokens as their experts together."""
    expert = draft.tiers["cpu"].recipe
    batch = max(1, len(draft.domains) // 2) * expert.batch
    recipe = Recipe(
        method="full", batch=batch, length=expert.length, steps=max(1, len(draft.domains) * expert.tokens // (batch * expert.length)),
        learning_rate=setting.dense_rate,
    )  # fmt: skip
    return Control(draft.seed, partition.corpus, recipe)


def follow(stage: "Stage", draft: RunManifest) -> Play:
    """The acts, one after another."""
    ada, bert, carol, mallory, trudy = PEOPLE
    present = [ada, carol, mallory, bert][: len(draft.domains)]
    for who in present:
        stage.enter(who)
    steps = stage.steps
    step = stage.until("carol is half through", lambda c: found if (found := stage.step_of(carol)) >= steps // 2 else None)
    stage.kill(carol, f"kill -9 of {carol.name} at step {step} of {steps}; started again")
    stage.enter(carol)
    stage.until("mallory's verdict", stage.verdict_of(mallory))
    stage.enter(trudy)
    stage.until("trudy's verdict", stage.verdict_of(trudy))
    stage.enter(ada)
    stage.until("every domain has an expert", lambda c: not stage.open_domains(c) or None)
    gone, place = stage.until("an expert to retire", lambda c: next(((x.expert, x.number) for x in stage.lines(c) if x.expert), None))
    care.retire(stage.hub, gone, "better-expert")
    stage.enter(bert)
    stage.until("the retired domain has an expert again", lambda c: not stage.open_domains(c) or None)
    last = stage.until("the last snapshot is measured", stage.newest_measure)
    lines = stage.hub.read(stage.lines)
    refused = stage.hub.read(lambda c: {row["member"]: row["code"] for row in c.all(statements.DECIDED) if row["state"] == "rejected"})
    filled = {line.number: line.member.name or "" for line in lines if line.member}
    return Play(stage.url, RUN, filled, refused, (step, steps), gone, filled[place], last, 0.0)


class Stage:
    """The processes, and the maintainer's view of the hub. Whoever is left ends with it."""

    def __init__(self, store: Store, setting: Setting, steps: int, on_event: Callable[[str], None], port: int = 0):
        self.store, self.setting, self.steps, self.on_event = store, setting, steps, on_event
        self.home = Home(RUN, store)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.processes = multiprocessing.get_context("forkserver")  # the libraries are imported once, and not by each process
        self.processes.set_forkserver_preload(list(SHARED))
        self.running: dict[str, BaseProcess] = {}
        self.folder = store.root / "community"
        self.seen, self.hub = 0, Hub(self.home)

    def __enter__(self) -> "Stage":
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.join(10)
            if process.is_alive():
                process.kill()
        self.hub.close()

    def begin(self, control: Control) -> None:
        """The hub, a verifier, and the machine that measures."""
        root, verifier = self.store.root.resolve(), self.home.key_path("verifier").resolve()
        self.start("hub", serve_hub, RUN, root, self.port)
        client = Client(self.url)
        client.get("/readyz")
        client.close()
        self.start("verifier", verify, self.url, self.folder / "verifier", verifier)
        self.start("control", compare, self.url, root, verifier, control)

    def start(self, name: str, work: Callable[..., Any], *given: Any) -> None:
        process = self.processes.Process(target=quietly, args=(work, self.folder / f"{name}.log", *given), name=name, daemon=True)
        process.start()
        self.running[name] = process

    def enter(self, who: Volunteer) -> None:
        """A volunteer begins, or comes back with what is in their store."""
        if (before := self.running.get(who.name)) is not None:
            before.join(self.setting.patience_s)
        self.start(who.name, volunteer, self.url, self.folder / who.name, who, who.slow * self.setting.lag / self.steps)

    def kill(self, who: Volunteer, why: str) -> None:
        process = self.running[who.name]
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        self.on_event(why)

    # ---- what is waited for

    def until(self, what: str, look: Callable[[Connection], Any]) -> Any:
        """What a query finds, as soon as it finds something; events are told meanwhile. Raises Stopped."""
        end = time.monotonic() + self.setting.patience_s
        while True:
            self.tell_events()
            if (found := self.hub.read(look)) is not None:
                return found
            for name in ("hub", "verifier", "control"):
                if not self.running[name].is_alive():
                    raise Stopped(f"{name} ended while the demo waited until {what}: look at {self.folder / name}.log")
            if time.monotonic() > end:
                raise Stopped(f"the demo waited {self.setting.patience_s:.0f} s until {what}: look at the logs in {self.folder}")
            time.sleep(LOOK)

    def tell_events(self) -> None:
        rows = self.hub.read(lambda c: [row for row in c.all(statements.EVENTS) if row["number"] > self.seen])
        if rows:
            self.seen = rows[0]["number"]
            told = tell(reversed(rows), self.hub.read(queries.subjects), time.time())
            for one in told:
                self.on_event(in_words(one))

    def step_of(self, who: Volunteer) -> int:
        mark = step_file(self.folder / who.name)
        return int(mark.read_bytes() or 0) if mark.exists() else 0

    def lines(self, c: Connection) -> list[queries.DomainLine]:
        return queries.domains(c, queries.head(c).manifest)

    def open_domains(self, c: Connection) -> int:
        return sum(line.expert is None for line in self.lines(c))

    def verdict_of(self, who: Volunteer) -> Callable[[Connection], str | None]:
        def look(c: Connection) -> str | None:
            return next((row["state"] for row in c.all(statements.DECIDED) if row["member"] == who.name), None)

        return look

    def newest_measure(self, c: Connection) -> Measurement | None:
        measured = c.all(statements.SNAPSHOTS)[-1]["measured"]
        return Measurement.model_validate_json(measured) if measured else None


def in_words(one: Told) -> str:
    return one.text if one.domain is None else f"{one.text} {one.domain} ({one.domain_name})"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
