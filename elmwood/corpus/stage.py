"""Read sources into runs: documents sorted by id, with their sketches, in files of the work folder. One task for each piece of text.

A piece becomes one run for each `memory` bytes of text. Runs are merged by id later, so how sources are cut decides nothing.

N documents of a run, H hashes, B bands
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from elmwood.corpus.dedup import BANDS, HASHES, bands, sketch
from elmwood.corpus.read import Document, Part, Reading, Reason, parts, read_part, refuse_empty
from elmwood.engine import Progress, silent

PIECE = 32_000_000  # bytes of files that one task reads, about
INDEX = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("side", "<u8"), ("start", "<u8"), ("bytes", "<u4"), ("meta", "<u4"), ("crc", "<u4")]
)  # of a document: its id, what decides its side of the split, the place and size of its text, the size and crc of its meta


class Run(NamedTuple):
    """Documents in the order of their ids. Its files are the path with an ending."""

    path: Path
    documents: int

    def entries(self) -> np.ndarray:
        """[N] INDEX."""
        return self._mapped(".index", INDEX)

    def sketches(self) -> np.ndarray:
        """[N, H] uint32."""
        return self._mapped(".sketch", "<u4").reshape(-1, HASHES)

    def bands(self) -> np.ndarray:
        """[B, N] uint64."""
        return self._mapped(".bands", "<u8").reshape(BANDS, -1)

    def text(self) -> np.ndarray:
        """uint8: text and meta of each document."""
        return self._mapped(".text", np.uint8)

    def _mapped(self, ending: str, dtype: Any) -> np.ndarray:
        return np.memmap(self.path.with_suffix(ending), dtype, "r")


class Staged(NamedTuple):
    """What was read."""

    runs: tuple[Run, ...]
    rejected: Counter[str]
    licences: tuple[str, ...]


class Task(NamedTuple):
    """A piece to read."""

    folder: Path
    parts: tuple[Part, ...]
    reading: Reading
    memory: int  # bytes of text that are sorted at once


def pieces(sources: Sequence[str], reading: Reading) -> Iterator[tuple[Part, ...]]:
    """Cut sources into pieces of about the same size. Raises BadCorpus."""
    for source in sources:
        gathered: list[Part] = []
        size, any_part = 0, False
        for part in parts(source, reading, PIECE):
            any_part = True
            gathered.append(part)
            size += min(part.size, PIECE)
            if size >= PIECE:
                yield tuple(gathered)
                gathered, size = [], 0
        if gathered:
            yield tuple(gathered)
        elif not any_part:
            refuse_empty(source, Counter())


def stage(task: Task, progress: Progress = silent) -> Path:
    """Read one piece, once."""
    if (task.folder / "done.json").exists():
        return task.folder
    shutil.rmtree(task.folder, ignore_errors=True)
    task.folder.mkdir(parents=True)
    rejected: Counter[str] = Counter()
    licences: set[str] = set()
    runs: list[int] = []
    batch: list[Document] = []
    size = total = 0
    for found in (one for part in task.parts for one in read_part(part, task.reading, task.folder)):
        if isinstance(found, Reason):
            rejected[found] += found.documents
            continue
        batch.append(found)
        licences.add(found.meta.get("licence", ""))
        size += len(found.text)
        total += 1
        if size >= task.memory:
            runs.append(_write(batch, task.folder / f"run-{len(runs)}"))
            batch, size = [], 0
        if total % 500 == 0:
            progress(f"read {task.folder.name}", total, 0, "documents")
    if batch:
        runs.append(_write(batch, task.folder / f"run-{len(runs)}"))
    progress(f"read {task.folder.name}", total, total, "documents")
    reasons = [[str(reason), count, getattr(reason, "place", ""), getattr(reason, "file", False)] for reason, count in rejected.items()]
    temporary = task.folder / "done.tmp"
    temporary.write_text(json.dumps({"runs": runs, "rejected": reasons, "licences": sorted(licences - {""})}), encoding="utf-8")
    os.replace(temporary, task.folder / "done.json")
    return task.folder


def gather(tasks: Sequence[Task]) -> Staged:
    """What all tasks read. Raises BadCorpus for a source without a document."""
    runs: list[Run] = []
    rejected: dict[str, Counter[str]] = {}
    licences: set[str] = set()
    full = set()
    for task in tasks:
        done = json.loads((task.folder / "done.json").read_text(encoding="utf-8"))
        runs += [Run(task.folder / f"run-{n}", documents) for n, documents in enumerate(done["runs"])]
        licences |= set(done["licences"])
        of_source = rejected.setdefault(task.parts[0].source, Counter())
        for reason, count, place, file in done["rejected"]:
            of_source[Reason.of(reason, place, file=file)] += count
        if done["runs"]:
            full.add(task.parts[0].source)
    for source, counts in rejected.items():
        if source not in full:
            refuse_empty(source, counts)
    return Staged(tuple(runs), sum(rejected.values(), Counter()), tuple(sorted(licences)))


def side(id: str) -> int:
    """What decides the side of the split, from 0 to 2^64. Salted, so it is independent of the order of ids."""
    return int.from_bytes(hashlib.sha256(f"holdout {id}".encode()).digest()[:8], "big")


@lru_cache(4096)
def _meta(items: tuple[tuple[str, str], ...]) -> bytes:
    return json.dumps(dict(items), sort_keys=True, ensure_ascii=False).encode()


def _write(batch: list[Document], path: Path) -> int:
    """Write a run; the number of its documents."""
    encoded = [document.text.encode() for document in batch]
    ids = [hashlib.sha256(text).digest()[:16] for text in encoded]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    index_N = np.zeros(len(ids), INDEX)
    index_N["high"], index_N["low"] = np.frombuffer(b"".join(ids[n] for n in order), ">u8").reshape(-1, 2).T
    metas = [_meta(tuple(batch[n].meta.items())) for n in order]
    index_N["side"] = [side(ids[n].hex()) for n in order]
    index_N["bytes"] = [len(encoded[n]) for n in order]
    index_N["meta"] = [len(meta) for meta in metas]
    index_N["crc"] = [crc32(meta) for meta in metas]
    index_N["start"] = np.cumsum(index_N["bytes"].astype(np.uint64) + index_N["meta"]) - index_N["bytes"] - index_N["meta"]
    with path.with_suffix(".text").open("wb") as file:
        file.writelines(chain.from_iterable((encoded[n], meta) for n, meta in zip(order, metas, strict=True)))
    sketch_NH = sketch([batch[n].text for n in order])
    sketch_NH.astype("<u4").tofile(path.with_suffix(".sketch"))
    bands(sketch_NH).astype("<u8").tofile(path.with_suffix(".bands"))
    index_N.tofile(path.with_suffix(".index"))
    return len(ids)
