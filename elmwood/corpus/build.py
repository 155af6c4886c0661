"""Build a `Corpus` from sources: drop duplicates, split, write Parquet shards. Memory does not grow with the amount of text.

The same documents make the same corpus, byte for byte, in any order, in any files and with any number of workers. All decisions depend
on content only, and shards hold documents in the order of their ids, which are hashes.

Sources are cut into pieces, which tasks read (stage.py); what they read is merged (resolve.py); tasks write the shards.

N documents
"""

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elmwood.corpus.dedup import compile_loops
from elmwood.corpus.read import Document, Part, Reading, parse_source, places
from elmwood.corpus.resolve import Side, resolve, run_of
from elmwood.corpus.stage import Run, Task, gather, pieces, side, stage
from elmwood.engine import Progress, prepare, run, silent
from elmwood.errors import BadCorpus, BadInput
from elmwood.records import Blob, Corpus, Shard, fingerprint
from elmwood.store import Store, hash_file
from elmwood.store.disk import write_whole
from elmwood.units import parse_count

SHARD = 64_000_000  # bytes of text in one shard, at most; a longer document has a shard of its own
GROUP = 8_000_000  # bytes of text in memory while a shard is written
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("meta", pa.string())])
RULES = 2  # increased when the same sources would make a different corpus
HASHED_ALONE = 2_000_000_000  # bytes of files that are hashed by the time that workers can start
MEMORY = 2_000_000_000  # bytes, about, of all workers together
SHARE = 8  # part of its memory that a worker fills with text: what is made of it takes a few times as much


class Means(NamedTuple):
    """How the work is done. The result does not depend on it."""

    workers: int = 1
    engine: str = "local"  # a row of elmwood.engine.ENGINES
    memory: int = MEMORY


ALONE = Means()


def parse_memory(typed: int | str) -> int:
    """'2G' -> bytes. Raises BadInput."""
    if not 10**8 <= (memory := parse_count(typed)) <= 10**15:
        raise BadInput(f"memory is {memory} bytes: choose 100M or more, such as 2G")
    return memory


def build(
    sources: Sequence[str], store: Store, *, holdout: float = 0.1, field: str = "text", reading: Reading | None = None,
    means: Means = ALONE, progress: Progress = silent,
) -> Corpus:  # fmt: skip
    """Read sources, drop duplicates, split and store. `holdout` is the share of documents that no model trains on.

    Files are identified by their content, so building the same corpus again only hashes them. An interrupted run resumes at its piece
    or shard. Raises BadCorpus, DoesNotFit, UnknownName.
    """
    if not 0 < holdout < 1:
        raise BadCorpus(f"the holdout is a share between 0 and 1, and is {holdout}: 0.1 sets every tenth document aside")
    if not sources:
        raise BadCorpus("a corpus needs a source, and there is none: name a file, a folder, 'sample' or 'datasets:NAME'")
    reading = reading or Reading(field)
    cut = list(pieces(sources, reading))
    if means.engine == "local" and min(means.workers, len(cut)) > 1:
        prepare("elmwood.corpus.build", "elmwood.corpus.dedup:compile_loops")  # while sources are hashed
    repeatable = all(parse_source(part.source).repeatable and (not part.url or bool(part.version)) for parts in cut for part in parts)
    key = fingerprint("corpus", RULES, _contents(cut, means, progress), holdout, *reading)
    with store.held(key, progress) as work:
        if repeatable and (done := store.done(key)):
            return store.load(done, Corpus)
        try:
            if not repeatable:
                shutil.rmtree(work, ignore_errors=True)
            corpus = _build(cut, reading, holdout, work, store, means, progress)
        except BadCorpus:
            shutil.rmtree(work, ignore_errors=True)  # nothing to resume
            raise
        store.finish(key, corpus)
        shutil.rmtree(work, ignore_errors=True)
        return corpus


