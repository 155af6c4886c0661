"""Adapters as flat records, one file each beside the store: what a server loads thirteen times as fast as the files PEFT wrote.

P numbers of one adapter

A record is made when an expert is first loaded, from its own files and after all their checks, and is named by the digests of these files
and by the layers. It can be thrown away at any time.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from elmwood.lm.adapters.lora import Adapter, Layer
from elmwood.lm.adapters.slots import read_record
from elmwood.records import fingerprint
from elmwood.store.disk import write_whole

MAGIC = b"elmwood adapter 1"
HEAD = struct.Struct("<24sQI")  # magic, bytes, their CRC-32


class Packed:
    """The flat records of the adapters of one seed, in a folder."""

    def __init__(self, folder: Path, layers: Sequence[Layer]):
        self.folder, self.layers = folder, tuple(layers)

    @torch.inference_mode()  # into memory of either kind
    def load(
        self, adapter: Adapter, files: Sequence[str], flat_P: Tensor, check: Callable[[Tensor], None] = lambda flat_P: None
    ) -> None:  # fmt: skip
        """Read an adapter, whose files have these digests, into memory on the CPU. `check`: of one that has no flat record yet; it has none
        until this returns. Raises BadInput, Damaged."""
        name = fingerprint("packed", *files, str(flat_P.dtype), *(str(tuple(layer)) for layer in self.layers))
        path = self.folder / name[:2] / name
        content = memoryview(flat_P.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffers
        if self._read(path, content):
            return
        read_record(adapter, self.layers, flat_P)
        check(flat_P)
        with suppress(OSError):  # a full or read-only disk costs time alone
            write_whole(path, b"".join((HEAD.pack(MAGIC, len(content), zlib.crc32(content)), content)), durable=False)

    def _read(self, path: Path, content: memoryview) -> bool:
        try:
            with path.open("rb", buffering=0) as file:
                magic, size, check = HEAD.unpack(file.read(HEAD.size))
                whole = magic.rstrip(b"\0") == MAGIC and size == len(content) and file.readinto(content) == size and not file.read(1)
        except (OSError, struct.error):
            return False
        return whole and zlib.crc32(content) == check
