"""The server as an ASGI app: routes, keys, limits of bodies, errors in OpenAI's shape, health, metrics, one line of log per request."""

import hashlib
import hmac
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elmwood import __version__
from elmwood.errors import ElmwoodError
from elmwood.report.connections import BoundBodies, Hosts, Unwelcome
from elmwood.serve import catalog
from elmwood.serve.answers import Gone
from elmwood.serve.completions import chat, complete
from elmwood.serve.live import Follower, Live, Source
from elmwood.serve.logs import logger
from elmwood.serve.metrics import Meter
from elmwood.serve.model import Served
from elmwood.serve.pages import routes
from elmwood.serve.refusals import Refused, refusal_of, reply_of

BODY = 4 << 20  # bytes
OPEN = ("/healthz", "/readyz", "/metrics", "/", "/static/")  # without a key
CLOSED = 499  # what logs call a request whose client has left


Answers = Callable[[FastAPI, Live, Meter], None]  # adds the routes that answer


def create_app(
    served: Served, *, keys: Sequence[str] = (), cors: Sequence[str] = (), names: Sequence[str] = (), source: Source | None = None,
    answers: Answers | None = None,
) -> FastAPI:  # fmt: skip
    """The app of an opened model. `keys`: one of them must come with each request; `cors`: origins whose pages may read answers; `names`:
    of its hosts, one of which each request must use, by default any; `source`: where newer models come from, each of which takes the place
    of the one before; `answers`: who answers, by default the engine. The engine is closed with the app."""
    live = Live(served)
    follower = Follower(live, source) if source else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if follower:
            follower.start()
        yield
        if follower:
            await run_in_threadpool(follower.stop)
        await run_in_threadpool(live.close)

    app = FastAPI(title="elmwood serve", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    meter = Meter(live)
    app.state.live, app.state.follower = live, follower
    _add_errors(app)
    _add_health(app, live, meter)
    (answers or _add_answers)(app, live, meter)
    _add_catalog(app, live)
    app.router.routes.extend(routes(live))
    app.add_middleware(BoundBodies, most=lambda scope: BODY, refuse=refuse)
    if keys:
        app.add_middleware(Keys, keys=keys)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST"], allow_headers=["*"])
    if names:
        app.add_middleware(Hosts, names=names, refuse=refuse)
    app.add_middleware(Logged, meter=meter)
    return app


def refuse(error: Unwelcome) -> Response:
    return reply_of(Refused(error.status_code, f"{error.detail}: {error.do}", code=error.code.replace("-", "_"), headers=error.headers))


async def read_json(request: Request) -> Any:
    """The body of a request. Raises Refused, Gone."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body is JSON: send Content-Type: application/json")
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise Gone from error
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


# ---- routes ---------------------------------------------------------------------------------------------------------


def _add_answers(app: FastAPI, live: Live, meter: Meter) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        given = await read_json(request)
        with live.used() as served:
            return await complete(request, given, served, meter)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        given = await read_json(request)
        with live.used() as served:
            return await chat(request, given, served, meter)

    add_embeddings(app)


def add_embeddings(app: FastAPI) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        raise Refused(400, "there are no embeddings here: experts are trained to continue text, and none to embed it", code="unsupported")


def _add_catalog(app: FastAPI, live: Live) -> None:
    @app.get("/v1/models")
    async def models() -> Any:
        return catalog.models(live.now)

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        return catalog.model(live.now, name)

    @app.get("/v1/experts")
    async def experts(request: Request) -> Any:
        return catalog.experts(live.now, request.query_params)

    @app.post("/v1/route")
    async def route(request: Request) -> Any:
        return await run_in_threadpool(catalog.route, live.now, await read_json(request), time.time())

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Any:
        return await run_in_threadpool(catalog.tokenize, live.now, await read_json(request), time.time())

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Any:
        return await run_in_threadpool(catalog.detokenize, live.now, await read_json(request))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Any:
        return catalog.tokenizer_info(live.now)


def _add_health(app: FastAPI, live: Live, meter: Meter) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process runs."""
        return {"state": "up", "version": __version__}

    @app.get("/readyz")
    async def readyz() -> Response:
        """The engine takes requests."""
        counts = live.counts()
        if not counts.open:
            return reply_of(Refused(503, "the server takes no requests: it closes, or no engine behind it answers", code="closing"))
        return Response(json.dumps({"state": "ready", "model": live.now.record.digest}), media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(meter.text(), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ElmwoodError)
    async def ours(request: Request, error: ElmwoodError) -> Response:
        found = refusal_of(error)
        if found.status == 500:
            logger.error("error", exc_info=error)
        return reply_of(found)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Unwelcome):
            return refuse(error)
        return reply_of(Refused(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}", headers=error.headers))

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        request.scope.setdefault("elmwood.note", {})["gone"] = True
        return Response(status_code=CLOSED)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return reply_of(refusal_of(error))


# ---- around all of them ----------------------------------------------------------------------------------------------


class Keys:
    """Requests need one of these keys: Authorization: Bearer KEY."""

    def __init__(self, app: ASGIApp, keys: Collection[str]):
        self.app, self.keys = app, [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]) or self._fits(scope):
            return await self.app(scope, receive, send)
        refused = Refused(
            401, "no valid API key: send Authorization: Bearer KEY", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
        )
        await reply_of(refused)(scope, receive, send)

    @staticmethod
    def _is_open(path: str) -> bool:
        return any(path == one or (len(one) > 1 and one.endswith("/") and path.startswith(one)) for one in OPEN)

    def _fits(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        found = hashlib.sha256(key.strip()).digest()
        return kind.lower() == b"bearer" and any(hmac.compare_digest(found, known) for known in self.keys)


class Logged:
    """Each request has an id, which its reply and its line of the log have too."""

    def __init__(self, app: ASGIApp, meter: Meter):
        self.app, self.meter = app, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        number = given if re.fullmatch(r"[\w.:-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        began, status, note, told = time.perf_counter(), 500, scope.setdefault("elmwood.note", {}), False

        def tell() -> None:
            nonlocal told
            if told:
                return
            told = True
            code = CLOSED if note.pop("gone", False) else status
            path = getattr(scope.get("route"), "path", "none")
            self.meter.request(path, code)
            fields = {
                "id": number,
                "method": scope["method"],
                "path": path,
                "status": code,
                "seconds": round(time.perf_counter() - began, 4),
            }
            level = logger.info if path.startswith(("/v1", "/tok", "/detok", "none")) else logger.debug
            level("request", extra={"fields": fields | note})

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            elif not message.get("more_body", False):
                tell()  # who has the whole reply finds it counted
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            logger.exception("error", extra={"fields": {"id": number}})
            raise
        finally:
            tell()
