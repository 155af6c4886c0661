"""What everybody may read: the run, blobs, records, domains, experts, members, ledger, snapshots, events."""

import hashlib
import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import bindparam, func, select

from elmwood.hub.actions import experts
from elmwood.hub.api.asked import Here, MaybeWhose, Whose, read
from elmwood.hub.blobs import Blobs
from elmwood.hub.database import Connection
from elmwood.hub.messages import Credit, Done, Event, Retirement, RunReply, Sha, Signed
from elmwood.hub.rules import Refusal
from elmwood.hub.tables import account, blob, credit, domain, event, expert, manifest, record, snapshot
from elmwood.records import Digest

router = APIRouter(tags=["public"])
After = Annotated[int, Query(ge=0, lt=1 << 53)]
Many = Annotated[int, Query(ge=1, le=1000)]

_run = select(manifest.c.version, manifest.c.signed).order_by(manifest.c.version.desc()).limit(1)
_blob = select(blob.c.bytes, blob.c.secret).where(blob.c.sha == bindparam("sha"))
_record = select(record.c.body, record.c.secret).where(record.c.digest == bindparam("digest"))
_domains = (
    select(domain.c.number, domain.c.name, domain.c.state, domain.c.token, domain.c.has_text, domain.c.tokens, domain.c.expert)
    .where(domain.c.number >= bindparam("after"))
    .order_by(domain.c.number)
    .limit(bindparam("many"))
)
_experts = (
    select(
        expert.c.digest, expert.c.domain, expert.c.account, expert.c.status, expert.c.since, expert.c.until, expert.c.reason,
        expert.c.submission, expert.c.gain,
    )
    .where(expert.c.since >= bindparam("after"))
    .order_by(expert.c.since, expert.c.digest)
    .limit(bindparam("many"))
)  # fmt: skip
_members = (
    select(account.c.id, account.c.name, func.coalesce(func.sum(credit.c.amount), 0.0).label("credit"))
    .outerjoin(credit, credit.c.account == account.c.id)
    .group_by(account.c.id, account.c.name)
    .order_by(func.coalesce(func.sum(credit.c.amount), 0.0).desc(), account.c.id)
    .offset(bindparam("after"))
    .limit(bindparam("many"))
)
_ledger = select(credit).where(credit.c.number > bindparam("after")).order_by(credit.c.number).limit(bindparam("many"))
_events = select(event).where(event.c.number > bindparam("after")).order_by(event.c.number).limit(bindparam("many"))
_snapshot = select(snapshot.c.signed).where(snapshot.c.version == bindparam("version"))


