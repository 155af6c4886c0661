"""Tensors of safetensors files by name, read in pieces into reused buffers, and written back correctly rounded.

A memory map would count as resident memory and cost a page fault for every 4 KiB: files are read with preadv instead.

N values of one tensor, or a part of it
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.errors import BadInput, Damaged
from elmwood.store.headers import read_header
from elmwood.weights import exact, kernels

Floats = NDArray[np.floating[Any]]
Bytes = NDArray[np.uint8]

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # dtypes that can be merged -> bytes of a value
# the smallest magnitude that rounds to infinity: half a step above the largest value of a dtype
OVERFLOW = {"F64": math.inf, "F32": (2 - 2.0**-24) * 2.0**127, "F16": 65520.0, "BF16": (2 - 2.0**-8) * 2.0**127}
BLOCK = exact.BLOCK  # values worked on at once: they stay in the second-level cache
PIECE = 4 * BLOCK  # values read at once
PROBES = 8  # places of a file that say whether it is in the cache
PAGE = 4096  # what direct reading begins and ends with
SETTLED = 1 << 24  # bytes hashed and brought to the disk at once


class StoredTensor(NamedTuple):
    """Where a tensor stands."""

    path: Path
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    start: int  # byte of the file
    turned: bool = False  # the matrix of a linear layer stands as [inputs, outputs]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of a value. Raises BadInput."""
        if self.dtype == "I64":  # sums
            return 8
        if self.dtype not in SIZES:
            raise BadInput(f"{self.path}: {self.dtype} values cannot be merged; only {', '.join(SIZES)}: convert the checkpoint first")
        return SIZES[self.dtype]


