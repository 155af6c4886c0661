"""Open a gateway: the router of an ensemble, and the engines behind it."""

from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response

from elmwood.ensemble.batch.interface import USUAL, Engine, Limits
from elmwood.ensemble.guide import Guide
from elmwood.errors import BadInput
from elmwood.records import Ensemble, Expert, Forest
from elmwood.serve.app import add_embeddings, read_json
from elmwood.serve.gateway.answers import answer
from elmwood.serve.gateway.fleet import Fleet, Folders, check
from elmwood.serve.gateway.pick import check_routes
from elmwood.serve.gateway.replicas import plan_of, start
from elmwood.serve.gateway.upstream import Upstream
from elmwood.serve.live import Live
from elmwood.serve.metrics import Meter
from elmwood.serve.model import Served
from elmwood.store import Named, Store
from elmwood.study.ancestry import as_model, name_of, seed_of, with_mixing
from elmwood.study.trial import check_use


class Behind(NamedTuple):
    """The engines behind a gateway."""

    urls: Sequence[str]
    adapters: Path  # folder of PEFT folders that they read
    prefix: str | None = None  # where they see it; None: where it is here
    most: int = 32  # adapters that each holds
    key: str | None = None  # for all of them
    requests: int = 320  # at once


def open_gateway(model: Named, store: Store, behind: Behind) -> Served:
    """An ensemble's router before engines that hold its experts; a forest stands for its default ensemble. No model is opened.
    Raises UnknownName, BadInput, ForeignExpert."""
    record = as_model(store.load(model), store)
    if not isinstance(record, Ensemble):
        raise BadInput(f"a gateway routes the experts of an ensemble, and {record.digest[:8]} is a {record.kind}: serve it as it is")
    seed, guide = seed_of(record, store), Guide(record, store)
    check_routes(guide)
    forest = store.load(record.forest, Forest)
    experts = [store.load(digest, Expert) for digest in sorted(forest.experts)]
    fleet = Fleet(seed, [expert.digest for expert in experts], behind.requests)
    served = Served(name_of(model, store), record, seed, store, cast(Engine, fleet), guide)  # what submits to an engine is not in its app
    folders = Folders(behind.adapters, behind.prefix, experts, store)

    async def checked(upstream: Upstream, cards: Any) -> None:
        await check(upstream, cards, served)

    for number, url in enumerate(behind.urls):
        fleet.upstreams.append(
            Upstream(check_url(url), number, behind.most, folders.experts, folders.of, checked, behind.key)
        )  # fmt: skip
    return served


def open_replicas(
    model: Named, store: Store, count: int, engine: str, *, mixing: str | None = None, limits: Limits = USUAL, most: int = 32
) -> Served:
    """Any model, served by `count` replicas, which are started. `most`: experts that each is taken to keep at hand.
    Raises UnknownName, MissingExtra, BadInput, ForeignExpert, Unreachable."""
    record = as_model(store.load(model), store)
    record = with_mixing(record, mixing, store) if mixing else record
    seed = seed_of(record, store)
    check_use(seed, "generate")
    guide = Guide(record, store) if isinstance(record, Ensemble) else None
    fleet = Fleet(seed, guide.digests[:-1] if guide else (), count * (limits.queue + limits.running))
    served = Served(name_of(model, store), record, seed, store, cast(Engine, fleet), guide)
    plan = plan_of(record.digest, store, limits)
    fleet.replicas = replicas = start(engine, plan, count)

    async def checked(upstream: Upstream, cards: Any) -> None:
        await check(upstream, cards, served)

    try:
        with ThreadPoolExecutor(count) as pool:
            urls = list(pool.map(replicas.find, range(count)))
    except BaseException:
        replicas.close()
        raise
    for number, url in enumerate(urls):
        find = partial(replicas.find, number)
        fleet.upstreams.append(Upstream(url, number, most, served.cards, str, checked, plan.key, find))
    return served


def check_url(url: str) -> str:
    """The root of an engine's address. Raises BadInput."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise BadInput(f"{url} is no address of a server: write http://HOST:PORT")
    return parts.geturl().rstrip("/").removesuffix("/v1")


def add_answers(app: FastAPI, live: Live, meter: Meter) -> None:
    """The routes that answer, through the engines; these are met while the app runs."""
    served, fleet = live.now, live.now.engine
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
        return await answer(request, await read_json(request), served, fleet, meter)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, await read_json(request), served, fleet, meter)

    add_embeddings(app)
