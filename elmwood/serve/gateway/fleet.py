"""Several engines as one: which of them a request goes to, and what all of them hold."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client.core import GaugeMetricFamily, Metric

from elmwood.ensemble.batch.interface import Busy, Counts
from elmwood.errors import BadInput
from elmwood.records import Expert, Seed, canonical
from elmwood.serve.gateway.pick import Pick
from elmwood.serve.gateway.replicas import Replicas
from elmwood.serve.gateway.upstream import Unreachable, Upstream
from elmwood.serve.model import Served
from elmwood.serve.refusals import Refused
from elmwood.store import Store

ABSENT = 16  # requests that an engine may have more than another before an expert is loaded at the other too
WATCH = 2.0  # seconds between looks at engines that are down
PROBE = "One text, read by both: naïve café, 12,345."  # tokens of it show whether an engine has the seed's tokenizer


class Folders:
    """Adapters as PEFT folders, one for each expert and called by its digest, written where they are missing."""

    def __init__(self, folder: Path, prefix: str | None, experts: Sequence[Expert], store: Store):
        """`prefix`: where the engine sees the folder. Raises BadInput."""
        self.folder, self.prefix, self.store = folder, prefix or str(folder.resolve()), store
        self.experts: dict[str, Expert] = {}
        self.add(experts)

    def add(self, experts: Sequence[Expert]) -> None:
        """Some more; who is served no more is kept, for requests that began before. Raises BadInput."""
        for expert in experts:
            if "adapter_config.json" not in expert.files or expert.recipe.method == "dora":
                kind = "a DoRA adapter" if expert.recipe.method == "dora" else "a full model"
                raise BadInput(f"expert {expert.digest[:8]} is {kind}; engines load LoRA adapters by name: leave it out of the forest")
        self.experts = self.experts | {expert.digest: expert for expert in experts}

    def of(self, digest: str) -> str:
        """The folder of an expert, as the engine sees it. Raises Damaged."""
        target = self.folder / digest
        if not target.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=".", dir=self.folder))
            try:
                shutil.copytree(self.store.folder(self.experts[digest].files), building, dirs_exist_ok=True)
                building.chmod(0o755)
                with suppress(OSError):  # another gateway was faster
                    building.rename(target)
            finally:
                shutil.rmtree(building, ignore_errors=True)
        return f"{self.prefix.rstrip('/')}/{digest}"


class Fleet:
    """The engines behind a gateway. To the server's shell it is an engine without steps of its own (`Counts`, `close`), which a newer model
    shares with the one before it."""

    def __init__(self, seed: Seed, most: int):
        """`most`: requests at once."""
        self.most, self.upstreams = most, list[Upstream]()
        self.serve(seed, "", ())
        self.folders: Folders | None = None  # of adapters, where the engines do not load experts by themselves
        self.replicas: Replicas | None = None  # that end with it
        self.requests = self.failed = 0
        self.open = True

    def serve(self, seed: Seed, model: str, experts: Sequence[str]) -> None:
        """From now on this model, by its digest. Experts that are not its own leave the engines when nobody uses them."""
        self.seed, self.model, self.experts = seed, model, tuple(experts)
        self.context, self.vocabulary, self.separator = seed.context, seed.vocabulary, seed.separator
        self.stops = frozenset([seed.separator])
        known = dict.fromkeys(experts)
        for upstream in self.upstreams:
            upstream.digests = known

    async def __aenter__(self) -> Self:
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watching.cancel()
        with suppress(asyncio.CancelledError):
            await self._watching
        if self.replicas:
            await asyncio.to_thread(self.replicas.close)
        for upstream in self.upstreams:
            await upstream.close()

    async def _watch(self) -> None:
        """Meet engines that are not there, and let go of experts that are served no more, again and again."""
        while True:
            await asyncio.gather(*(one.meet() for one in self.upstreams if not one.up), return_exceptions=True)
            for one in self.upstreams:
                if one.up:
                    one.retire()
            await asyncio.sleep(WATCH)

    def choose(self, pick: Pick, tried: Collection[int] = ()) -> Upstream:
        """The engine that holds the experts of a request, unless it has many more requests than another. Raises Refused."""
        left = [one for one in self.upstreams if one.number not in tried and (one.up or one.clock() >= one.retry_at)]
        if not left:
            reasons = "; ".join(one.reason for one in self.upstreams if not one.up) or "all of them broke off"
            raise Refused(503, f"no engine answers: {reasons}", code="upstream_down", headers={"Retry-After": "2"})
        return min(left, key=lambda one: (self._cost(one, pick), one.number))

    async def mixes(self) -> bool:
        """Whether the engines mix experts by themselves, as elmwood's servers do."""
        if all(one.kind is None for one in self.upstreams):
            await asyncio.gather(*(one.meet() for one in self.upstreams), return_exceptions=True)
        return any(one.kind and not one.kind.load for one in self.upstreams)

    @staticmethod
    def _cost(one: Upstream, pick: Pick) -> float:
        names = one.wanted(pick)
        absent = sum(not one.book.has(name) for name in names) / max(1, len(names))
        return one.running + ABSENT * absent + (0 if one.up else 4 * ABSENT)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A request at work. Raises Busy."""
        if self.requests >= self.most:
            raise Busy(f"{self.most} requests are at work or wait: try again, or raise --queue")
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def counts(self) -> Counts:
        waiting, loading = sum(one.waiting for one in self.upstreams), sum(one.book.loading for one in self.upstreams)
        return Counts(
            waiting=waiting, running=self.requests - waiting, experts=len(self.experts), loading=loading,
            resident=sum(one.book.resident for one in self.upstreams), loads=sum(one.book.loads for one in self.upstreams),
            load_seconds=sum(one.load_seconds for one in self.upstreams), failed=self.failed + sum(one.failed for one in self.upstreams),
            open=self.open and any(one.up for one in self.upstreams),
        )  # fmt: skip

    def close(self, drain_s: float = 0.0) -> None:
        self.open = False

    def collect(self) -> list[Metric]:
        """For Prometheus."""
        found: list[Metric] = []
        for name, what, of in (
            ("elmwood_upstream_up", "whether an engine answers", lambda one: one.up),
            ("elmwood_upstream_running", "requests at an engine", lambda one: one.running),
            ("elmwood_upstream_resident", "experts at an engine", lambda one: one.book.resident),
        ):
            metric = GaugeMetricFamily(name, what, labels=["upstream"])
            for one in self.upstreams:
                metric.add_metric([str(one.number)], float(of(one)))
            found.append(metric)
        return found


async def check(upstream: Upstream, cards: Sequence[dict[str, Any]], served: Served, model: str | None) -> None:
    """Whether an engine runs the seed of this model, as far as it says; an elmwood server this `model`, where it is named.
    Raises Unreachable."""
    card = cards[0]
    if card.get("owned_by") == "elmwood":
        if model is not None and card.get("root") != model:
            raise Unreachable(f"{upstream.url} serves {str(card.get('root'))[:8]}, and this gateway {model[:8]}: start it with the same")
        return
    about = Path(str(card.get("root"))) / "elmwood.json"
    if about.is_file() and json.loads(about.read_bytes()) != json.loads(canonical(served.seed)):
        raise Unreachable(f"{upstream.url} runs {card.get('root')}, which is not the seed {served.seed.digest[:8]} of these experts")
    body = {"model": card["id"], "prompt": PROBE, "add_special_tokens": False}
    reply = await upstream.client.post("/tokenize", json=body, timeout=10.0)
    found = reply.json().get("tokens") if reply.status_code == 200 else None
    if found is not None and found != served.encode(PROBE, False):
        raise Unreachable(
            f"{upstream.url} has another tokenizer than the seed {served.seed.digest[:8]} of these experts: serve its exported folder"
        )
