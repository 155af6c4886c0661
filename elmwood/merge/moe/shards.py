"""Sharded safetensors written in place, tensor by tensor, in any order. Gates stand in a shard of their own: tuning or choosing them
again leaves every other file, and so every other blob, as it was.

N values of one tensor, or a part of it
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmwood.weights.tensors import SIZES, Files, StoredTensor, decode, encode_finite, pack_header

SHARD = 4 << 30  # bytes of a file, about
COPIED = 1 << 18  # bytes at once: with 2 MiB a copy takes several times the CPU, since they do not stay in the cache
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


class Shards:
    """Files in a folder, with room for these tensors in this order; the first `alone` of them have a file to themselves."""

    def __init__(self, entries: Sequence[Entry], folder: Path, alone: int = 0, stem: str = "model"):
        folder.mkdir(parents=True, exist_ok=True)
        groups: list[list[tuple[str, str, tuple[int, ...], int]]] = []
        filled = SHARD
        for number, (name, dtype, shape) in enumerate(entries):
            size = math.prod(shape) * SIZES[dtype]
            if number in (0, alone) or (number > alone and filled + size > SHARD):
                groups.append([])
                filled = 0
            groups[-1].append((name, dtype, shape, size))
            filled += size
        self.buffer = memoryview(bytearray(COPIED))
        self.index, self.places, self.handles = folder / f"{stem}.safetensors.index.json", dict[str, StoredTensor](), dict[Path, int]()
        self.hashed: dict[Path, tuple[int, Any]] = {}  # file -> how far it has been written from its beginning on, and the hash so far
        for number, group in enumerate(groups, 1):
            path, top = folder / f"{stem}-{number:05}-of-{len(groups):05}.safetensors", pack_header(group, {"format": "pt"})
            handle = self.handles[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.pwrite(handle, top, 0)
            at = len(top)
            self.hashed[path] = at, hashlib.sha256(top)
            for name, dtype, shape, size in group:
                self.places[name] = StoredTensor(path, dtype, shape, at)
                at += size
            os.ftruncate(handle, at)

    def put(self, name: str, first: int, raw: NDArray[np.uint8]) -> None:
        """The bytes of a tensor from its value `first` on."""
        place = self.places[name]
        at = place.start + first * place.width
        os.pwrite(self.handles[place.path], raw.data, at)
        end, sha = self.hashed[place.path]
        if at == end:  # written from the beginning on, as all but averages are: then nothing has to be read again
            sha.update(raw.data)
            self.hashed[place.path] = at + raw.nbytes, sha

    def put_numbers(self, name: str, value_N: NDArray[np.floating], first: int = 0) -> None:
        """Values, rounded to the tensor's dtype."""
        self.put(name, first, encode_finite(np.ascontiguousarray(value_N).reshape(-1), self.places[name].dtype, name))

    def copy(self, name: str, source: StoredTensor, files: Files, first: int = 0) -> None:
        """A tensor of another file, byte by byte where the dtypes are alike."""
        same = source.dtype == self.places[name].dtype
        step = COPIED // source.width
        for at in range(0, source.numbers, step):
            raw = files.read(source, at, min(source.numbers, at + step), self.buffer)
            if same:
                self.put(name, first + at, raw)
            else:
                self.put_numbers(name, decode(raw, source.dtype), first + at)

    def close(self) -> dict[str, str | None]:
        """Write the index, and close the files: name -> sha256, hex; none where a file was not written in order."""
        sizes_of = {path: os.fstat(handle).st_size for path, handle in self.handles.items()}
        for handle in self.handles.values():
            os.close(handle)
        sizes = [place.numbers * place.width for place in self.places.values()]
        said = {"metadata": {"total_size": sum(sizes)}, "weight_map": {name: place.path.name for name, place in self.places.items()}}
        self.index.write_text(json.dumps(said, indent=1, sort_keys=True), encoding="utf-8")
        return {path.name: sha.hexdigest() if end == sizes_of[path] else None for path, (end, sha) in self.hashed.items()}
