"""Files on disk: written whole or not at all, hashed once while they stay the same; what a killed process left behind is removed."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CHUNK = 1 << 20
SETTLED = 50_000_000  # nanoseconds; a file that changed later than that may change again and keep its time
_hashed: dict[tuple[int, ...], str] = {}  # device, inode, size and times of a file -> its sha256


def hash_file(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_once(path: Path) -> str:
    """sha256 of a file, hex. It is read again only if its inode, size or times differ from those that this process saw."""
    key = _identity(path)
    return _hashed.get(key) or remember(path, hash_file(path), key)


def remember(path: Path, digest: str, key: tuple[int, ...] | None = None) -> str:
    """Keep the sha256 of a file for `hash_once`, and return it. `key`: what the file was before it was hashed."""
    key = key or _identity(path)
    if time.time_ns() - max(key[3:]) > SETTLED:
        _hashed[key] = digest
    return digest


def _identity(path: Path) -> tuple[int, ...]:
    about = path.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


@contextmanager
def locked(path: Path, waits: Callable[[int], None]) -> Iterator[None]:
    """Hold a lock file alone; the kernel releases it when the process ends. Calls `waits(0)` and `waits(1)` around a wait for another.

    It is removed while it is held. Who waited for it sees that it is gone, and takes the one that is there now.
    """
    while True:
        with path.open("w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waits(0)
                fcntl.flock(file, fcntl.LOCK_EX)
                waits(1)
            if os.fstat(file.fileno()).st_nlink:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_whole(temporary: Path, path: Path) -> None:
    """Give a written file its name, durably: readers see the whole file or none."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_whole(path: Path, content: bytes | Path, *, durable: bool = True) -> None:
    """Write a temporary file, fsync and rename it: readers see the whole file or none. Content is bytes or a file to copy.

    `durable=False` leaves out the fsync, for what can be made again and is checked when it is read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = _temporary_file(path.parent)
    try:
        with os.fdopen(handle, "wb") as file:  # it is locked until it has its name
            if isinstance(content, bytes):
                file.write(content)
            else:
                with content.open("rb") as source:
                    shutil.copyfileobj(source, file, CHUNK)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def _temporary_file(folder: Path) -> tuple[int, str]:
    """A new file, locked by this process, with its handle."""
    while True:
        handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # another process swept it before it was locked


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder, locked by this process, and removed at the end if it is still there."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent))
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def left_over(paths: Iterable[Path]) -> Iterator[Path]:
    """Those of these temporary files and folders whose process has ended: its lock on them ended with it. Each is locked meanwhile."""
    for path in paths:
        with suppress(OSError):  # locked by a live process, or finished meanwhile
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield path
            finally:
                os.close(handle)


def sweep(paths: Iterable[Path]) -> None:
    """Remove the temporary files and folders whose process has ended."""
    for path in left_over(paths):
        with suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
