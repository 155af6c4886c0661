"""A folder of blobs and records, named by digest. Files are written once, atomically; nothing is pickled.

blobs/sha256/ab/cdef…   content
records/<digest>.json   records
refs/<name>             the names people type, and refs/done/<key>: which record a finished task made
work/<key>/             unfinished tasks
logs/<key>.jsonl        measurements of tasks, such as seconds (not content-addressed)
answers/<model>.jsonl   answers of models to benchmarks (elmwood/evaluate/harness.py); may be deleted
secret                  the key of random orders of blocks (accept); never leaves this folder
views/<digest>/         folders of links to blobs, for libraries that need a folder; may be deleted
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

from elmwood.engine import Progress, silent
from elmwood.errors import BadRecord, Damaged, DoesNotFit, UnknownName
from elmwood.records import Expert, Files, Partition, Record, canonical, fingerprint, references
from elmwood.store.disk import hash_file as hash_file
from elmwood.store.disk import hash_once, keep_whole, locked, remember, sweep, temporary_folder, write_whole
from elmwood.store.relations import check_relations, parse_file, texts
from elmwood.store.relations import lineage as lineage

R = TypeVar("R", bound=Record)
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
_DIGEST = re.compile(r"^[0-9a-f]{64}$")
LONGEST = 200  # characters of a name: file systems allow 255 bytes
_agreed: set[tuple[Path, str]] = set()  # root and digest of records that this process checked against those they name
_swept: set[Path] = set()  # stores that this process looked through for left-over files


@runtime_checkable
class Holder(Protocol):
    """A result that holds the record it is about, and stands for it."""

    @property
    def record(self) -> Record: ...


Named = str | Record | Holder  # a name, a digest or the beginning of one; or the thing itself


class Store:
    """A folder of blobs, records and refs: the one given, else what ELMWOOD_STORE names, else `.elmwood`. A Store opens itself again."""

    def __init__(self, root: "Path | str | Store | None" = None):
        folder = root.root if isinstance(root, Store) else root
        self.root: Path = Path(folder or os.environ.get("ELMWOOD_STORE") or ".elmwood")

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    # ---- blobs

    def path(self, digest: str) -> Path:
        """The path of a blob or record, which may not exist."""
        if digest.startswith("sha256:"):
            return self.root / "blobs" / "sha256" / digest[7:9] / digest[9:]
        return self.root / "records" / f"{digest}.json"

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def whole(self, digest: str) -> bool:
        """Whether a blob or record is here and its bytes match its digest. A file is hashed once in a process."""
        path = self.path(digest)
        if not path.is_file():
            return False
        if hash_once(path) == digest.removeprefix("sha256:"):
            return True
        with suppress(OSError):
            os.utime(path)  # newer than the task that made it: `done` looks at it again
        return False

    def get(self, digest: str) -> Path:
        """The file of a blob or record. Its bytes are checked at the first use in a process. Raises Damaged."""
        path = self.path(digest)
        if self.whole(digest):
            return path
        cure = "copy it from another store, or repeat the command that made it"
        if path.is_file():
            raise Damaged(f"{path.relative_to(self.root)} does not match its digest: {cure}")
        raise Damaged(f"{digest[:19]}… is not in {self.root}; {cure}")

    def put(self, content: bytes | Path) -> str:
        """Store bytes or the content of a file, once; return the digest. A damaged blob is replaced. Raises DoesNotFit."""
        digest = "sha256:" + (hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else hash_file(content))
        if not self.whole(digest):
            self._write(self.path(digest), content)
        return digest

    def take(self, path: Path, digest: str | None = None) -> str:
        """Like `put`, but moves the file, which must be below the root of this store (in `work`). `digest`: its sha256 in hex, if the
        caller knows it."""
        digest = digest or hash_file(path)
        name = f"sha256:{digest}"
        if self.whole(name):
            path.unlink()
            return name
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.chmod(0o644)
        keep_whole(path, target)
        remember(target, digest)
        return name

    def put_folder(self, folder: Path) -> Files:
        """Store every file below a folder."""
        return {path.relative_to(folder).as_posix(): self.put(path) for path in sorted(folder.rglob("*")) if path.is_file()}

    def folder(self, files: Mapping[str, str]) -> Path:
        """A folder with these files, as links to blobs, for libraries that open folders. Raises Damaged."""
        view = self.root / "views" / fingerprint(dict(files))
        if bad := next((name for name in files if Path(name).is_absolute() or ".." in Path(name).parts), None):
            raise Damaged(f"a record names the file {bad!r}; files stay inside their folder: do not use this record")
        blobs = {name: self.get(digest).resolve() for name, digest in files.items()}
        if view.is_symlink() or view.exists():
            if not view.is_symlink() and blobs == links(view):
                return view
            view.unlink() if view.is_symlink() or view.is_file() else shutil.rmtree(view)
        with temporary_folder(view.parent) as building:
            for name, blob in blobs.items():
                target = building / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(os.path.relpath(blob, target.parent.resolve()))
            with suppress(OSError):  # another process was faster
                building.rename(view)
        return view

    # ---- records

    def add(self, record: Record) -> str:
        """Store a record; return its digest."""
        if not self.whole(record.digest):
            data = canonical(record)
            if hashlib.sha256(data).hexdigest() != record.digest:
                raise BadRecord(f"{record.kind} {record.digest[:8]} is not spelled as elmwood spells it: copy its file instead")
            self._write(self.path(record.digest), data)
        return record.digest

    @overload
    def load(self, name: Named) -> Record: ...

    @overload
    def load(self, name: Named, kind: type[R]) -> R: ...

    def load(self, name: Named, kind: type[Record] = Record) -> Record:
        """The record that a ref, a digest or the beginning of one names. A record stands for itself, and is added where it is new.

        Raises UnknownName, Damaged, BadRecord, ForeignExpert where it does not agree with the records it names.
        """
        record = self.read(self.resolve(name)) if isinstance(name, str) else _held(name)
        if not isinstance(record, kind):
            called = repr(name) if isinstance(name, str) else record.digest[:8]
            raise UnknownName(f"{called} is a {record.kind}, a {kind.__name__.lower()} is needed here; `elmwood show` lists what there is")
        if not isinstance(name, str):
            self.add(record)
        self._agree(record)
        return record

    def _agree(self, record: Record) -> None:
        """Check a record against those it names, once in a process. Raises BadRecord, ForeignExpert."""
        key, absent = (self.root.resolve(), record.digest), []

        def find(digest: str) -> Record | None:
            if self.has(digest):
                return self.read(digest)
            absent.append(digest)
            return None

        if key not in _agreed:
            check_relations(record, find)
            if not absent:
                _agreed.add(key)

    def read(self, digest: str) -> Record:
        """The record of a digest, by itself, whether or not it agrees with those it names. Raises Damaged, BadRecord."""
        path = self.get(digest)
        try:
            return parse_file(path)
        except BadRecord as error:
            raise type(error)(f"records/{digest[:12]}…: {error}") from error

    def expand(self, names: Named | Iterable[Named]) -> list[str | Record]:
        """One name or record, or several; a name that ends in '/' is replaced by all names below it. Raises UnknownName."""
        found: list[str | Record] = []
        for name in listed(names):
            if not isinstance(name, str):
                found.append(_held(name))
            elif not name.endswith("/"):
                found.append(name)
            elif below := [known for known in self.names() if known.startswith(name)]:
                found += below
            else:
                raise UnknownName(f"no names begin with {name!r}; `elmwood show` lists them")
        return found

    def resolve(self, name: Named) -> str:
        """The digest that a ref, a digest or its unambiguous beginning (at least 4 digits) names. Raises UnknownName."""
        if not isinstance(name, str):
            return _held(name).digest
        if _NAME.match(name) and (ref := self.root / "refs" / name).is_file():
            if digest := read_ref(ref):
                return digest
            raise Damaged(f"refs/{name} holds no digest of a record: delete it, and name the record again")
        if _DIGEST.match(name) and self.has(name):
            return name
        if re.fullmatch(r"[0-9a-f]{4,64}", name):
            found = [path.stem for path in (self.root / "records").glob(f"{name}*.json")]
            if len(found) == 1:
                return found[0]
            if found:
                raise UnknownName(f"{name!r} begins {len(found)} digests; type more of it")
        raise UnknownName(f"nothing here is called {name!r}; `elmwood show` lists names and digests")

    def records(self) -> Iterator[str]:
        """Digests of all records, sorted."""
        return iter(sorted(path.stem for path in (self.root / "records").glob("*.json") if _DIGEST.match(path.stem) and path.is_file()))

    # ---- refs

    def name(self, name: str, digest: str) -> None:
        """Name a record. Raises UnknownName."""
        self.check_name(name)
        self._write(self.root / "refs" / name, f"{digest}\n".encode())

    def unname(self, name: str) -> None:
        """Take a name back; the record stays. Nothing happens where nothing has the name."""
        if name in self.names():
            (self.root / "refs" / name).unlink(missing_ok=True)

    def check_name(self, name: str) -> None:
        """Whether a record can get this name; long work asks before it begins. Raises UnknownName."""
        refs = self.root / "refs"
        if not _NAME.match(name) or name.endswith(".tmp"):
            raise UnknownName(f"{name!r} cannot be a name: letters, digits, '.', '_' and '-', in parts joined by '/'")
        if len(name) > LONGEST:
            raise UnknownName(f"a name of {len(name)} characters, {name[:20]}…, is too long: choose one of {LONGEST} or fewer")
        if name.partition("/")[0] == "done":
            raise UnknownName(f"{name!r} cannot be a name: names below 'done' are those of finished tasks; choose another")
        if (refs / name).is_dir():
            raise UnknownName(f"{name!r} cannot be a name: other names begin with {name + '/'!r}; choose another")
        if taken := next((str(part) for part in Path(name).parents if (refs / part).is_file()), None):
            raise UnknownName(f"{name!r} cannot be a name: {taken!r} is one, and nothing can be named below it; choose another")

    def names(self) -> dict[str, str]:
        """All refs except those of finished tasks: name -> digest."""
        refs = self.root / "refs"
        found = ((path.relative_to(refs).as_posix(), path) for path in sorted(refs.rglob("*")) if path.is_file() and path.suffix != ".tmp")
        mine = ((name, read_ref(path)) for name, path in found if _NAME.match(name) and not name.startswith("done/"))
        return {name: digest for name, digest in mine if digest}

    def secret(self) -> bytes:
        """32 random bytes, made at the first call, readable by the owner of the store only."""
        path = self.root / "secret"
        if not path.exists():
            self._write(path, secrets.token_bytes(32))
            path.chmod(0o600)
        return path.read_bytes()

    # ---- tasks

    def done(self, key: str) -> str | None:
        """The digest of the record that a finished task made; None if it has not finished, or its record or a blob of it is damaged.

        Blobs that are older than the end of the task are not hashed here: their first use does that.
        """
        ref = self.root / "refs" / "done" / key
        digest = self.find_done(key)
        if not digest or not self.whole(digest):
            return None
        ended, blobs = ref.stat().st_mtime_ns, self._made(self.read(digest))
        if not all(self.has(blob) for blob in blobs):
            return None
        newer = [blob for blob in blobs if self.path(blob).stat().st_mtime_ns >= ended]
        if not all(self.whole(blob) for blob in newer):
            return None
        if newer:
            with suppress(OSError):
                os.utime(ref)  # they need no second look
        return digest

    def find_done(self, key: str) -> str | None:
        """As `done`, but the record and its blobs may be damaged: for readers that refuse those, and make nothing again."""
        ref = self.root / "refs" / "done" / key
        digest = read_ref(ref) if ref.is_file() else ""
        return digest if digest and self.has(digest) else None

    def _made(self, record: Record) -> set[str]:
        """The blobs of a task's record, without text that may have stayed with its owner, or in a model hub's cache."""
        blobs = {name for name in references(record) if name.startswith("sha256:")}
        if isinstance(record, Partition) and record.parent and self.whole(record.parent):
            return blobs - texts(self.read(record.parent))
        return set() if getattr(record, "hub", None) else blobs - (set(record.data) if isinstance(record, Expert) else set())

    def finish(self, key: str, record: Record) -> None:
        """Store the record that a task made, mark the task done, and delete its work folder."""
        self._write(self.root / "refs" / "done" / key, f"{self.add(record)}\n".encode())
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)

    def work(self, key: str) -> Path:
        """The folder of an unfinished task."""
        path = self.root / "work" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def held(self, key: str, progress: Progress = silent) -> Iterator[Path]:
        """The work folder of a task, for one process at a time: the next one waits, says so, and then finds the task done.

        Raises DoesNotFit when the disk is full; the task can be resumed.
        """
        work = self.root / "work" / key  # made once it is held: another process may be removing it
        work.parent.mkdir(parents=True, exist_ok=True)
        with locked(work.with_suffix(".lock"), lambda done: progress("waiting for another process at this", done, 1, "tasks")):
            self._sweep()
            try:
                yield self.work(key)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DoesNotFit(f"no space left in {work}; free some, or move the store with --store") from error
                raise
            if self.done(key):
                shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # it holds what the next run resumes from
                work.rmdir()

    def log(self, key: str, **measured: float | str) -> None:
        """Append measurements of a task, such as seconds. They depend on the machine, so they are not part of a record."""
        path = self.root / "logs" / f"{key}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measured) + "\n")

    def logged(self, key: str) -> list[dict]:
        """The lines of a task's log, without lines that a crash truncated."""
        path = self.root / "logs" / f"{key}.jsonl"
        found = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            with suppress(ValueError, RecursionError):
                if isinstance(value := json.loads(line), dict):
                    found.append(value)
        return found

    # ---- writing

    def _write(self, path: Path, content: bytes | Path) -> None:
        self._sweep()
        try:
            write_whole(path, content)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DoesNotFit(f"no space left to write {path}; free some, or move the store with --store") from error
            raise

    def _sweep(self) -> None:
        """Once in a process, remove temporary files and folders of processes that were killed."""
        if self.root.resolve() not in _swept:
            _swept.add(self.root.resolve())
            sweep(self.temporary())

    def temporary(self) -> Iterator[Path]:
        """Temporary files and folders, those of live processes too."""
        left = "tmp????????"  # as tempfile names them
        file = f"{left}.tmp"
        places = (file, f"blobs/sha256/??/{file}", f"records/{file}", f"refs/**/{file}", f"views/{left}", "work/*.lock")
        return (path for place in places for path in self.root.glob(place))


AnyStore = Store | Path | str | None  # what a Store can be opened from; None: the default folder


def listed(given: Named | Path | Iterable[Named | Path]) -> list[Any]:
    """One thing or several, as a list."""
    return [given] if isinstance(given, str | Path | Record | Holder) else list(given)


def read_ref(path: Path) -> str:
    """The digest that a file of `refs` holds; empty if it holds something else."""
    with path.open("rb") as file:
        found = file.read(100).decode(errors="replace").strip()
    return found if _DIGEST.match(found) else ""


def links(folder: Path) -> dict[str, Path | None]:
    """The links below a folder: path -> target. What is neither a link nor a folder has no target."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): Path(os.path.realpath(path)) if path.is_symlink() else None for path in found}


def _held(given: Record | Holder) -> Record:
    return given if isinstance(given, Record) else given.record
