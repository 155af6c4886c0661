"""A star as an ASGI app: what its machines ask for. It stands alone, or in a hub's app: `hub_app.mount("/star", create_app(home))`.

Every request of a machine is signed (hub/signing.py). Each does the same when it is sent twice, so none needs a nonce or a first reply.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from elmwood import __version__
from elmwood.hub import signing
from elmwood.hub.api.asked import target
from elmwood.hub.api.public import send_blob
from elmwood.hub.api.uploads import TUS, VERSION, Checksum, Length, Metadata, Offset, Resumable, check_sum, check_version, read_metadata
from elmwood.hub.app import JSON_BYTES, PART_BYTES, add_errors, refuse
from elmwood.hub.messages.words import Sha
from elmwood.hub.rules import Refusal
from elmwood.hub.star.home import Home
from elmwood.hub.star.keeper import Deposed
from elmwood.hub.star.messages import Beat, GrantReply, Proposal, Receipt, StarReply
from elmwood.outer import round
from elmwood.outer.round import Grant, State, Wait
from elmwood.records import Digest, Fate, canonical
from elmwood.report.connections import BoundBodies

T = TypeVar("T")
CHUNK = 4 << 20  # bytes of a part of an upload, at most
WAIT = 20.0  # seconds that a reply about a proposal may wait
LOOK = 0.25  # between two looks meanwhile
STATUS = {"no-grant": 409, "offset": 409, "unknown-key": 403, "wrong-version": 409}
CURES = {"unknown-key": "ask whoever runs this star", "offset": "ask for the offset", "no-grant": "ask for another grant"}
router = APIRouter(tags=["star"])


def home_of(request: Request) -> Home:
    return request.app.state.home


Here = Annotated[Home, Depends(home_of)]


async def signer(request: Request) -> str:
    """The key that signed a request, as records spell it. Raises Refusal: 401, with the coordinator's time."""
    body, now = await request.body(), time.time()
    asked = target(request).removeprefix(request.scope.get("root_path", ""))
    try:
        return f"ed25519:{signing.check_request(request.method, asked, body, request.headers, now).key}"
    except signing.Forged as error:
        what, _, cure = str(error).partition(": ")
        raise Refusal(401, "bad-signature", what, do=cure, time=int(now)) from None


async def named(request: Request, home: Here, key: Annotated[str, Depends(signer)]) -> str:
    """The key of a machine in the list. Raises Refusal."""
    if key not in (await run_in_threadpool(home.keeper.read)).workers:
        raise Refusal(403, "unknown-key", f"key {key[8:16]} is not in the list of this star", do="ask whoever runs it")
    return key


Key = Annotated[str, Depends(named)]


async def change(home: Home, fn: Callable[[State, float], tuple[State, T]]) -> T:
    """Write. Raises Refusal."""
    try:
        return await run_in_threadpool(home.write, fn)
    except round.Refused as error:
        what, _, cure = str(error).partition(": ")
        raise Refusal(STATUS.get(error.code, 422), error.code, what, do=CURES.get(error.code, cure)) from None
    except Deposed as error:
        raise Refusal(503, "not-leader", str(error), do="ask again", retryable=True, retry_after=5) from None


# ---- what there is ---------------------------------------------------------------------------------------------------


@router.get("/train", response_model=StarReply)
async def plan(home: Here) -> StarReply:
    """The plan of the star, and where it is."""
    state = await run_in_threadpool(home.keeper.read)
    return StarReply(
        star=home.star.digest, name=home.star.name, version=state.number, versions=round.last_version(home.star), head=state.head,
        beat_s=home.terms.beat_s, live=len(state.live), waiting=len(state.pending), granted=state.granted, applied=state.applied,
        rejected=state.rejected, lost=state.gone,
    )  # fmt: skip


