"""Build a `Corpus` from sources: drop duplicates, split, write Parquet shards. Memory does not grow with the amount of text.

The same documents make the same corpus, byte for byte, in any order and in any files. All decisions depend on content only, and
shards hold documents in the order of their ids, which are hashes.

N documents, H hashes
"""

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elmwood.corpus.dedup import HASHES, near_duplicates, signatures
from elmwood.corpus.read import Document, Reading, parse_source, places, read, walk
from elmwood.engine import Progress, each, silent
from elmwood.errors import BadCorpus
from elmwood.records import Blob, Corpus, Shard, fingerprint
from elmwood.store import Store, hash_file

SHARD = 64_000_000  # bytes of text in one shard, at most; a longer document has a shard of its own
GROUP = 8_000_000  # bytes of text in memory while a shard is written
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("meta", pa.string())])
RULES = 2  # increased when the same sources would make a different corpus


class Staged(NamedTuple):
    """Documents as they were read: texts in one file, and 44 bytes of memory for each."""

    text: np.ndarray  # uint8, memory-mapped: text and meta of each document
    id_N: np.ndarray  # [N, 2] uint64, the first 16 bytes of sha256
    start_N: np.ndarray  # int64, offset of the text
    bytes_N: np.ndarray  # int64, bytes of the text
    meta_N: np.ndarray  # int64, bytes of the meta, which follows the text
    crc_N: np.ndarray  # uint32, crc of the meta
    licences: tuple[str, ...]


def build(
    sources: Sequence[str], store: Store, *, holdout: float = 0.1, field: str = "text", reading: Reading | None = None,
    progress: Progress = silent,
) -> Corpus:  # fmt: skip
    """Read sources, drop duplicates, split and store. `holdout` is the share of documents that no model trains on.

    Files are identified by their content, so building the same corpus again only hashes them. Raises BadCorpus, DoesNotFit,
    UnknownName.
    """
    if not 0 < holdout < 1:
        raise BadCorpus(f"the holdout is a share between 0 and 1, and is {holdout}: 0.1 sets every tenth document aside")
    if not sources:
        raise BadCorpus("a corpus needs a source, and there is none: name a file, a folder, 'sample' or 'datasets:NAME'")
    reading = reading or Reading(field)
    key = fingerprint("corpus", RULES, _contents(sources, reading, progress), holdout, *reading)
    with open_work(store, key, progress) as work:
        if all(parse_source(source).repeatable for source in sources) and (done := store.done(key)):
            return store.load(done, Corpus)
        rejected: Counter[str] = Counter()
        staged = _stage(sources, work / "text", rejected, reading, progress)
        order = _unique(staged, rejected)
        order = _distinct(staged, order, work / "signatures", rejected, progress)
        if len(order) < 2:
            raise BadCorpus(
                f"a corpus needs 2 different documents, one to train on and one to hold out, and this has {len(order)}: "
                "add text, or cut it into documents (one JSON line each)"
            )
        held_N = split([_id(staged, n) for n in order], holdout)
        corpus = Corpus(
            train=_shards(staged, order[~held_N], "write training shards", work, store, progress),
            holdout=_shards(staged, order[held_N], "write holdout shards", work, store, progress),
            documents=len(order),
            bytes=int(staged.bytes_N[order].sum()),
            holdout_share=holdout,
            rejected={str(reason): count for reason, count in sorted(rejected.items())},
            unread=places(rejected),
            licences=staged.licences,
        )
        store.finish(key, corpus)
        return corpus


def read_shard(blob: Blob, store: Store) -> Shard:
    """The record of a stored shard that is known by its digest alone. Reads its text."""
    with pq.ParquetFile(store.get(blob)) as file:
        sizes = (pc.sum(pc.binary_length(batch["text"])).as_py() or 0 for batch in file.iter_batches(columns=["text"]))
        return Shard(blob=blob, documents=file.metadata.num_rows, bytes=sum(sizes))


def documents(shards: Sequence[Shard], store: Store) -> Iterator[Document]:
    """The documents of shards, in order, streamed."""
    for shard in shards:
        with pq.ParquetFile(store.get(shard.blob)) as file:
            for batch in file.iter_batches(batch_size=256, columns=["text", "meta"]):
                for text, meta in zip(batch["text"].to_pylist(), batch["meta"].to_pylist(), strict=True):
                    yield Document(text, json.loads(meta))


def split(ids: Sequence[str], share: float) -> np.ndarray:
    """Which documents are held out: bool [N]. It depends on the id only, so a document stays on its side when a corpus grows.

    The exception: if a side would be empty, the document nearest to the threshold moves there.
    """
    salted = (hashlib.sha256(f"holdout {id}".encode()).digest()[:8] for id in ids)  # salted: the side is independent of the order of ids
    value_N = np.array([int.from_bytes(digest, "big") / 2**64 for digest in salted])
    held_N = value_N < share
    if not held_N.any():
        held_N[value_N.argmin()] = True
    elif held_N.all():
        held_N[value_N.argmax()] = False
    return held_N


