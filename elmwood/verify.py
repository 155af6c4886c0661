"""A check of everything in a store: bytes, records, references and names."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from elmwood.errors import BadRecord
from elmwood.records import Record, parse, references
from elmwood.store import Store, hash_file, texts


class Damage(NamedTuple):
    """A finding of `verify`."""

    where: str  # path below the store
    problem: str
    elsewhere: bool = False  # not damaged: text that stayed with its owner


def verify(store: Store, progress: Callable[[float, float], None] = lambda done, total: None) -> Iterator[Damage]:
    """Hash every blob and record, follow every reference and ref, and yield what is damaged. Progress is in bytes.

    Text that stayed with its owner is yielded with `elsewhere` set (see `_stayed`).
    """
    users: dict[str, str] = {}  # digest -> a record that needs it
    named_by: dict[str, Record] = {}  # records that name text
    for digest in store.records():
        data = store.path(digest).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            yield Damage(f"records/{digest}.json", "content does not match its name")
            continue
        try:
            record = parse(data)
        except BadRecord as error:
            yield Damage(f"records/{digest}.json", str(error))
            continue
        elsewhere = bool(getattr(record, "hub", None))  # its blobs stay in a model hub's own cache
        users |= {name: digest for name in references(record) if not (elsewhere and name.startswith("sha256:"))}
        if texts(record):
            named_by[digest] = record
    blobs = [path for path in sorted((store.root / "blobs" / "sha256").glob("??/*")) if path.suffix != ".tmp"]
    total = sum(path.stat().st_size for path in blobs)
    done = 0
    for path in blobs:
        name = path.parent.name + path.name
        if hash_file(path) != name:
            user = users.get(f"sha256:{name}")
            needed = f"; record {user[:12]} needs it" if user else ""
            yield Damage(path.relative_to(store.root).as_posix(), "content does not match its name" + needed)
        done += path.stat().st_size
        progress(done, total)
    stayed = _stayed(store, named_by)
    for digest, record in named_by.items():
        if count := len(texts(record) & stayed):
            yield Damage(f"records/{digest}.json", f"{count} digests of text are not here: text stays with its owner", elsewhere=True)
    for digest, user in users.items():
        if not store.has(digest) and digest not in stayed:
            yield Damage(store.path(digest).relative_to(store.root).as_posix(), f"missing; record {user[:12]} needs it")
    for ref, digest in store.names().items():
        if not store.has(digest):
            yield Damage(f"refs/{ref}", f"points to {digest[:12]}, which is not here")


def _stayed(store: Store, named_by: Mapping[str, Record]) -> set[str]:
    """Digests of text that may be missing here: named only by records that were received, by none that was made here.

    A record was received if no finished task here made it and its corpus is not here. A record that was made here needs the text
    it names, except for text that its parent partition names too.
    """
    made = {path.read_text().strip() for path in (store.root / "refs" / "done").glob("*") if path.suffix != ".tmp"}
    received: set[str] = set()
    needed: set[str] = set()
    for digest, record in named_by.items():
        corpus, parent = getattr(record, "corpus", None), named_by.get(getattr(record, "parent", None) or "")
        if digest in made or (corpus and store.has(corpus)):
            needed |= texts(record) - (texts(parent) if parent else set())
        else:
            received |= texts(record)
    return {digest for digest in received - needed if not store.has(digest)}