def places(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of these files, in the order they stand in them. Raises Damaged."""
    found: dict[str, StoredTensor] = {}
    for path in paths:
        top = read_header(path)
        for name, entry in sorted(top.tensors.items(), key=lambda item: item[1]["data_offsets"][0]):
            found[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), top.begin + entry["data_offsets"][0])
    return found


def pack_header(entries: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a safetensors file with these (name, dtype, shape, bytes), one after another."""
    said: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, dtype, shape, size in entries:
        said[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Files:
    """Open files, the ones used last kept open."""

    def __init__(self, flags: int = 0, most: int = 128):
        self.flags, self.most = os.O_RDONLY | flags, most
        self.handles: dict[Path, int] = {}

    def handle(self, path: Path) -> int:
        found = self.handles.pop(path, None)
        if found is None:
            if len(self.handles) >= self.most:
                os.close(self.handles.pop(next(iter(self.handles))))
            found = os.open(path, self.flags)
        self.handles[path] = found
        return found

    def close(self) -> None:
        while self.handles:
            os.close(self.handles.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def read(self, place: StoredTensor, first: int, last: int, into: memoryview | None = None) -> Bytes:
        """Values first to last of a tensor, as bytes, in `into` where it is given. Raises Damaged."""
        size, offset = (last - first) * place.width, place.start + first * place.width
        view = memoryview(bytearray(size)) if into is None else into[:size]
        done = 0
        while done < size:
            got = os.preadv(self.handle(place.path), [view[done:]], offset + done)
            if not got:
                raise Damaged(f"{place.path} ended early: fetch it again")
            done += got
        return np.frombuffer(view, np.uint8)


Request = tuple[StoredTensor, int, int]


class ReadAhead:
    """Reads ahead: one thread fetches the next step of a plan while this one is worked on. Buffers are kept between plans.

    Files that the system has in its cache come from there. Others are read past it, where the file system can (O_DIRECT): experts
    are read once, and pages for them would cost more than all sums, and drive out what others need.
    """

    def __init__(self, buffer: int):
        """`buffer`: bytes that a request asks for at most."""
        self.buffer, self.files, self.direct = buffer + 2 * PAGE, Files(), Files(os.O_DIRECT)
        self.cached: dict[Path, bool] = {}  # files that are read by way of the cache
        self.pools: tuple[list[memoryview], list[memoryview]] = ([], [])
        self.thread, self.hand = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self.thread, self.hand):
            one.shutdown(wait=True, cancel_futures=True)
        self.files.close()
        self.direct.close()

    def _fetch(self, step: Sequence[Request], pool: list[memoryview]) -> list[Bytes]:
        while len(pool) < len(step):
            pool.append(memoryview(mmap(-1, self.buffer)))  # begins with a page
        handles = [self._past(request) for request in step]
        found: list[Bytes | None] = [None] * len(step)

        def read(hand: int) -> None:
            for n in range(hand, len(step), 2):
                if (handle := handles[n]) is not None:
                    found[n] = _read_past(handle, *step[n], pool[n])

        wait = self.hand.submit(read, 1)  # two at a time: a disk is slower where nobody waits in line
        read(0)
        wait.result()
        return [self.files.read(*request, into) if one is None else one for request, into, one in zip(step, pool, found, strict=False)]

    def _past(self, request: Request) -> int | None:
        """The handle that reads a file past the cache; none where it is in there, or its file system cannot."""
        path = request[0].path
        try:
            if path not in self.cached:
                self.cached[path] = _is_cached(self.files.handle(path))
            return None if self.cached[path] else self.direct.handle(path)
        except OSError:
            self.cached[path] = True
            return None

    def stream(self, plan: Iterable[Sequence[Request]]) -> Iterator[list[Bytes]]:
        """For each step of a plan the bytes it asks for; valid until the next step is asked for."""
        coming = None
        for number, step in enumerate(plan):
            ready, coming = coming, self.thread.submit(self._fetch, step, self.pools[number % 2])
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


def _is_cached(handle: int) -> bool:
    """Whether the system has a file in memory, by a look at a few places."""
    size = os.fstat(handle).st_size
    try:
        return all(os.preadv(handle, [bytearray(1)], at, os.RWF_NOWAIT) for at in range(0, size, max(1, size // PROBES)))
    except BlockingIOError:
        return False


def _read_past(handle: int, place: StoredTensor, first: int, last: int, into: memoryview) -> Bytes | None:
    """As `Files.read`, in whole pages; none where that cannot be done. `into` begins with a page and has two more than is asked for."""
    size, offset = (last - first) * place.width, place.start + first * place.width
    before = offset % PAGE
    try:
        got = os.preadv(handle, [into[: -(-(before + size) // PAGE) * PAGE]], offset - before)
    except OSError:  # larger blocks than pages
        return None
    return np.frombuffer(into[before : before + size], np.uint8) if got >= before + size else None


def check_finite(name: str, place: StoredTensor) -> None:
    """Raises Damaged where a tensor of a file contains NaN or Inf."""
    if place.dtype not in SIZES:
        return
    files = Files()
    for first in range(0, place.numbers, PIECE):
        value_N = decode(files.read(place, first, min(first + PIECE, place.numbers)), place.dtype)
        if not np.isfinite(value_N).all():
            raise Damaged(f"{place.path}: {name} contains NaN or Inf, or values outside the range of {place.dtype}: do not use it")
    files.close()


class Twin:
    """Files like those where these tensors stand: the same names, headers and places. Those not in `written` are copied.

    What is written is put in the order of the files; what stands before is final, and a thread hashes it and brings it to the disk
    meanwhile, so that neither is left for the end.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], folder: Path, written: Collection[str]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.thread = folder, ThreadPoolExecutor(1)
        self.handles: dict[Path, int] = {}
        self.settled: dict[Path, tuple[int, Any]] = {}  # bytes from the beginning that are or will soon be hashed, and their hash
        self.waits: list[Future[None]] = []
        for path in {place.path for place in tensors.values()}:
            handle = os.open(folder / path.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            top = read_header(path)
            os.pwrite(handle, top.raw, 0)
            os.ftruncate(handle, path.stat().st_size)
            self.handles[path], self.settled[path] = handle, (0, hashlib.sha256())
            for name in top.tensors.keys() - set(written):
                begin, end = (top.begin + offset for offset in top.tensors[name]["data_offsets"])
                _copy(path, handle, begin, end)

    def put(self, place: StoredTensor, first: int, raw: Bytes) -> None:
        """Values from `first` on, of a tensor that stands at `place` in the other files."""
        at = place.start + first * place.width
        assert at >= self.settled[place.path][0], "tensors are written in file order"
        os.pwrite(self.handles[place.path], raw.data, at)
        if at - self.settled[place.path][0] >= SETTLED:
            self._settle(place.path, at)

    def _settle(self, path: Path, end: int) -> None:
        begin, sha = self.settled[path]
        self.settled[path] = end, sha
        self.waits.append(self.thread.submit(_settle, self.handles[path], begin, end, sha))

    def close(self) -> dict[str, str]:
        """Name of each file -> sha256, hex; its bytes are on the disk."""
        for path, handle in self.handles.items():
            self._settle(path, os.fstat(handle).st_size)
        self.thread.shutdown()
        for one in self.waits:
            one.result()
        for handle in self.handles.values():
            os.close(handle)
        return {path.name: sha.hexdigest() for path, (_, sha) in self.settled.items()}


def _copy(source: Path, into: int, begin: int, end: int) -> None:
    """The bytes of a file, to the same place in another one."""
    with source.open("rb") as file:
        for first in range(begin, end, 1 << 22):
            os.pwrite(into, os.pread(file.fileno(), min(1 << 22, end - first), first), first)


def _settle(handle: int, begin: int, end: int, sha: Any) -> None:
    buffer = memoryview(bytearray(1 << 20))
    while begin < end:
        got = os.preadv(handle, [buffer[: end - begin]], begin)
        sha.update(buffer[:got])
        begin += got
    os.fdatasync(handle)


# ---- bytes <-> values ------------------------------------------------------------------------------------------


def decode(raw: Bytes, dtype: str) -> Floats:
    """Values from their bytes, exactly: float32 (or float64 for F64)."""
    if dtype == "BF16":
        return exact.widen(raw.view("<u2"))
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    return raw.view("<f4" if dtype == "F32" else "<f8")


def encode(value_N: Floats, dtype: str) -> Bytes:
    """Bytes of the nearest values of a dtype, from float32 or float64; ties to even."""
    if dtype == "BF16" and value_N.dtype == np.float32:  # a mixture's gates alone: too few to wait for a compiled loop
        bits_N = value_N.view(np.uint32)
        return ((bits_N + 0x7FFF + (bits_N >> 16 & 1)) >> 16).astype("<u2").view(np.uint8)
    if dtype == "BF16":
        code_N = np.empty(value_N.size, np.uint16)
        kernels.narrow(value_N, code_N)
        return code_N.view(np.uint8)
    with np.errstate(over="ignore"):
        return value_N.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype], copy=False).view(np.uint8)


def encode_finite(value_N: Floats, dtype: str, name: str) -> Bytes:
    """As `encode`, of values of the tensor `name`. Raises BadInput where one is not finite, or too large for the dtype."""
    if not (largest := exact.reach(value_N)) < OVERFLOW[dtype]:
        what = "NaN" if math.isnan(largest) else f"a value of magnitude {largest:g}"
        raise BadInput(f"{name} would contain {what}, and {dtype} ends at {OVERFLOW[dtype]:g}: use smaller weights, or another rule")
    return encode(value_N, dtype)