@router.get("/v1/run", response_model=RunReply)
async def run(request: Request, hub: Here) -> Response:
    """The signed manifest."""
    row = await read(hub, lambda c: c.one(_run))
    if row is None:
        raise Refusal(503, "no-run", "no run is published here", do="`elmwood hub publish` makes one", retryable=True, retry_after=60)
    tag = f'"{row["version"]}"'
    if request.headers.get("If-None-Match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(f'{{"manifest":{row["signed"]}}}', media_type="application/json", headers={"ETag": tag})


@router.get("/v1/blobs/{sha}", response_class=StreamingResponse, responses={206: {"description": "a range"}, 416: {"description": "none"}})
async def content(request: Request, whose: MaybeWhose, hub: Here, sha: Sha) -> Response:
    """Bytes by digest, which never change. Held-out text and what has no verdict yet: for verifiers."""
    row = await read(hub, lambda c: c.one(_blob, sha=sha))
    if row is None or (row["secret"] and not await _may_see(whose)):
        raise Refusal(404, "no-blob", "there is no such blob", do="look its digest up")
    return send_blob(hub.blobs, sha, row["bytes"], request, bool(row["secret"]))


def send_blob(blobs: Blobs, sha: str, size: int, request: Request, secret: bool = False) -> Response:
    """A blob, or the range of it that is asked for."""
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{sha}"', "X-Content-Type-Options": "nosniff"}
    headers |= {"Cache-Control": "private, no-store" if secret else "public, max-age=31536000, immutable"}
    begin, end = _range(request.headers.get("Range", ""), size)
    if begin is None:
        return Response(status_code=416, headers=headers | {"Content-Range": f"bytes */{size}"})
    partial = (begin, end) != (0, size)
    if partial:
        headers |= {"Content-Range": f"bytes {begin}-{end - 1}/{size}"}
    headers |= {"Content-Length": str(end - begin)}
    pieces = blobs.read(sha, begin, end)
    return StreamingResponse(pieces, 206 if partial else 200, headers, "application/octet-stream")


@router.get("/v1/records/{digest}")
async def record_body(whose: MaybeWhose, hub: Here, digest: Digest) -> Response:
    """A record's canonical JSON, whose sha256 is its digest."""
    row = await read(hub, lambda c: c.one(_record, digest=digest))
    if row is None or (row["secret"] and not await _may_see(whose)):
        raise Refusal(404, "no-record", "there is no such record", do="look its digest up")
    return Response(row["body"], media_type="application/json", headers={"ETag": f'"{digest}"'})


async def _may_see(whose: Any) -> bool:
    return whose is not None and (await whose.look(lambda c, caller: caller.role)) in ("verifier", "admin")


def _range(text: str, size: int) -> tuple[int | None, int]:
    """First byte and the one after the last of a Range header with one range; (None, 0) where it cannot be met."""
    unit, _, spec = text.partition("=")
    first, dash, last = spec.strip().partition("-")
    if unit.strip() != "bytes" or not dash or "," in spec or not (first + last).isascii() or not (first + last).isdigit():
        return 0, size  # as if there were none
    if not first:
        return (max(size - int(last), 0), size) if int(last) else (None, 0)
    begin, end = int(first), min(int(last) + 1 if last else size, size)
    return (begin, end) if begin < end else (None, 0)


@router.get("/v1/domains")
async def domains(hub: Here, after: After = 0, many: Many = 100) -> list[dict[str, Any]]:
    """Domains from a number on."""
    return await _rows(hub, lambda c: c.all(_domains, after=after, many=many))


@router.get("/v1/experts")
async def all_experts(hub: Here, after: After = 0, many: Many = 100) -> list[dict[str, Any]]:
    """Experts from a version of the snapshot on, retired ones too."""
    return await _rows(hub, lambda c: c.all(_experts, after=after, many=many))


@router.get("/v1/members")
async def members(hub: Here, after: After = 0, many: Many = 100) -> list[dict[str, Any]]:
    """Members by credit; `after` skips so many. An erased one has no name."""
    return await _rows(hub, lambda c: c.all(_members, after=after, many=many))


@router.get("/v1/ledger", response_model=list[Credit])
async def ledger(hub: Here, after: After = 0, many: Many = 100) -> list[dict[str, Any]]:
    """Lines of the ledger after a number."""
    return await _rows(hub, lambda c: c.all(_ledger, after=after, many=many))


@router.get("/v1/events", response_model=list[Event])
async def events(hub: Here, after: After = 0, many: Many = 100) -> list[dict[str, Any]]:
    """Lines of the log after a number."""
    rows = await _rows(hub, lambda c: c.all(_events, after=after, many=many))
    return [row | {"facts": json.loads(row["facts"])} for row in rows]


@router.get("/v1/snapshot", response_model=Signed)
async def newest_snapshot(
    request: Request, hub: Here, version: Annotated[int | None, Query(ge=0, lt=1 << 53)] = None
) -> Response:  # fmt: skip
    """The newest snapshot, or one by version."""

    def find(c: Connection) -> Any:
        return experts.newest(c) if version is None else c.one(_snapshot, version=version)

    row = await read(hub, find)
    if row is None:
        raise Refusal(404, "no-snapshot", "there is no such snapshot", do="leave the version out")
    tag = f'"{hashlib.sha256(row["signed"].encode()).hexdigest()[:32]}"'
    if request.headers.get("If-None-Match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(row["signed"], media_type="application/json", headers={"ETag": tag})


@router.post("/v1/experts/{digest}/retire", response_model=Done)
async def retire(whose: Whose, hub: Here, digest: Digest, message: Retirement) -> Response:
    """Take an expert out of the ensemble (admin)."""
    return await whose.act(lambda c, caller: experts.retire(c, caller, digest, message, hub.moment(), hub.office))


async def _rows(hub: Here, fn: Any) -> list[dict[str, Any]]:
    return await read(hub, lambda c: [dict(row) for row in fn(c)])
