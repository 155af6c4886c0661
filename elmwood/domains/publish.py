"""Publish a partition without its text, receive one, and count which of your own documents belong to which domain.

Shapes: N documents, K domains, B edges of bins.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmwood.corpus.read import Document
from elmwood.domains import embed
from elmwood.domains.cluster import squared_distances
from elmwood.domains.grow import BATCH, EXAMPLES
from elmwood.domains.partition import centroids
from elmwood.engine import Progress, silent
from elmwood.errors import BadInput, BadRecord, Damaged
from elmwood.records import Files, Partition, canonical, read_record
from elmwood.store import Store, hash_file

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

FAR = 1.0  # squared distance from the zero vector to a unit vector; a document farther than this is "far" from its domain
EDGES = np.linspace(0, 4, 161)  # bins of squared distance; 4 is the most between two unit vectors
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RECORD, CENTROIDS = "elmwood.json", "centroids.safetensors"


# ---- publish and receive ---------------------------------------------------------------------------------------------


def files_without_text(partition: Partition, store: Store) -> Files:
    """What others need to use a partition, as a folder: the embedder, and the centroids of it and of the partitions it revises."""
    files = dict(partition.embedder.files)
    for depth, step in enumerate(ancestors(partition, store)):
        files[f"parents/{step.digest}/{CENTROIDS}" if depth else CENTROIDS] = step.centroids
    return files


def text_files(partition: Partition, store: Store) -> Files:
    """The text as one Parquet data set, with split and domain in the folder names. Raises BadInput if the text is not in this store."""
    files = {
        f"split={role}/domain={number}/{place}.parquet": shard.blob
        for role in ("train", "holdout")
        for number, domain in enumerate(partition.domains)
        for place, shard in enumerate(getattr(domain, role))
    }
    if missing := sum(not store.has(blob) for blob in files.values()):
        raise BadInput(f"{missing} of {len(files)} shards of text stayed with their owner: export this partition without --format")
    return files


def ancestors(partition: Partition, store: Store) -> list[Partition]:
    """A partition and those it revises, latest first."""
    found = [partition]
    while found[-1].parent is not None:
        found.append(store.load(found[-1].parent, Partition))
    return found


def write_records(partition: Partition, store: Store, folder: Path) -> None:
    """Write the record of a partition, and of those it revises, beside the files of `files_without_text`."""
    for depth, step in enumerate(ancestors(partition, store)):
        place = folder / f"parents/{step.digest}" if depth else folder
        (place / RECORD).write_bytes(canonical(step))


def receive(folder: Path, store: Store) -> Partition:
    """Read an exported partition into the store; every file must match its digest. Raises BadInput, BadRecord, Damaged."""
    if not (folder / RECORD).is_file():
        raise BadInput(f"{folder} has no {RECORD}: name a folder written by `elmwood export PARTITION {folder}`")
    partition = _read(folder / RECORD)
    for name, blob in partition.embedder.files.items():
        _check_and_store(folder, name, blob, store)
    step, place = partition, folder
    while True:
        _check_and_store(place, CENTROIDS, step.centroids, store)
        centroids(step, store)
        store.add(step)
        if step.parent is None:
            return partition
        place = folder / "parents" / step.parent
        if not (place / RECORD).is_file():
            raise BadInput(f"{folder} lacks partition {step.parent[:8]}, which this one revises: export it again")
        parent = _read(place / RECORD)
        if parent.digest != step.parent or parent.embedder != partition.embedder:
            raise Damaged(f"{place / RECORD} is not the record that was published: download the folder again")
        step = parent


def _read(path: Path) -> Partition:
    record = read_record(path)
    if not isinstance(record, Partition):
        raise BadInput(f"{path} holds a {record.kind}, and a partition is needed: name a folder written by `elmwood export PARTITION`")
    return record


def _check_and_store(folder: Path, name: str, blob: str, store: Store) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BadRecord(f"the record names the file {name!r}; files stay inside their folder: do not use this partition")
    if not path.is_file() or f"sha256:{hash_file(path)}" != blob:
        raise Damaged(f"{path} is missing or does not match the record: download the folder again")
    store.put(path)


# ---- use -------------------------------------------------------------------------------------------------------------


class SurveyCounts(NamedTuple):
    """How many of somebody's documents belong to each domain, and how near they are to its centroid."""

    documents_K: Ints
    bytes_K: Ints
    edge_B: Floats  # edges of the bins of squared distance: B edges, B - 1 bins
    near_KB: Ints  # documents of each domain in each bin
    far_K: Ints  # documents of each domain that lie nearer to the zero vector than to any centroid
    nearest_K: tuple[tuple[str, ...], ...]  # ids of the documents nearest to each centroid
    wordless: int  # documents without a word the embedder knows; not counted above


def survey(partition: Partition, store: Store, incoming: Iterable[Document], *, progress: Progress = silent) -> SurveyCounts:
    """Assign a stream of documents to domains and count them. Only counts and ids are kept; nothing leaves the machine."""
    fitted = embed.load(partition.embedder, store)
    centroid_KD = np.asarray(centroids(partition, store))
    k = len(centroid_KD)
    documents_K, bytes_K, far_K, near_KB = (np.zeros(shape, np.int64) for shape in (k, k, k, (k, len(EDGES) - 1)))
    nearest: list[list[tuple[float, str]]] = [[] for _ in range(k)]
    wordless = 0
    stream = iter(incoming)
    while batch := list(islice(stream, BATCH)):
        x_ND = fitted.embed([document.text for document in batch])
        some_N = x_ND.any(1)
        inside = [batch[n] for n in np.flatnonzero(some_N)]
        dist2_NK = squared_distances(x_ND[some_N], centroid_KD)
        label_N, near_N = dist2_NK.argmin(1), dist2_NK.min(1, initial=EDGES[-1])
        size_N = [len(document.text.encode("utf-8", "replace")) for document in inside]
        documents_K += np.bincount(label_N, minlength=k)
        bytes_K += np.bincount(label_N, weights=size_N, minlength=k).astype(np.int64)
        if not embed.has_domains(partition.embedder.name):  # which is a likelihood, and no place in space
            far_K += np.bincount(label_N[near_N > FAR], minlength=k)
        near_KB += np.histogram2d(label_N, near_N, bins=(np.arange(k + 1), EDGES))[0].astype(np.int64)
        for domain in np.unique(label_N):
            mine = np.flatnonzero(label_N == domain)
            best = mine[np.argsort(near_N[mine], kind="stable")[:EXAMPLES]]
            pool = {*nearest[domain], *((float(near_N[n]), inside[n].id) for n in best)}
            nearest[domain] = sorted(pool)[:EXAMPLES]
        wordless += int((~some_N).sum())
        progress("assign", float(documents_K.sum()) + wordless, 0, "documents")
    return SurveyCounts(documents_K, bytes_K, EDGES, near_KB, far_K, tuple(tuple(name for _, name in one) for one in nearest), wordless)


def quantiles(near_B: Ints, edge_B: Floats, share_Q: Sequence[float] = QUANTILES) -> list[float] | None:
    """Squared distances below which these shares of the documents lie, to within a bin; None if there are no documents."""
    if not near_B.sum():
        return None
    below_B = np.concatenate([[0], np.cumsum(near_B)]) / near_B.sum()
    rising = np.concatenate([[True], np.diff(below_B) > 0]) | (np.append(np.diff(below_B), 0) > 0)
    return [float(np.interp(share, below_B[rising], edge_B[rising])) for share in share_Q]
