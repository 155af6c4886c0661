"""A check of everything in a store: bytes, records, references, names and views. Whatever it finds, it names it and goes on."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from elmwood.errors import BadRecord, ForeignExpert
from elmwood.records import Record, State, fingerprint, parse, references
from elmwood.store import Store, links, read_ref
from elmwood.store.disk import hash_file, left_over
from elmwood.store.relations import check_relations, contributed, texts

_LEFT = re.compile(r"tmp[a-z0-9_]{8}(\.tmp)?")  # a temporary file: the next run of a task removes it unless it is in use


class Damage(NamedTuple):
    """A finding of `verify`."""

    where: str  # path below the store
    problem: str
    elsewhere: bool = False  # not damaged: text, or experts of a sum, that stayed with their owner; or left over


def verify(store: Store, progress: Callable[[float, float], None] = lambda done, total: None) -> Iterator[Damage]:
    """Hash every blob and record, follow every reference and ref, and yield what is damaged or odd. Progress is in bytes.

    Text that stayed with its owner is yielded with `elsewhere` set (see `_stayed`), and so are experts of received sums.
    """
    known: dict[str, Record] = {}
    for path in _entries(store.root / "records"):
        problem = _odd(path, r"[0-9a-f]{64}\.json") or _read(path, known)
        if problem:
            yield Damage(_where(path, store), problem)
    for digest, record in known.items():
        try:
            check_relations(record, known.get)
        except (BadRecord, ForeignExpert) as error:
            yield Damage(f"records/{digest}.json", str(error))
    users: dict[str, str] = {}  # digest -> a record that needs it
    for digest, record in known.items():
        hub = bool(getattr(record, "hub", None))  # its blobs stay in a model hub's own cache
        users |= {name: digest for name in references(record) if not (hub and name.startswith("sha256:"))}
    yield from _blobs(store, users, progress)
    made = {digest for path in (store.root / "refs" / "done").glob("*") if path.is_file() and (digest := read_ref(path))}
    named_by = {digest: record for digest, record in known.items() if texts(record)}
    stayed = _stayed(store, named_by, made)
    for digest, record in named_by.items():
        if count := len(texts(record) & stayed):
            yield Damage(f"records/{digest}.json", f"{count} digests of text are not here: text stays with its owner", elsewhere=True)
    others = _others(store, known, made)
    for digest, record in known.items():
        if count := len(contributed(record) & others):
            yield Damage(f"records/{digest}.json", f"{count} experts of this sum are not here: they stay with their owner", elsewhere=True)
    needed = (
        {name for digest, record in known.items() for name in references(record) if name not in contributed(record)} if others else set()
    )
    for digest, user in users.items():
        if not store.has(digest) and digest not in stayed and (digest not in others or digest in needed):
            yield Damage(_where(store.path(digest), store), f"missing; record {user[:12]} needs it")
    yield from _refs(store)
    yield from _views(store)
    for path in left_over(store.temporary()):
        yield Damage(_where(path, store), "left by a process that was killed: the next run that makes something removes it", elsewhere=True)


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without temporary files."""
    return sorted(path for path in folder.iterdir() if not _LEFT.fullmatch(path.name)) if folder.is_dir() else []


def _where(path: Path, store: Store) -> str:
    """The path below the store, in letters that can be printed."""
    return os.fsencode(path.relative_to(store.root)).decode(errors="backslashreplace")


def _odd(path: Path, name: str) -> str:
    """What is wrong with a path that should be a file of this name (a pattern); empty: nothing."""
    if path.is_symlink() and not path.exists():
        return "a link that leads nowhere: delete it"
    if not path.is_file():
        return f"a {'folder' if path.is_dir() else 'device or pipe'} where a file belongs: delete it"
    return "" if re.fullmatch(name, path.name) else "its name is not one that a store gives: move it elsewhere"