@contextmanager
def open_work(store: Store, key: str, progress: Progress = silent) -> Iterator[Path]:
    """The empty work folder of a task, for one process at a time: the next one waits, and then finds the task done.

    Raises DoesNotFit when the disk is full.
    """
    with store.held(key, progress) as work:
        try:
            shutil.rmtree(work, ignore_errors=True)
            yield store.work(key)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _contents(sources: Sequence[str], reading: Reading, progress: Progress) -> list[str]:
    """What names sources in a task: content and path of each file, the name of each data set and importer; sorted."""
    parsed = [parse_source(source) for source in sources]
    found = [(one, *place) for one, source in zip(parsed, sources, strict=True) for place in walk(source, reading.follow_links)]
    hashed = each(found, "hash sources", len(found), "files", progress)
    names = [f"{odd or hash_file(path)} {one.name(path)}" for one, path, odd in hashed]
    return sorted(names + [source for one, source in zip(parsed, sources, strict=True) if not one.repeatable])


def _id(staged: Staged, n: int) -> str:
    return f"{staged.id_N[n, 0]:016x}{staged.id_N[n, 1]:016x}"


def _text(staged: Staged, n: int) -> str:
    return staged.text[staged.start_N[n] : staged.start_N[n] + staged.bytes_N[n]].tobytes().decode()


def _meta(staged: Staged, n: int) -> str:
    start = staged.start_N[n] + staged.bytes_N[n]
    return staged.text[start : start + staged.meta_N[n]].tobytes().decode()


def _stage(sources: Sequence[str], path: Path, rejected: Counter[str], reading: Reading, progress: Progress) -> Staged:
    """Copy all documents to one file. Their number is not known in advance, so progress has no total."""
    ids = bytearray()
    starts, sizes, metas, crcs = array("q"), array("q"), array("q"), array("I")
    licences: set[str] = set()
    place = 0
    with path.open("wb") as file:
        for source in sources:
            for document in read(source, rejected, reading=reading):
                text = document.text.encode()
                meta = json.dumps(dict(document.meta), sort_keys=True, ensure_ascii=False).encode()
                file.write(text + meta)
                ids += hashlib.sha256(text).digest()[:16]
                starts.append(place)
                sizes.append(len(text))
                metas.append(len(meta))
                crcs.append(crc32(meta))
                licences.add(document.meta.get("licence", ""))
                place += len(text) + len(meta)
                if len(starts) % 100 == 0:
                    progress("read", len(starts), 0, "documents")
    progress("read", len(starts), len(starts), "documents")
    id_N = np.frombuffer(bytes(ids), ">u8").astype(np.uint64).reshape(-1, 2)
    text_map = np.memmap(path, np.uint8, "r")
    return Staged(text_map, id_N, np.array(starts), np.array(sizes), np.array(metas), np.array(crcs), tuple(sorted(licences - {""})))


def _unique(staged: Staged, rejected: Counter[str]) -> np.ndarray:
    """The index of one copy of each text, in the order of ids. Copies with different meta are ordered by its crc, not as they were read."""
    order = np.lexsort((staged.crc_N, staged.id_N[:, 1], staged.id_N[:, 0]))
    first = np.ones(len(order), bool)
    first[1:] = (staged.id_N[order][1:] != staged.id_N[order][:-1]).any(1)
    if dropped := int((~first).sum()):
        rejected["exact duplicate"] += dropped
    return order[first]


def _distinct(staged: Staged, order: np.ndarray, path: Path, rejected: Counter[str], progress: Progress) -> np.ndarray:
    """Without near-duplicates: the one with the smaller id is kept."""
    texts = each((_text(staged, n) for n in order), "find near-duplicates", len(order), "documents", progress)
    with path.open("wb") as file:
        for signature_H in signatures(texts):
            file.write(signature_H.astype("<u4").tobytes())
    drop_N = near_duplicates(np.memmap(path, "<u4", "r").reshape(-1, HASHES))
    if drop_N.any():
        rejected["near-duplicate"] += int(drop_N.sum())
    return order[~drop_N]


def _shards(staged: Staged, order: np.ndarray, what: str, work: Path, store: Store, progress: Progress) -> tuple[Shard, ...]:
    """Write documents in this order to Parquet shards."""
    shards = []
    total, done = int(staged.bytes_N[order].sum()), 0
    for shard in _runs(order, staged.bytes_N, SHARD):
        path = work / "shard.parquet"
        size = int(staged.bytes_N[shard].sum())
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for group in _runs(shard, staged.bytes_N, GROUP):
                columns = {"id": [_id(staged, n) for n in group], "text": [_text(staged, n) for n in group]}
                writer.write_table(pa.table(columns | {"meta": [_meta(staged, n) for n in group]}, schema=SCHEMA))
                done += int(staged.bytes_N[group].sum())
                progress(what, done, total, "bytes")
        shards.append(Shard(blob=store.put(path), documents=len(shard), bytes=size))
    return tuple(shards)


def _runs(order: np.ndarray, bytes_N: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Cut into runs of at most `limit` bytes, or of one longer document."""
    first = size = 0
    for place, n in enumerate(order):
        if size and size + bytes_N[n] > limit:
            yield order[first:place]
            first, size = place, 0
        size += bytes_N[n]
    yield order[first:]
