"""Sources -> a `Corpus`: duplicates removed, split by content, in Parquet shards. Memory does not grow with the text.

The same documents make the same corpus, byte for byte, in whatever order and files they come: everything is decided by
content alone, and shards hold their documents in order of id (which is to say, shuffled).

N documents, H hashes
"""

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elmwood.corpus.read import Document, files, read
from elmwood.engine import Progress, silent
from elmwood.errors import BadCorpus
from elmwood.records import Corpus, Shard, fingerprint
from elmwood.store import Store, hash_file

SHARD = 64_000_000  # bytes of text in one shard, at most (a longer document stands alone)
GROUP = 8_000_000  # bytes of text held at once while shards are written
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("meta", pa.string())])
RULES = 1  # raised when the same sources would make another corpus


class Staged(NamedTuple):
    """Documents as they came, in one file: at 1 kB of text each, memory is a thirtieth of it."""

    path: Path
    id_N: np.ndarray  # 16 bytes each
    start_N: np.ndarray  # int64, where the text begins in the file
    bytes_N: np.ndarray  # int64, of the text
    meta_N: np.ndarray  # int64, bytes of the meta that follows the text
    licences: tuple[str, ...]


def build(sources: Sequence[str], store: Store, *, holdout: float = 0.1, field: str = "text", progress: Progress = silent) -> Corpus:
    """Read, drop duplicates, split, store. `holdout` is the share of documents that nobody trains on.

    Sources that are files are named by their content, so building the same corpus again costs one hash of them.
    Raises BadCorpus.
    """
    if not 0 < holdout < 1:
        raise BadCorpus(f"holdout must be between 0 and 1, and is {holdout}: 0.1 holds back every tenth document")
    if not sources:
        raise BadCorpus("a corpus needs a source: a file, a folder, 'sample' or 'datasets:NAME'")
    key = fingerprint("corpus", RULES, sorted(_content(source) for source in sources), holdout, field)
    local = not any(source.startswith("datasets:") for source in sources)
    with alone(store, key) as work:
        if local and (done := store.done(key)):
            return store.load(done, Corpus)
        rejected: Counter[str] = Counter()
        staged = _stage(sources, work / "text", rejected, field, progress)
        order = _unique(staged, rejected)
        if len(order) < 2:
            raise BadCorpus(
                f"a corpus needs 2 documents, one to train on and one to hold out, and this has {len(order)}: add text, or split it"
            )
        held_N = split([staged.id_N[i].tobytes() for i in order], holdout)
        corpus = Corpus(
            train=_shards(staged, order[~held_N], "write training shards", work, store, progress),
            holdout=_shards(staged, order[held_N], "write holdout shards", work, store, progress),
            documents=len(order),
            bytes=int(staged.bytes_N[order].sum()),
            holdout_share=holdout,
            rejected=dict(sorted(rejected.items())),
            licences=staged.licences,
        )
        store.finish(key, corpus)
        return corpus


def documents(shards: Sequence[Shard], store: Store) -> Iterator[Document]:
    """The documents of shards, streamed, in order."""
    for shard in shards:
        with pq.ParquetFile(store.get(shard.blob)) as file:
            for batch in file.iter_batches(batch_size=256, columns=["text", "meta"]):
                for text, meta in zip(batch["text"].to_pylist(), batch["meta"].to_pylist(), strict=True):
                    yield Document(text, json.loads(meta))


def split(ids: Sequence[bytes], share: float) -> np.ndarray:
    """Which documents are held out: bool [N]. Decided by each id alone, so a document keeps its side as a corpus grows.

    The one exception: where a side would be empty, the document nearest the line crosses it.
    """
    salted = (hashlib.sha256(b"holdout" + name).digest()[:8] for name in ids)  # salted: order of id says nothing about the side
    value_N = np.array([int.from_bytes(digest, "big") / 2**64 for digest in salted])
    held_N = value_N < share
    if not held_N.any():
        held_N[value_N.argmin()] = True
    elif held_N.all():
        held_N[value_N.argmax()] = False
    return held_N


