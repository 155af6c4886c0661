"""Open a gateway: the router of an ensemble, and the engines behind it."""

from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response

from elmwood.ensemble.batch.interface import Engine
from elmwood.ensemble.guide import Guide
from elmwood.errors import BadInput
from elmwood.records import Ensemble, Expert, Seed
from elmwood.serve.app import add_embeddings, read_json
from elmwood.serve.gateway.answers import answer
from elmwood.serve.gateway.fleet import Fleet, Folders, check
from elmwood.serve.gateway.pick import check_routes
from elmwood.serve.gateway.replicas import Plan, await_model, start
from elmwood.serve.gateway.upstream import Check, Upstream
from elmwood.serve.live import Live
from elmwood.serve.metrics import Meter
from elmwood.serve.model import Served, record_of
from elmwood.store import Named, Store
from elmwood.study.ancestry import Settings, name_of, seed_of
from elmwood.study.trial import check_use


class Behind(NamedTuple):
    """The engines behind a gateway."""

    urls: Sequence[str]
    adapters: Path  # folder of PEFT folders that they read
    prefix: str | None = None  # where they see it; None: where it is here
    most: int = 32  # adapters that each holds
    key: str | None = None  # for all of them
    requests: int = 320  # at once


def open_gateway(
    model: Named, store: Store, behind: Behind, *, settings: Settings | None = None, like: Served | None = None, name: str | None = None
) -> Served:
    """An ensemble's router before engines that hold its experts; a forest stands for its default ensemble, and a seed answers alone. No
    model is opened. `like`: what was served before, whose engines go on. Raises UnknownName, BadInput, ForeignExpert."""
    record, guide = record_of(model, store, settings=settings), None
    seed, experts = seed_of(record, store), list[Expert]()
    if isinstance(record, Ensemble):
        guide = Guide(record, store)
        check_routes(guide)
        experts = [store.load(digest, Expert) for digest in guide.digests[:-1]]
    elif not isinstance(record, Seed):
        raise BadInput(f"a gateway routes the experts of an ensemble, and {record.digest[:8]} is a {record.kind}: serve it as it is")
    if like is None:
        fleet = Fleet(seed, behind.requests)
        fleet.folders = Folders(behind.adapters, behind.prefix, experts, store)
    else:
        fleet = cast(Fleet, like.engine)
        if seed.digest != fleet.seed.digest:
            raise BadInput(f"model {record.digest[:8]} grew from another seed than the engines run: start engines of it, and a gateway")
        assert fleet.folders
        fleet.folders.add(experts)
    served = Served(name or name_of(model, store), record, seed, store, cast(Engine, fleet), guide)  # its app submits nothing to an engine
    if like is None:
        for number, url in enumerate(behind.urls):
            fleet.upstreams.append(
                Upstream(check_url(url), number, behind.most, (), fleet.folders.of, _checking(served, fleet), behind.key)
            )  # fmt: skip
    fleet.serve(seed, record.digest, [expert.digest for expert in experts])
    return served


def open_replicas(plan: Plan, count: int, engine: str, most: int = 32) -> Served:
    """A model that `count` replicas serve, which are started. `most`: experts that each is taken to keep at hand.
    Raises UnknownName, MissingExtra, BadInput, ForeignExpert, Unreachable."""
    served, experts = _before(plan, plan.resolve(), lambda seed: Fleet(seed, count * plan.requests))
    fleet = cast(Fleet, served.engine)
    fleet.replicas = replicas = start(engine, plan, count)
    try:
        with ThreadPoolExecutor(count) as pool:
            urls = list(pool.map(replicas.find, range(count)))
    except BaseException:
        replicas.close()
        raise
    for number, url in enumerate(urls):
        find = partial(replicas.find, number)
        fleet.upstreams.append(Upstream(url, number, most, (), str, _checking(served, None), plan.key, find))
    fleet.serve(served.seed, served.record.digest, experts)
    return served


def open_newer(plan: Plan, model: str, like: Served) -> Served:
    """A newer model, once all replicas that run serve it: they look for it by themselves. Raises BadInput, UnknownName, ForeignExpert."""
    fleet = cast(Fleet, like.engine)
    served, experts = _before(plan, model, lambda seed: fleet)
    await_model([one.url for one in fleet.upstreams if one.up], served.record.digest)
    fleet.serve(served.seed, served.record.digest, experts)
    return served


def _before(plan: Plan, model: str, fleet: Callable[[Seed], Fleet]) -> tuple[Served, Sequence[str]]:
    """A model before replicas, and the digests of its experts."""
    store = Store(plan.store)
    record = record_of(model, store, plan.mixing, plan.settings)
    seed = seed_of(record, store)
    check_use(seed, "generate")
    guide = Guide(record, store) if isinstance(record, Ensemble) else None
    engine = cast(Engine, fleet(seed))
    return Served(plan.name, record, seed, store, engine, guide), guide.digests[:-1] if guide else ()


def _checking(served: Served, fleet: Fleet | None) -> Check:
    """What is asked of an engine that is met. Replicas were started with the model that they serve."""

    async def check_one(upstream: Upstream, cards: Any) -> None:
        await check(upstream, cards, served, fleet.model if fleet else None)

    return check_one


def check_url(url: str) -> str:
    """The root of an engine's address. Raises BadInput."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise BadInput(f"{url} is no address of a server: write http://HOST:PORT")
    return parts.geturl().rstrip("/").removesuffix("/v1")


def add_answers(app: FastAPI, live: Live, meter: Meter) -> None:
    """The routes that answer, through the engines; these are met while the app runs."""
    fleet = live.now.engine
    assert isinstance(fleet, Fleet)
    meter.registry.register(fleet)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with fleet, inner(app) as state:
            yield state

    app.router.lifespan_context = lifespan

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        given = await read_json(request)
        with live.used() as served:
            return await answer(request, given, served, fleet, meter)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        given = await read_json(request)
        with live.used() as served:
            return await answer(request, given, served, fleet, meter)

    add_embeddings(app)