def _read(path: Path, known: dict[str, Record]) -> str:
    """Add a record to those that are known, or return what is wrong with it."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != path.stem:
            with suppress(OSError):
                os.utime(path)
            return "content does not match its name"
        record = parse(data)
        list(references(record))
    except (OSError, BadRecord, RecursionError) as error:
        return str(error)
    known[path.stem] = record
    return ""


def _blobs(store: Store, users: Mapping[str, str], progress: Callable[[float, float], None]) -> Iterator[Damage]:
    top = store.root / "blobs" / "sha256"
    files: list[Path] = []
    for path in (*_entries(top.parent), *_entries(top)):
        if path != top and not (path.parent == top and path.is_dir() and re.fullmatch("[0-9a-f]{2}", path.name)):
            yield Damage(_where(path, store), "not a folder of blobs: move it elsewhere")
    for path in (path for folder in sorted(top.glob("??")) for path in _entries(folder)):
        if problem := _odd(path, "[0-9a-f]{62}"):
            yield Damage(_where(path, store), problem)
        else:
            files.append(path)
    total, done = sum(path.stat().st_size for path in files), 0
    for path in files:
        name = path.parent.name + path.name
        try:
            problem = "" if hash_file(path) == name else "content does not match its name"
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if problem:
            with suppress(OSError):
                os.utime(path)  # as in Store.whole: its task looks at it again
            user = users.get(f"sha256:{name}")
            yield Damage(_where(path, store), problem + (f"; record {user[:12]} needs it" if user else ""))
        done += path.stat().st_size
        progress(done, total)


def _refs(store: Store) -> Iterator[Damage]:
    refs = store.root / "refs"
    for path in sorted(refs.rglob("*")):
        if _LEFT.fullmatch(path.name) or (path.is_dir() and not path.is_symlink()):
            continue
        digest = "" if _odd(path, ".*") else read_ref(path)
        if problem := _odd(path, ".*") or ("" if digest else "holds no digest of a record: delete it, and name the record again"):
            yield Damage(_where(path, store), problem)
        elif path.parent != refs / "done":  # a task whose record is not here runs again
            if path.relative_to(refs).as_posix() not in store.names():
                yield Damage(_where(path, store), "its name is not one that a store gives: move it elsewhere")
            elif not store.has(digest):
                yield Damage(_where(path, store), f"points to {digest[:12]}, which is not here")


def _views(store: Store) -> Iterator[Damage]:
    """Views that do not hold the blobs they are named by. `Store.folder` makes them again."""
    for view in _entries(store.root / "views"):
        if view.is_symlink() or not view.is_dir() or _content(view) != view.name:
            yield Damage(_where(view, store), "does not hold the blobs it is named by: delete it; it is made again when it is needed")


def _content(view: Path) -> str:
    """The name of a view that holds these links to blobs, or copies of blobs where a store was copied; empty for anything else."""
    files = {}
    for name, target in links(view).items():
        if target is None and not (view / name).is_file():
            return ""
        files[name] = "sha256:" + (target.parent.name + target.name if target else hash_file(view / name))
    return fingerprint(files)


def _others(store: Store, known: Mapping[str, Record], made: Iterable[str]) -> set[str]:
    """Experts, and their statistics, that were never here: named by a state that was received, and made by no task here."""
    received = {
        name for digest, record in known.items() if isinstance(record, State) and digest not in made for name in contributed(record)
    }
    return {name for name in received - set(made) if not store.has(name)}


def _stayed(store: Store, named_by: Mapping[str, Record], made: set[str]) -> set[str]:
    """Digests of text that may be missing here: named only by records that were received, by none that was made here.

    A record was received if no finished task here made it and its corpus is not here. A record that was made here needs the text
    it names, except for text that its parent partition names too.
    """
    received: set[str] = set()
    needed: set[str] = set()
    for digest, record in named_by.items():
        grown = getattr(record, "grown_from", None)  # a seed of a later round: whoever has what it grew from made it
        corpus, parent = grown or getattr(record, "corpus", None), named_by.get(getattr(record, "parent", None) or "")
        if digest in made or (corpus and store.has(corpus)):
            needed |= texts(record) - (texts(parent) if parent else set())
        else:
            received |= texts(record)
    return {digest for digest in received - needed if not store.has(digest)}
