"""Bytes between a store and a hub: blobs come by digest and resume where they stopped; a file goes up in pieces (tus 1.0)."""

import base64
import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, Damaged, ElmwoodError
from elmwood.hub.client.http import FIRST_PAUSE, LONGEST_PAUSE, Hub, Problem, Unreachable
from elmwood.records import Digest, Record, parse, references
from elmwood.store import Store, hash_file

TRIES = 2  # of a blob whose bytes do not match its digest
CUTS = 20  # of a connection during one blob, without a byte between them
PIECE = 1 << 20  # bytes sent at once
TUS = {"Tus-Resumable": "1.0.0"}


def fetch_blobs(blobs: Iterable[str], hub: Hub, store: Store, progress: Progress = silent, what: str = "fetch") -> int:
    """Bring blobs that are missing; how many came. Raises Damaged, Unreachable, Problem."""
    missing = [blob for blob in dict.fromkeys(blobs) if not store.whole(blob)]
    for done, blob in enumerate(missing):
        progress(what, done, len(missing), "files")
        fetch_blob(blob, hub, store)
    if missing:
        progress(what, len(missing), len(missing), "files")
    return len(missing)


def fetch_blob(blob: str, hub: Hub, store: Store) -> Path:
    """Bring one blob, from where an earlier try stopped. Bytes that do not match are fetched again, then refused. Raises Damaged."""
    digest = blob.removeprefix("sha256:")
    with store.held(f"fetch-{digest[:32]}") as work:
        if store.whole(blob):
            return store.get(blob)
        part = work / "part"
        for _ in range(TRIES):
            _download(f"/v1/blobs/{digest}", part, hub)
            if hash_file(part) == digest:
                store.take(part, digest)
                return store.get(blob)
            part.unlink()
    raise Damaged(f"{blob[:19]}… came {TRIES} times from the hub with other bytes than its digest says: tell who runs it, nothing was kept")


def _download(target: str, part: Path, hub: Hub) -> None:
    """Append to a file what it lacks. A connection that is cut, or a hub that is busy, is asked again from the last byte."""
    idle, pause = 0, FIRST_PAUSE
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            with hub.stream("GET", target, headers={"Range": f"bytes={have}-"} if have else {}) as answer:
                if answer.status_code == 416:  # nothing is left
                    return
                if answer.status_code >= 400:
                    raise hub.problem(answer)
                with part.open("ab" if answer.status_code == 206 else "wb") as file:
                    for piece in answer.iter_raw():  # as it comes, so that a cut costs nothing that had come
                        file.write(piece)
                return
        except Problem as problem:
            if not problem.retryable:
                raise
            failure: ElmwoodError = problem
        except hub.httpx.TransportError:
            failure = Unreachable(f"{hub.url} cannot be reached while a file is fetched: run it again, it goes on from {have:,} bytes")
        grown = part.exists() and part.stat().st_size > have
        idle, pause = (0, FIRST_PAUSE) if grown else (idle + 1, min(2 * pause, LONGEST_PAUSE))
        if idle > CUTS:
            raise failure
        hub.on_wait(str(failure), pause)
        hub.sleep(pause)


def fetch_record(digest: Digest, hub: Hub, store: Store) -> Record:
    """A record by its digest, kept in the store. Raises Damaged, BadRecord."""
    if store.whole(digest):
        return store.read(digest)
    raw = hub.get(f"/v1/records/{digest}").body
    if hashlib.sha256(raw).hexdigest() != digest:
        raise Damaged(f"record {digest[:8]} came from the hub with other bytes than its digest says: tell who runs it, nothing was kept")
    record = parse(raw)
    store.add(record)
    return record


def fetch_with(digest: Digest, hub: Hub, store: Store, wanted: Callable[[Record], Iterable[str]]) -> Record:
    """A record, and of it and the records that it leads to what `wanted` names: records (hex) or blobs (`sha256:…`)."""
    record = fetch_record(digest, hub, store)
    for name in wanted(record):
        if name.startswith("sha256:"):
            fetch_blob(name, hub, store) if not store.whole(name) else None
        else:
            fetch_with(name, hub, store, wanted)
    return record


def blobs_of(record: Record) -> list[str]:
    """All blobs that a record names."""
    return [name for name in references(record) if name.startswith("sha256:")]


# ---- uploads --------------------------------------------------------------------------------------------------------


def begin_upload(path: Path, lease: str, token: int, hub: Hub, idempotency: str) -> str:
    """Tell the hub of a file; the id of the upload. Raises Problem."""
    facts = {"lease": lease, "token": str(token), "sha256": hash_file(path)}
    metadata = ",".join(f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in facts.items())
    headers = {**TUS, "Upload-Length": str(path.stat().st_size), "Upload-Metadata": metadata, "Idempotency-Key": idempotency}
    reply = hub.request("POST", "/v1/uploads", headers=headers)
    return reply.headers["location"].rstrip("/").rpartition("/")[2]


def send(path: Path, upload: str, hub: Hub, progress: Progress = silent) -> None:
    """Send what the hub lacks of a file. The hub's offset decides, also after a cut or a restart. Raises Problem, Unreachable."""
    target, size = f"/v1/uploads/{upload}", path.stat().st_size
    offset, refused = offset_of(upload, hub), 0
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            piece = file.read(PIECE)
            headers = {
                **TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream",
                "Upload-Checksum": f"sha256 {base64.b64encode(hashlib.sha256(piece).digest()).decode()}",
            }  # fmt: skip
            try:
                offset = int(hub.request("PATCH", target, piece, headers).headers["upload-offset"])
                refused = 0
            except Problem as problem:
                if problem.status not in (409, 460) or (refused := refused + 1) > 3:
                    raise
                offset = offset_of(upload, hub)  # a piece arrived whose answer was lost, or one was damaged on the way
            progress("upload", offset, size, "bytes")


def offset_of(upload: str, hub: Hub) -> int:
    """How many bytes the hub has. Raises Problem, BadInput."""
    found = hub.request("HEAD", f"/v1/uploads/{upload}", headers=TUS).headers.get("upload-offset", "")
    with suppress(ValueError):
        return int(found)
    raise BadInput("the hub does not say how much of the upload it has: is this the address of a hub?")
