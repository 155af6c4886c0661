"""The hub as an ASGI app: routes, limits of bodies, errors as problem+json, health and metrics."""

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import func, select
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elmwood import __version__
from elmwood.errors import DoesNotFit, ElmwoodError
from elmwood.hub.api import leases, members, public, uploads, work
from elmwood.hub.api.asked import Limiter, read
from elmwood.hub.blobs import Unreachable
from elmwood.hub.database import Connection, Unavailable
from elmwood.hub.home import Hub
from elmwood.hub.messages import Problem
from elmwood.hub.pages.queries import Clock
from elmwood.hub.pages.routes import routes
from elmwood.hub.rules import LIVE, Refusal
from elmwood.hub.tables import domain, expert, lease, submission
from elmwood.report.connections import BoundBodies, Hosts, Unwelcome

# statuses that Starlette raises -> code, and what helps
HTTP = {
    400: ("bad-body", "look at /openapi.json"),
    404: ("no-route", "look at /openapi.json"),
    405: ("no-method", "look at /openapi.json"),
}
JSON_BYTES = 1 << 20  # of a body that is no part of an upload
PART_BYTES = (64 << 20) + 1
logger = logging.getLogger("elmwood.hub")


def create_app(hub: Hub, names: Sequence[str] = ()) -> FastAPI:
    """The app of an opened hub. It ticks while it runs; the caller closes the hub. `names`: of its hosts, one of which each request must
    use; none: any will do."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        hub.start()
        yield

    app = FastAPI(title="elmwood hub", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.hub, app.state.limits = hub, Limiter(hub)
    for router in (leases.router, uploads.router, work.router, members.router, public.router):  # the most asked first
        app.include_router(router)
    app.router.routes.extend(routes(lambda query: hub.read(lambda c: query(c, Clock(time.time(), hub.clock.now())))))
    add_errors(app)
    _add_health(app, hub)
    app.add_middleware(BoundBodies, most=lambda scope: PART_BYTES if scope["method"] == "PATCH" else JSON_BYTES, refuse=refuse)
    if names:
        app.add_middleware(Hosts, names=names, refuse=refuse)
    return app


def problem(status: int, made: Problem, headers: dict[str, str] | None = None) -> Response:
    return Response(made.model_dump_json(), status, headers, "application/problem+json")


def refuse(error: Unwelcome) -> Response:
    return problem(error.status_code, Problem(code=error.code, detail=error.detail, do=error.do), dict(error.headers or {}))


# ---- errors ---------------------------------------------------------------------------------------------------------


def add_errors(app: FastAPI) -> None:
    """Every error becomes a problem+json."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        headers = {"Retry-After": f"{max(error.retry_after, 1):.0f}"} if error.retry_after else {}
        if error.status == 204:
            return Response(status_code=204, headers=headers | {"Elmwood-Reason": error.code})
        if "offset" in error.fields:
            headers |= {"Upload-Offset": str(error.fields["offset"]), "Tus-Resumable": uploads.VERSION}
        made = Problem(code=error.code, detail=error.detail, kept=error.kept, do=error.do, retryable=error.retryable, fields=error.fields)
        return problem(error.status, made, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        wrong = [{"field": ".".join(map(str, one["loc"]))[:200], "why": str(one["msg"])[:200]} for one in error.errors()[:5]]
        said = "; ".join(f"{one['field']}: {one['why']}" for one in wrong)
        return problem(422, Problem(code="bad-fields", detail=said, do="correct these fields", fields={"errors": wrong}))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Unwelcome):
            return refuse(error)
        code, cure = HTTP.get(error.status_code, (f"http-{error.status_code}", "look at /openapi.json"))
        made = Problem(code=code, detail=str(error.detail)[:200], do=cure)
        return problem(error.status_code, made, dict(error.headers or {}))

    @app.exception_handler(ElmwoodError)
    async def ours(request: Request, error: ElmwoodError) -> Response:
        if isinstance(error, DoesNotFit):
            made = Problem(code="full", detail="the hub's disk is full", kept="what was acknowledged", do="wait", retryable=True)
            return problem(507, made, {"Retry-After": "60"})
        if isinstance(error, Unavailable | Unreachable):
            made = Problem(code="away", detail="the hub's database or store does not answer", do="ask again", retryable=True)
            return problem(503, made, {"Retry-After": "5"})
        return await broken(request, error)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        logger.error("%s %s", request.method, request.url.path, exc_info=error)
        made = Problem(code="error", detail="the hub made a mistake; it is in its log", kept="what was acknowledged", do="ask again later")
        return problem(500, made.model_copy(update={"retryable": True}))


class Counted:
    """Each request is counted, with its status and its seconds."""

    def __init__(self, app: ASGIApp, count: Callable[[Scope, int, float], None]):
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self.count(scope, status, time.perf_counter() - began)


# ---- health and metrics ---------------------------------------------------------------------------------------------

_live = select(func.count()).select_from(lease).where(lease.c.state.in_(LIVE))
_queue = select(submission.c.state, func.count().label("n")).group_by(submission.c.state)
_domains = select(domain.c.state, func.count().label("n")).group_by(domain.c.state)
_experts = select(expert.c.status, func.count().label("n")).group_by(expert.c.status)


def _add_health(app: FastAPI, hub: Hub) -> None:
    registry = CollectorRegistry()
    requests = Counter("elmwood_hub_requests", "requests by route and status", ["method", "route", "status"], registry=registry)
    seconds = Histogram("elmwood_hub_seconds", "seconds of a request", ["route"], registry=registry)
    gauges = {
        name: Gauge(f"elmwood_hub_{name}", f"{name} by state", ["state"], registry=registry)
        for name in ("submissions", "domains", "experts")
    }
    live = Gauge("elmwood_hub_leases", "live leases", registry=registry)
    uptime = Gauge("elmwood_hub_uptime_seconds", "uptime that deadlines count", registry=registry)

    def count(scope: Scope, status: int, taken: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        requests.labels(scope["method"], route, status).inc()
        seconds.labels(route).observe(taken)

    app.add_middleware(Counted, count=count)

    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """The process runs."""
        return {"state": "up", "version": __version__}

    @app.get("/readyz", tags=["health"], responses={503: {"description": "not ready"}})
    async def readyz() -> dict[str, Any]:
        """Database and blobs answer."""

        def look(c: Connection) -> int:
            return c.value(_live)

        leases_now = await read(hub, look)
        return {"state": "ready", "leases": leases_now}

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        found = await read(hub, lambda c: (c.value(_live), c.all(_queue), c.all(_domains), c.all(_experts)))
        live.set(found[0])
        uptime.set(hub.clock.now())
        for name, rows in zip(gauges, found[1:], strict=True):
            for row in rows:
                gauges[name].labels(next(iter(dict(row).values()))).set(row["n"])
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
