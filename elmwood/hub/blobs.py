"""Content by sha256, in a folder (that of a store: blobs/sha256/ab/cdef…) or in an object store (s3://bucket/prefix), and parts of uploads.

A blob is durable before the database names it: temporary file, fsync, rename, fsync of the folder; an object store's put is whole or not.
What no row names is garbage. No conditional write is needed: the key is the content's.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from elmwood.errors import Damaged, DoesNotFit, ElmwoodError
from elmwood.store.disk import CHUNK, hash_file, sync_folder, write_whole


class Unreachable(ElmwoodError):
    """The object store does not answer now."""


class Blobs:
    """`url`: a folder, or s3://… with the settings of obstore in the environment (AWS_ENDPOINT, AWS_ACCESS_KEY_ID, …). `uploads`: a folder
    for temporary files, and for parts of uploads where blobs are in a folder."""

    def __init__(self, url: str | Path, uploads: Path):
        self.url, self.uploads = str(url), uploads
        self.folder = None if "://" in self.url else Path(url)
        self.store: Any = None
        uploads.mkdir(parents=True, exist_ok=True)
        if self.folder is None:
            from obstore.store import from_url

            plain = os.environ.get("AWS_ENDPOINT", "").startswith("http://")
            self.store = from_url(self.url, config=None, client_options={"allow_http": plain}, retry_config={"max_retries": 3})  # type: ignore

    # ---- content

    def put(self, sha: str, content: bytes | Path) -> None:
        """Keep content whose sha256 the caller has computed; once. Raises DoesNotFit, Unreachable."""
        with _refusing():
            if self.folder is not None:
                path = self.folder / _key(sha)
                if not path.is_file():
                    write_whole(path, content)
            else:
                self._send(_key(sha), content)

    def has(self, sha: str) -> bool:
        return self.size(sha) is not None

    def size(self, sha: str) -> int | None:
        """Bytes of a blob; None where it is not here."""
        if self.folder is not None:
            path = self.folder / _key(sha)
            return path.stat().st_size if path.is_file() else None
        import obstore

        with _refusing():
            try:
                return obstore.head(self.store, _key(sha))["size"]
            except FileNotFoundError:
                return None

    def read(self, sha: str, begin: int, end: int) -> Iterator[bytes]:
        """Bytes begin ... end (not included), in pieces. Raises Damaged."""
        if self.folder is not None:
            with (self.folder / _key(sha)).open("rb") as file:
                file.seek(begin)
                while begin < end and (piece := file.read(min(CHUNK, end - begin))):
                    begin += len(piece)
                    yield piece
        else:
            import obstore

            while begin < end:
                with _refusing():
                    piece = bytes(obstore.get_range(self.store, _key(sha), start=begin, end=min(begin + CHUNK, end)))
                begin += len(piece)
                yield piece

    @contextmanager
    def file(self, sha: str) -> Iterator[Path]:
        """A blob as a file, while it is looked at. Raises Damaged."""
        size = self.size(sha)
        if size is None:
            raise Damaged(f"blob {sha[:8]} is not here: restore it from a backup")
        if self.folder is not None:
            yield self.folder / _key(sha)
        else:
            with self._temporary() as path:
                with path.open("wb") as file:
                    file.writelines(self.read(sha, 0, size))
                yield path

    # ---- parts of uploads

    def put_part(self, upload: str, number: int, content: bytes) -> None:
        """Keep a part of an upload, durably. The same part may be sent again. Raises DoesNotFit, Unreachable."""
        with _refusing():
            if self.folder is not None:
                write_whole(self.uploads / upload / str(number), content)
            else:
                self._send(f"uploads/{upload}/{number}", content)

    def join(self, upload: str, parts: int) -> tuple[str, int]:
        """Make one blob of the parts; its sha256 and size. The parts stay until `drop_parts`."""
        seen = hashlib.sha256()
        with _refusing(), self._temporary() as path:
            with path.open("wb") as file:
                for number in range(parts):
                    for piece in self._read_part(upload, number):
                        seen.update(piece)
                        file.write(piece)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            sha = seen.hexdigest()
            if self.folder is None:
                self._send(_key(sha), path)
            else:
                target = self.folder / _key(sha)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.chmod(0o644)
                try:
                    os.replace(path, target)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    write_whole(target, path)
                sync_folder(target.parent)
        return sha, size

    def _read_part(self, upload: str, number: int) -> Iterator[bytes]:
        if self.folder is not None:
            yield (self.uploads / upload / str(number)).read_bytes()
        else:
            import obstore

            yield bytes(obstore.get(self.store, f"uploads/{upload}/{number}").bytes())

    def drop_parts(self, upload: str, parts: int) -> None:
        """Forget the parts of an upload; those that are gone are gone."""
        if self.folder is not None:
            shutil.rmtree(self.uploads / upload, ignore_errors=True)
        else:
            import obstore

            with suppress(Exception):
                obstore.delete(self.store, [f"uploads/{upload}/{number}" for number in range(parts)])

    # ---- the rest

    def check(self, sha: str) -> bool:
        """Whether a blob's bytes have this sha256."""
        if not self.has(sha):
            return False
        with self.file(sha) as path:
            return hash_file(path) == sha

    def probe(self) -> str:
        """Whether the store takes what it must; a sentence. Raises DoesNotFit, Unreachable."""
        content = b"elmwood"
        sha = hashlib.sha256(content).hexdigest()
        self.put(sha, content)
        if b"".join(self.read(sha, 0, len(content))) != content:
            raise Unreachable(f"{self.url} gives other bytes than were put into it: use another store")
        where = "folder" if self.folder is not None else "object store"
        return f"blobs: {where} {self.url}, written and read"

    def _send(self, key: str, content: bytes | Path) -> None:
        import obstore

        obstore.put(self.store, key, content)

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        handle, name = tempfile.mkstemp(dir=self.uploads, suffix=".tmp")
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)


def _key(sha: str) -> str:
    return f"sha256/{sha[:2]}/{sha[2:]}"


@contextmanager
def _refusing() -> Iterator[None]:
    """Errors of the disk and of the object store, as ours."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        _fail(error)
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "obstore":
            raise
        raise Unreachable(f"the object store does not answer ({type(error).__name__}): ask again in a moment") from error


def _fail(error: OSError) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DoesNotFit("the hub's disk is full: make room; what was acknowledged is kept") from error
    raise Unreachable(f"the hub's disk does not answer ({error.strerror}): ask again in a moment") from error
