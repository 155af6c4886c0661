"""Uploads by tus 1.0 (core, creation, checksum, expiration, termination), bound to a lease and its token."""

import base64
import binascii
import hashlib
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from pydantic import TypeAdapter
from starlette.concurrency import run_in_threadpool

from elmwood.hub.actions import submissions
from elmwood.hub.actions.request import current
from elmwood.hub.api.asked import Here, Whose, read
from elmwood.hub.messages import Done, Id, UploadReply
from elmwood.hub.rules import Refusal

router = APIRouter(tags=["uploads"])
VERSION = "1.0.0"
_id: TypeAdapter[str] = TypeAdapter(Id)
TUS = {"Tus-Resumable": VERSION, "Cache-Control": "no-store"}
Resumable = Annotated[str, Header(alias="Tus-Resumable")]
Length = Annotated[int, Header(alias="Upload-Length", ge=0, lt=1 << 53)]
Offset = Annotated[int, Header(alias="Upload-Offset", ge=0, lt=1 << 53)]
Metadata = Annotated[str, Header(alias="Upload-Metadata", max_length=1000)]
Checksum = Annotated[str, Header(alias="Upload-Checksum", max_length=100)]


@router.options("/v1/uploads", status_code=204)
async def extensions(hub: Here) -> Response:
    """What this server can."""
    most = await read(hub, lambda c: current(c).limits.adapter_bytes)
    able = {"Tus-Version": VERSION, "Tus-Extension": "creation,checksum,expiration,termination", "Tus-Checksum-Algorithm": "sha256"}
    return Response(status_code=204, headers=TUS | able | {"Tus-Max-Size": str(most)})


@router.post("/v1/uploads", status_code=201, response_model=UploadReply)
async def create(whose: Whose, hub: Here, length: Length, metadata: Metadata, tus: Resumable = VERSION) -> Response:
    """Begin an upload; Upload-Metadata names lease and token."""
    check_version(tus)
    about = read_metadata(metadata)
    try:
        lease, token = _id.validate_python(about["lease"]), int(about["token"])
    except (KeyError, ValueError):
        raise Refusal(422, "bad-metadata", "Upload-Metadata needs the id of a lease and its token", do="send both in base64") from None
    made = await whose.act(lambda c, caller: submissions.open_upload(c, caller, lease, token, length, hub.moment()), 201)
    upload = UploadReply.model_validate_json(bytes(made.body)).upload
    made.headers.update(TUS | {"Location": f"/v1/uploads/{upload}"})
    return made


@router.head("/v1/uploads/{upload}")
async def offset(whose: Whose, upload: Id) -> Response:
    """How much of an upload is kept."""
    row = await whose.look(lambda c, caller: dict(submissions.find_upload(c, caller, upload)))
    return Response(headers=TUS | {"Upload-Offset": str(row["offset"]), "Upload-Length": str(row["bytes"])})


@router.patch("/v1/uploads/{upload}", status_code=204)
async def append(
    request: Request, whose: Whose, hub: Here, upload: Id, at: Offset, checksum: Checksum = "", tus: Resumable = VERSION
) -> Response:
    """Send a part. It is kept whole or not at all."""
    check_version(tus)
    if request.headers.get("Content-Type") != "application/offset+octet-stream":
        raise Refusal(415, "wrong-type", "a part has the type application/offset+octet-stream", do="set Content-Type")
    part = await request.body()
    row, most = await whose.look(lambda c, caller: (dict(submissions.find_upload(c, caller, upload)), current(c).limits.chunk_bytes))
    if row["offset"] != at:
        raise submissions.wrong_offset(row["offset"])
    if len(part) > most:
        raise Refusal(413, "too-large", f"the part has {len(part)} bytes, {most} are taken at once", do="send smaller parts")
    if not part or at + len(part) > row["bytes"]:
        raise Refusal(422, "wrong-length", f"the part has {len(part)} bytes, {row['bytes'] - at} are left", do="send what is left")
    check_sum(part, checksum)

    def keep() -> str | None:
        """Durable before the database says so."""
        number = row["parts"].count(",") + 1 if row["parts"] != "[]" else 0
        hub.blobs.put_part(upload, number, part)
        return hub.blobs.join(upload, number + 1)[0] if at + len(part) == row["bytes"] else None

    sha = await run_in_threadpool(keep)
    made: list[int] = []

    def write(c, caller) -> Done:
        made.append(submissions.advance(c, caller, upload, at, len(part), sha, hub.moment()))
        return Done()

    await whose.act(write, again=True)
    if sha:
        await run_in_threadpool(hub.blobs.drop_parts, upload, row["parts"].count(",") + 2)
    return Response(status_code=204, headers=TUS | {"Upload-Offset": str(made[0])})


@router.delete("/v1/uploads/{upload}", status_code=204)
async def terminate(whose: Whose, hub: Here, upload: Id) -> Response:
    """Give an upload up."""
    row = await whose.look(lambda c, caller: dict(submissions.find_upload(c, caller, upload)))
    await whose.act(lambda c, caller: submissions.drop_upload(c, caller, upload))
    await run_in_threadpool(hub.blobs.drop_parts, upload, row["parts"].count(",") + 1)
    return Response(status_code=204, headers=TUS)


def check_version(tus: str) -> None:
    if tus != VERSION:
        raise Refusal(412, "wrong-tus", f"this hub speaks tus {VERSION}", do="set Tus-Resumable")


def check_sum(part: bytes, checksum: str) -> None:
    """Raises Refusal: 460, as tus says, where the part arrived otherwise than it was sent."""
    if not checksum:
        return
    name, _, value = checksum.partition(" ")
    if name != "sha256":
        raise Refusal(400, "wrong-checksum", f"the checksum {name[:20]!r} is none of this hub's", do="use sha256")
    if base64.b64encode(hashlib.sha256(part).digest()).decode() != value:
        raise Refusal(460, "checksum", "the part arrived otherwise than it was sent", do="send it again", kept="all before", retryable=True)


def read_metadata(text: str) -> dict[str, str]:
    """Raises Refusal."""
    found = {}
    for pair in text.split(","):
        name, _, value = pair.strip().partition(" ")
        try:
            found[name] = base64.b64decode(value, validate=True).decode()
        except (binascii.Error, ValueError):
            raise Refusal(422, "bad-metadata", "a value of Upload-Metadata is no base64 of text", do="send it in base64") from None
    return found