@contextmanager
def alone(store: Store, key: str) -> Iterator[Path]:
    """The work folder of a task, empty, held by one process at a time: the next one waits and finds the task done."""
    work = store.work(key)
    with work.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when the process dies
        try:
            shutil.rmtree(work, ignore_errors=True)
            yield store.work(key)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _content(source: str) -> list[str]:
    """What names a source in a task: its content, for files; its name, for a data set."""
    return [hash_file(path) + path.name for path in files(source)] or [source]


def _stage(sources: Sequence[str], path: Path, rejected: Counter[str], field: str, progress: Progress) -> Staged:
    """Copy every document, as it comes, to one file."""
    ids = bytearray()
    starts: list[int] = []
    sizes: list[int] = []
    metas: list[int] = []
    licences: set[str] = set()
    place = 0
    with path.open("wb") as file:
        for source in sources:
            for document in read(source, rejected, field=field):
                text = document.text.encode()
                meta = json.dumps(dict(document.meta), sort_keys=True, ensure_ascii=False).encode()
                file.write(text + meta)
                ids += hashlib.sha256(text).digest()[:16]
                starts.append(place)
                sizes.append(len(text))
                metas.append(len(meta))
                licences |= {document.meta["licence"]} if "licence" in document.meta else set()
                place += len(text) + len(meta)
                if len(starts) % 100 == 0:
                    progress("read", len(starts), 0, "documents")
    progress("read", len(starts), len(starts), "documents")
    id_N = np.frombuffer(bytes(ids), dtype=">u8").reshape(-1, 2)
    return Staged(path, id_N, np.array(starts), np.array(sizes), np.array(metas), tuple(sorted(licences)))


def _unique(staged: Staged, rejected: Counter[str]) -> np.ndarray:
    """One place of each text, in order of id."""
    order = np.lexsort((staged.id_N[:, 1], staged.id_N[:, 0]))
    first = np.ones(len(order), bool)
    first[1:] = (staged.id_N[order][1:] != staged.id_N[order][:-1]).any(1)
    if dropped := int((~first).sum()):
        rejected["exact duplicate"] += dropped
    return order[first]


def _shards(staged: Staged, order: np.ndarray, what: str, work: Path, store: Store, progress: Progress) -> tuple[Shard, ...]:
    """Write documents, in this order, to Parquet shards."""
    shards = []
    number_N = np.cumsum(staged.bytes_N[order]) // SHARD
    total, done = int(staged.bytes_N[order].sum()), 0
    text = np.memmap(staged.path, np.uint8, "r")
    for number in np.unique(number_N):
        mine = order[number_N == number]
        path = work / "shard.parquet"
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for group in _groups(mine, staged.bytes_N[mine]):
                writer.write_table(_table(staged, group, text))
                done += int(staged.bytes_N[group].sum())
                progress(what, done, total, "bytes")
        shards.append(Shard(blob=store.put(path), documents=len(mine), bytes=int(staged.bytes_N[mine].sum())))
    return tuple(shards)


def _groups(order: np.ndarray, bytes_N: np.ndarray) -> list[np.ndarray]:
    """Cut into runs of about GROUP bytes."""
    number_N = np.cumsum(bytes_N) // GROUP
    return np.split(order, np.flatnonzero(np.diff(number_N)) + 1)


def _table(staged: Staged, group: np.ndarray, text: np.ndarray) -> pa.Table:
    columns: dict[str, list[str]] = {"id": [], "text": [], "meta": []}
    for i in group:
        start, middle = staged.start_N[i], staged.start_N[i] + staged.bytes_N[i]
        columns["id"].append(staged.id_N[i].tobytes().hex())
        columns["text"].append(text[start:middle].tobytes().decode())
        columns["meta"].append(text[middle : middle + staged.meta_N[i]].tobytes().decode())
    return pa.table(columns, schema=SCHEMA)