def _build(
    cut: Sequence[tuple[Part, ...]], reading: Reading, holdout: float, work: Path, store: Store, means: Means, progress: Progress
) -> Corpus:
    share = max(1, means.memory // max(1, means.workers) // SHARE)
    tasks = [Task(work / f"piece-{number}", parts, reading, share) for number, parts in enumerate(cut)]
    if min(means.workers, len(tasks)) > 1:
        threading.Thread(target=compile_loops, daemon=True).start()  # what they read is compared here
    run(stage, tasks, workers=means.workers, engine=means.engine, what="read", progress=progress)
    staged = gather(tasks)
    rejected = staged.rejected
    train, held = resolve(staged.runs, holdout, means.memory, work, rejected, progress, means.workers)
    if train.documents + held.documents < 2:
        raise BadCorpus(
            f"a corpus needs 2 different documents, one to train on and one to hold out, and this has {train.documents + held.documents}: "
            "add text, or cut it into documents (one JSON line each)"
        )
    writing = [task for one in (train, held) for task in _shards(one, staged.runs, store)]
    shards = run(write_shard, writing, workers=means.workers, engine=means.engine, what="write shards", progress=progress)
    return Corpus(
        train=tuple(shard for shard, task in zip(shards, writing, strict=True) if task.side == train),
        holdout=tuple(shard for shard, task in zip(shards, writing, strict=True) if task.side == held),
        documents=train.documents + held.documents,
        bytes=train.bytes + held.bytes,
        holdout_share=holdout,
        rejected={str(reason): count for reason, count in sorted(rejected.items())},
        unread=places(rejected),
        licences=staged.licences,
    )


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
    value_N = np.array([side(id) / 2**64 for id in ids])
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


def _contents(cut: Sequence[tuple[Part, ...]], means: Means, progress: Progress) -> list[str]:
    """What names sources in a task: content and path of each file, the name of each data set and importer; sorted."""
    whole = {(part.source, part.path): part for parts in cut for part in parts}.values()
    read = [part for part in whole if part.name and not part.odd and not part.url]
    by = ALONE if sum(part.size for part in read) <= HASHED_ALONE else means
    hashes = run(_hash, [str(part.path) for part in read], workers=by.workers, engine=by.engine, what="hash sources", progress=progress)
    names = [f"{digest} {part.name}" for digest, part in zip(hashes, read, strict=True)]
    names += [f"{part.odd or part.version or part.url} {part.name} {part.size}" for part in whole if part.odd or part.url]
    return sorted([*names, *{part.source for part in whole if not parse_source(part.source).repeatable}])


def _hash(path: str, progress: Progress = silent) -> str:
    return hash_file(Path(path))


# ---- shards -----------------------------------------------------------------------------------------------------


class ShardTask(NamedTuple):
    """Some documents of one side, in order, to write as a shard."""

    marker: Path  # the record of the shard, once it is written
    side: Side
    first: int
    last: int
    runs: tuple[Run, ...]
    store: Store


def write_shard(task: ShardTask, progress: Progress = silent) -> Shard:
    """Write one shard, once."""
    if task.marker.exists():
        return Shard.model_validate_json(task.marker.read_bytes())
    number_N = np.fromfile(task.side.order, "<i8", task.last - task.first, offset=8 * task.first)
    start_R = np.cumsum([0, *(run.documents for run in task.runs)])
    bytes_N = _bytes(number_N, task.runs, start_R)
    path, done = task.marker.with_suffix(".parquet"), 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for first, last in _cut(bytes_N, GROUP):
            writer.write_table(_table(number_N[first:last], task.runs, start_R))
            done += int(bytes_N[first:last].sum())
            progress(f"write {task.marker.stem}", done, int(bytes_N.sum()), "bytes")
    shard = Shard(blob=task.store.put(path), documents=len(number_N), bytes=int(bytes_N.sum()))
    path.unlink(missing_ok=True)
    write_whole(task.marker, shard.model_dump_json().encode())
    return shard


def _shards(side: Side, runs: tuple[Run, ...], store: Store) -> list[ShardTask]:
    """Cut the documents of one side into shards."""
    bytes_N = _bytes(np.fromfile(side.order, "<i8"), runs, np.cumsum([0, *(run.documents for run in runs)]))
    return [
        ShardTask(side.order.with_name(f"{side.order.name}-{number}.json"), side, first, last, runs, store)
        for number, (first, last) in enumerate(_cut(bytes_N, SHARD))
    ]


def _table(number_N: np.ndarray, runs: Sequence[Run], start_R: np.ndarray) -> pa.Table:
    """The rows of some documents."""
    ids, texts, metas = ([b""] * len(number_N) for _ in range(3))
    for r, place_N, row_N in run_of(number_N, start_R):
        text, entry_N = memoryview(runs[r].text().data), runs[r].entries()[row_N]
        for n, (high, low, _, start, size, meta, _) in zip(place_N.tolist(), entry_N.tolist(), strict=True):
            ids[n] = b"%016x%016x" % (high, low)
            texts[n], metas[n] = bytes(text[start : start + size]), bytes(text[start + size : start + size + meta])
    columns = [_strings(found, kind) for found, kind in zip((ids, texts, metas), SCHEMA.types, strict=True)]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _strings(texts: Sequence[bytes], kind: pa.DataType) -> pa.Array:
    """UTF-8 as an array."""
    ends = np.zeros(len(texts) + 1, np.int64 if kind == pa.large_string() else np.int32)
    np.cumsum([len(text) for text in texts], out=ends[1:])
    return pa.Array.from_buffers(kind, len(texts), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))], 0)


def _bytes(number_N: np.ndarray, runs: Sequence[Run], start_R: np.ndarray) -> np.ndarray:
    """Bytes of the text of each document."""
    bytes_N = np.empty(len(number_N), np.int64)
    for r, place_N, row_N in run_of(number_N, start_R):
        bytes_N[place_N] = runs[r].entries()["bytes"][row_N]
    return bytes_N


def _cut(bytes_N: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Cut into runs of at most `limit` bytes, or of one longer document: the first of each, and the one after its last."""
    first = size = 0
    for place, one in enumerate(bytes_N.tolist()):
        if size and size + one > limit:
            yield first, place
            first, size = place, 0
        size += one
    if len(bytes_N):
        yield first, len(bytes_N)