@router.get("/train/version/{number}")
async def one_version(home: Here, number: int) -> Response:
    """The record of a version, in canonical JSON; its digest is the ETag."""
    if not 0 <= number < 1 << 53 or (digest := await run_in_threadpool(home.keeper.digest, number)) is None:
        raise Refusal(404, "no-version", f"there is no version {number}", do="GET /train says the newest")
    record = await run_in_threadpool(home.store.read, digest)
    return Response(canonical(record), media_type="application/json", headers={"ETag": f'"{digest}"'})


@router.get("/v1/records/{digest}")
async def record(home: Here, key: Key, digest: Digest) -> Response:
    """The records of the plan: star, seed and corpus."""
    if digest not in (home.star.digest, home.star.seed, home.star.corpus):
        raise Refusal(404, "no-record", "this is no record of the plan", do="GET /train names the star")
    return Response(canonical(home.store.read(digest)), media_type="application/json", headers={"ETag": f'"{digest}"'})


@router.get("/v1/blobs/{sha}", response_class=Response)
async def blob(request: Request, home: Here, key: Key, sha: Sha) -> Response:
    """Weights of versions, the seed's files, text to train on: what the machines in the list need."""
    size = await run_in_threadpool(home.blobs.size, sha) if f"sha256:{sha}" in home.public else None
    if size is None:
        raise Refusal(404, "no-blob", "there is no such blob", do="look its digest up")
    return send_blob(home.blobs, sha, size, request)


# ---- grants ----------------------------------------------------------------------------------------------------------


@router.post("/train/grants", response_model=GrantReply, status_code=201, responses={204: {"description": "nothing to train now"}})
async def take(home: Here, key: Key) -> Any:
    """A slice of the text, from the newest version; the same one again until it ends."""
    made = await change(home, lambda state, now: round.grant(state, home.star, home.terms, key, now))
    if isinstance(made, Wait):
        return Response(status_code=204, headers={"Elmwood-Reason": made.why, "Retry-After": "1"})
    return _reply(made)


def _reply(made: Grant) -> GrantReply:
    return GrantReply(id=made.id, base=made.base, part=made.part, first=made.first, tokens=made.tokens, step=made.step)


@router.post("/train/grants/{id}/beat", response_model=GrantReply)
async def beat(home: Here, key: Key, id: str, message: Beat) -> GrantReply:
    """A sign of life, with the steps done."""

    def fn(state: State, now: float) -> tuple[State, Grant]:
        after = round.beat(state, home.terms, key, id, message.step, now)
        return after, after.grants[id]

    return _reply(await change(home, fn))


@router.delete("/train/grants/{id}", status_code=204)
async def give_back(home: Here, key: Key, id: str) -> Response:
    """End a grant without a proposal: its text is granted to another machine."""
    await change(home, lambda state, now: (round.give_back(state, key, id), None))
    return Response(status_code=204)


# ---- uploads (tus 1.0) -----------------------------------------------------------------------------------------------


@router.post("/v1/uploads", status_code=201)
async def create(home: Here, key: Key, length: Length, metadata: Metadata, tus: Resumable = VERSION) -> Response:
    """Begin the upload of a delta, or find it again; Upload-Metadata names the grant as its lease."""
    check_version(tus)
    id = read_metadata(metadata).get("lease", "")
    await change(home, lambda state, now: (round.begin_upload(state, key, id, length, home.size), None))
    return Response(status_code=201, headers=TUS | {"Location": f"/v1/uploads/{id}"})


@router.head("/v1/uploads/{id}")
async def offset(home: Here, key: Key, id: str) -> Response:
    """How much of an upload is kept."""
    held = await change(home, lambda state, now: (state, round.find_grant(state, key, id)))
    return Response(headers=TUS | {"Upload-Offset": str(sum(held.sent)), "Upload-Length": str(held.size)})


