"""Open files as streams of UTF-8: decompressed and decoded piece by piece, with bounds on what comes out."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from elmwood.errors import BadInput

HEAD = 8192  # bytes that are looked at to tell what a file is
BLOCK = 1 << 20
SMALL = 1 << 16
RATIO = 200  # a file that unpacks to more than this many times its size is a bomb; text packs 3 to 20 times
LARGEST_WINDOW = 27  # of zstd: log2 of the bytes that the library keeps in memory
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, gzip.BadGzipFile)  # and OSError without a number: cut short or damaged
_MARKS = {  # the first that fits: UTF-32 begins as UTF-16 does
    b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip


class Bomb(Exception):
    """A file unpacks to far more than its size."""


class Window(Exception):
    """A zstd file needs more memory than the library gives."""


class Packing(NamedTuple):
    """One way of compressing files."""

    endings: tuple[str, ...]
    magic: bytes  # a pattern of the first bytes
    open: Callable[[Path], Any]


def _open_zstd(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(18)
    if head[:4] == b"\x28\xb5\x2f\xfd" and len(head) > 5 and not head[4] & 0x20 and (log := 10 + (head[5] >> 3)) > LARGEST_WINDOW:
        raise Window(f"zstd with a window of 2^{log} bytes: unpack it with zstd -d --long={log}")
    return pa.input_stream(path, compression="zstd")


PACKED = {
    "gzip": Packing((".gz", ".gzip"), rb"\x1f\x8b\x08", gzip.open),
    "bzip2": Packing((".bz2",), rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.open),
    "xz": Packing((".xz",), rb"\xfd7zXZ\0", lzma.open),
    "zstd": Packing((".zst", ".zstd"), rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _open_zstd),
}


def packing(head: bytes) -> str:
    """How a file that begins so is compressed; empty: not at all."""
    return next((name for name, one in PACKED.items() if re.match(one.magic, head)), "")


def first_bytes(path: Path, unpack: bool = True) -> bytes:
    """The first bytes of a file, decompressed."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if unpack and (found := packing(head)):
        with PACKED[found].open(path) as stream:
            return stream.read(HEAD)
    return head


def byte_order_mark(head: bytes) -> str:
    """The encoding that the first bytes of a text name, if they do."""
    return next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), "")


def text_encoding(name: str) -> str:
    """The encoding as Python calls it. Raises BadInput when there is none of this name."""
    try:
        found = codecs.lookup(name)
        if not getattr(found, "_is_text_encoding", True) or "a".encode(name).decode(name) != "a":
            raise LookupError(name)
    except (LookupError, ValueError, UnicodeError) as error:
        raise BadInput(f"no text encoding {name!r}: name one that Python knows, such as utf-8, latin-1, cp1252 or gb18030") from error
    return found.name


def open_bytes(path: Path, largest: int) -> io.BufferedReader:
    """The bytes of a file, decompressed. Reading raises Bomb where it unpacks to more than RATIO times its size and than `largest`."""
    with path.open("rb") as file:
        found = packing(file.read(HEAD))
    if not found:
        return io.BufferedReader(path.open("rb", buffering=0), BLOCK)
    limit = max(largest, RATIO * path.stat().st_size)
    return io.BufferedReader(_Counted(PACKED[found].open(path), limit), BLOCK)


def open_utf8(path: Path, encoding: str, largest: int) -> io.BufferedReader:
    """The text of a file as UTF-8, without a byte order mark; a mark counts for more than `encoding`.

    UTF-8 is passed on unchecked. Other encodings are checked: reading raises UnicodeDecodeError, with the offset in the whole text.
    """
    mark = byte_order_mark(first_bytes(path))
    opened = open_bytes(path, largest)
    if mark == "utf-8-sig":
        opened.read(3)
    elif (mark or encoding) != "utf-8":
        return io.BufferedReader(_Decoded(opened, mark or encoding), BLOCK)
    return opened


def lines(opened: io.BufferedReader, largest: int) -> Iterator[bytes | None]:
    """The lines of a stream; None for one that is longer than `largest` bytes, of which no more than that is in memory."""
    while line := opened.readline(largest + 1):
        if len(line) <= largest or line.endswith(b"\n"):
            yield line
            continue
        skip_line(opened)
        yield None


def skip_line(opened: io.BufferedReader) -> None:
    """Read past the end of a line."""
    while (rest := opened.readline(BLOCK)) and not rest.endswith(b"\n"):
        pass


class _Counted(io.RawIOBase):
    """A decompressed stream, up to a limit."""

    def __init__(self, inner: Any, limit: int):
        self.inner, self.left, self.limit = inner, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.inner.read1(min(len(buffer), SMALL))  # an error loses what was read in the same call
        self.left -= len(data)
        if self.left < 0:
            raise Bomb(self.limit)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.inner.close()
        super().close()


class _Decoded(io.RawIOBase):
    """A stream in some encoding, as UTF-8."""

    def __init__(self, inner: io.BufferedReader, encoding: str):
        self.inner, self.decoder = inner, codecs.getincrementaldecoder(encoding)()
        self.read_before, self.ready = 0, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            data = self.inner.read(BLOCK)
            pending = len(self.decoder.getstate()[0])
            try:
                self.ready = self.decoder.decode(data, final=not data).encode(errors="surrogatepass")
            except UnicodeDecodeError as error:
                place = max(0, self.read_before - pending) + error.start
                raise UnicodeDecodeError(error.encoding, b"", place, place + 1, error.reason) from error
            self.read_before += len(data)
            if not data:
                break
        given, self.ready = self.ready[: len(buffer)], self.ready[len(buffer) :]
        buffer[: len(given)] = given
        return len(given)

    def close(self) -> None:
        self.inner.close()
        super().close()