@router.patch("/v1/uploads/{id}", status_code=204)
async def append(
    request: Request, home: Here, key: Key, id: str, at: Offset, checksum: Checksum = "", tus: Resumable = VERSION
) -> Response:
    """Send a part. It is kept whole or not at all, and durable before the state says so."""
    check_version(tus)
    part = await request.body()
    held = await change(home, lambda state, now: (state, round.find_grant(state, key, id)))
    if at != sum(held.sent):
        raise Refusal(409, "offset", f"{sum(held.sent)} bytes are kept", do="ask for the offset", offset=sum(held.sent))
    if not 0 < len(part) <= min(CHUNK, held.size - at):
        raise Refusal(413, "too-large", f"the part has {len(part)} bytes, {min(CHUNK, held.size - at)} are taken", do="send less at once")
    check_sum(part, checksum)

    def keep() -> str | None:
        home.blobs.put_part(id, len(held.sent), part)
        return f"sha256:{home.blobs.join(id, len(held.sent) + 1)[0]}" if at + len(part) == held.size else None

    whole = await run_in_threadpool(keep)

    def kept(state: State, now: float) -> tuple[State, None]:
        return round.moved(round.keep_part(state, key, id, at, len(part), whole), home.terms, key, id, now), None

    await change(home, kept)
    if whole:
        await run_in_threadpool(home.blobs.drop_parts, id, len(held.sent) + 1)
    return Response(status_code=204, headers=TUS | {"Upload-Offset": str(at + len(part))})


# ---- proposals -------------------------------------------------------------------------------------------------------


@router.post("/train/proposals", status_code=202, response_model=Receipt)
async def propose(home: Here, key: Key, message: Proposal) -> Receipt:
    """A finished grant with its delta. Its receipt says what became of it."""
    told = await _told(home, key, message.grant)
    if told.fate:
        return told

    def fn(state: State, now: float) -> tuple[State, None]:
        return round.propose(state, home.star, key, message.grant, message.base, message.blob), None

    await change(home, fn)
    return await _told(home, key, message.grant)


@router.get("/train/proposals/{id}", response_model=Receipt)
async def receipt(home: Here, key: Key, id: str, wait: Annotated[float, Query(ge=0, le=WAIT)] = 0.0) -> Receipt:
    """What became of a proposal: applied, or rejected with a code; nothing yet while it waits."""
    until = time.monotonic() + wait
    while (told := await _told(home, key, id)).fate is None and time.monotonic() < until:
        await asyncio.sleep(LOOK)
    return told


async def _told(home: Home, key: str, id: str) -> Receipt:
    fate: Fate | None = await run_in_threadpool(home.keeper.receipt, id)
    if fate is not None and fate.worker != key:
        raise Refusal(404, "no-proposal", "this key sent no such proposal", do="look its id up")
    return Receipt(proposal=id, fate=fate)


# ---- the app ---------------------------------------------------------------------------------------------------------


def create_app(home: Home) -> FastAPI:
    """The app of an opened star; the caller starts and closes it."""
    app = FastAPI(title="elmwood star", version=__version__, docs_url=None, redoc_url=None)
    app.state.home = home
    app.include_router(router)
    add_errors(app)

    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, Any]:
        """The process runs, and leads."""
        return {"state": "up" if home.ended is None else "ended", "version": __version__}

    app.add_middleware(BoundBodies, most=lambda scope: PART_BYTES if scope["method"] == "PATCH" else JSON_BYTES, refuse=refuse)
    return app


def serve(home: Home, host: str, port: int) -> None:
    """Answer requests and decide rounds until the process is told to stop. Raises what ended it: Deposed where another one leads now."""
    import uvicorn

    from elmwood.report.connections import Prompt

    server = uvicorn.Server(uvicorn.Config(
        create_app(home), host=host, port=port, http=Prompt, log_level="warning", timeout_graceful_shutdown=5, timeout_keep_alive=75,
        server_header=False,
    ))  # fmt: skip

    def stop(error: Exception) -> None:
        server.should_exit = True

    home.start(stop)
    server.run()
    if home.ended:
        raise home.ended
