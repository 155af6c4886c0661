"""Corpus -> partition: embed, cluster, assign, name, and write each domain's shards, one shard of the corpus at a time.

Shapes: N documents, K domains, D dimensions, V terms, B bins.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray
from scipy import sparse

from elmwood.corpus.build import documents
from elmwood.domains import embed, names
from elmwood.domains.cluster import Clusters, fill_empty, kmeans, members, squared_distances
from elmwood.domains.dense import Model
from elmwood.domains.embed import Fitted, Terms
from elmwood.domains.route import Centroids, Sparse, distances
from elmwood.engine import Progress, silent
from elmwood.errors import BadCorpus, BadInput
from elmwood.records import Corpus, Domain, Embedder, Partition, Shard, fingerprint
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

RULES = 3  # raised when the same inputs would make another partition
METHODS = ("balanced", "plain", "random")
FIT = 200_000  # documents clustered, at most; the others are assigned to the nearest centroid
SAMPLE = 20_000  # of them, those that sparse centroids and names are made from
KEPT = 4096  # terms of a sparse centroid
EXAMPLES = 3
BATCH = 4096  # documents embedded at once


def partition(
    corpus: Corpus,
    store: Store,
    *,
    domains: int = 8,
    embedder: str | Embedder = "tfidf",
    method: str = "balanced",
    rng_seed: int = 0,
    model: Model | None = None,
    progress: Progress = silent,
) -> Partition:
    """Divide a corpus into domains: "balanced" or "plain" k-means, or "random", the control.

    `embedder` is a row of a table, fitted here, or one that was fitted before; neural ones (dense.py) need their model.
    Documents of the fit keep the domain they got there; the others, and the holdout, go to the
    nearest centroid. Done once for the same inputs; what was cut off goes on at its shard. Raises BadCorpus, BadInput.
    """
    if method not in METHODS:
        raise BadInput(f"no clustering method {method!r}; have {', '.join(METHODS)}")
    count = sum(shard.documents for shard in corpus.train)
    if not 1 <= domains <= count:
        raise BadCorpus(f"{domains} domains of {count} training documents: each needs at least one; ask for fewer, or add documents")
    key = fingerprint("partition", RULES, corpus.digest, domains, embedder, model and model.name, method, rng_seed)
    with _alone(store, key) as work:
        if done := store.done(key):
            return store.load(done, Partition)
        started = time.perf_counter()
        if isinstance(embedder, str):
            embedder = _fitted(corpus, store, embedder, rng_seed, model, progress)
        fitted = embed.load(embedder, store, model)
        fit, greedy_fit_N, ids = _fit(fitted, corpus, store, work, domains, method, rng_seed, progress)
        parting = Parting(store, work, embedder, fit.centroid_KD, model)
        train, greedy_K = parting.run("train", corpus.train, fit.label_N, rng_seed if method == "random" else None, progress)
        holdout, _ = parting.run("holdout", corpus.holdout, fit.label_N[:0], None, progress)
        sample = islice((text for shard in corpus.train for text in read_texts(shard, store)), SAMPLE)
        sparse_KV, terms = describe(fitted, sample, fit.label_N[:SAMPLE], domains)
        made = Partition(
            corpus=corpus.digest,
            embedder=embedder,
            centroids=save_centroids(fit.centroid_KD, sparse_KV, store),
            domains=tuple(
                Domain(name=name, terms=terms[k], train=train[k], holdout=holdout[k], examples=ids[k])
                for k, name in enumerate(names.names(terms))
            ),
            method=method,
            rng_seed=rng_seed,
            fit_sizes=fit.sizes,
            greedy_sizes=tuple((greedy_K + np.bincount(greedy_fit_N, minlength=domains)).tolist()),
            extra={"objective": fit.objective},
        )
        store.finish(key, made)
        store.log(key, seconds=time.perf_counter() - started, documents=count)
        return made


# ---- using a partition: its record, its centroids and its embedder are enough; no text of the corpus is needed -------


def centroids(partition: Partition, store: Store, signal: str = "dense") -> Centroids:
    """The centroids as a router's signal wants them: "dense" [K, D] float32, or "sparse". Raises BadInput."""
    tensors = safetensors.numpy.load_file(store.get(partition.centroids))
    if signal != "sparse":
        return tensors["centroids"]
    if "sparse_values" not in tensors:
        raise BadInput(f"this partition embeds with {partition.embedder.name!r}, which has no sparse centroids: choose another router")
    rows, columns = len(tensors["centroids"]), int(tensors["sparse_columns"][0])
    values = tensors["sparse_values"].astype(np.float64)
    return Sparse.of(sparse.csr_matrix((values, tensors["sparse_terms"], tensors["sparse_starts"]), shape=(rows, columns)))


def assign(partition: Partition, store: Store, texts: Sequence[str], model: Model | None = None) -> tuple[Ints, Floats]:
    """The nearest domain of each text [N] and its squared distances to all [N, K]."""
    dist2_NK = distances(embed.load(partition.embedder, store, model), centroids(partition, store), texts)
    return dist2_NK.argmin(1), dist2_NK


class Survey(NamedTuple):
    """Which domains somebody's own documents belong to, and how near they are."""

    documents_K: Ints
    bytes_K: Ints
    edge_B: Floats  # of the bins of squared distance: B edges, B - 1 bins
    near_KB: Ints  # documents of each domain in each bin
    wordless: int  # documents without a known word: they are near to nothing, and not counted above


def survey(partition: Partition, store: Store, texts: Iterable[str], *, model: Model | None = None, progress: Progress = silent) -> Survey:
    """Assign a stream of texts to the domains, and count. Nothing leaves the machine."""
    fitted = embed.load(partition.embedder, store, model)
    centroid_KD = np.asarray(centroids(partition, store))
    k = len(centroid_KD)
    edge_B = np.linspace(0, 4, 81)
    documents_K, bytes_K, near_KB, wordless = np.zeros(k, np.int64), np.zeros(k, np.int64), np.zeros((k, 80), np.int64), 0
    stream = iter(texts)
    while batch := list(islice(stream, BATCH)):
        x_ND = fitted.embed(batch)
        some_N = x_ND.any(1)
        dist2_NK = squared_distances(x_ND[some_N], centroid_KD)
        label_N = dist2_NK.argmin(1)
        size_N = np.array([len(text.encode("utf-8", "replace")) for text in batch])[some_N]
        documents_K += np.bincount(label_N, minlength=k)
        bytes_K += np.bincount(label_N, weights=size_N, minlength=k).astype(np.int64)
        near_KB += np.histogram2d(label_N, dist2_NK.min(1, initial=4), bins=(np.arange(k + 1), edge_B))[0].astype(np.int64)
        wordless += int((~some_N).sum())
        progress("assign", float(documents_K.sum()) + wordless, 0, "documents")
    return Survey(documents_K, bytes_K, edge_B, near_KB, wordless)


def public_files(partition: Partition) -> tuple[str, ...]:
    """Digests of all that a partition needs to be used by others: the record, centroids, embedder. No text is among them."""
    return (partition.digest, partition.centroids, *partition.embedder.files.values())


# ---- making one ------------------------------------------------------------------------------------------------------


class Parting(NamedTuple):
    """Parts shards of a corpus by domain: each (shard, domain) becomes a shard, and a finished shard is not done again."""

    store: Store
    work: Path
    embedder: Embedder
    centroid_KD: Floats
    model: Model | None

    def run(
        self, role: str, shards: Sequence[Shard], known_N: Ints, random_seed: int | None, progress: Progress
    ) -> tuple[list[tuple[Shard, ...]], Ints]:
        """Shards of each domain [K], and how many of the documents without a known label lie nearest to each domain [K].

        The first documents have a known label; the others go to the nearest centroid, or at random by their id.
        """
        first_S = np.cumsum([0, *(shard.documents for shard in shards)])
        tasks = [
            PartTask(self, self.work / f"{role}-{number}.json", shard, known_N[first_S[number] : first_S[number + 1]], random_seed)
            for number, shard in enumerate(shards)
        ]
        found = []
        for done, task in enumerate(tasks, 1):
            found.append(part(task))
            progress(f"part {role} documents", done, len(tasks), "shards")
        k = len(self.centroid_KD)
        made = [tuple(Shard(**one[str(domain)]) for one, _ in found if str(domain) in one) for domain in range(k)]
        return made, sum((np.array(greedy) for _, greedy in found), np.zeros(k, np.int64))


class PartTask(NamedTuple):
    """One shard to part, named by where its result is noted."""

    parting: Parting
    marker: Path
    shard: Shard
    known_N: Ints
    random_seed: int | None


def part(task: PartTask, progress: Progress = silent) -> tuple[dict[str, dict], list[int]]:
    """Write one shard's documents as a shard a domain: fields of these by domain, and greedy counts [K]. Done once."""
    parting, store = task.parting, task.parting.store
    if not task.marker.exists():
        k = len(parting.centroid_KD)
        table = pq.read_table(store.get(task.shard.blob))
        rest = table.slice(len(task.known_N))
        texts = rest["text"].to_pylist()
        near_N: Ints = np.zeros(0, np.int64)
        if texts:
            near_N = nearest(embed.load(parting.embedder, store, parting.model), parting.centroid_KD, texts)
        rest_N = near_N if task.random_seed is None else random_labels(rest["id"].to_pylist(), k, task.random_seed)
        label_N = np.concatenate([task.known_N, rest_N])
        made = {}
        for domain in np.unique(label_N).tolist():
            chosen = table.take(pa.array(np.flatnonzero(label_N == domain)))
            path = task.marker.with_suffix(".parquet")
            pq.write_table(chosen, path, compression="zstd")
            size = sum(len(text.encode()) for text in chosen["text"].to_pylist())
            made[str(domain)] = Shard(blob=store.put(path), documents=len(chosen), bytes=size).model_dump()
        _write(task.marker, json.dumps([made, np.bincount(near_N, minlength=k).tolist()]).encode())
    made, greedy = json.loads(task.marker.read_bytes())
    return made, greedy


def nearest(fitted: Fitted, centroid_KD: Floats, texts: Sequence[str]) -> Ints:
    """The nearest domain of each text [N]."""
    batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
    return np.concatenate([np.zeros(0, np.int64), *(distances(fitted, centroid_KD, batch).argmin(1) for batch in batches)])


def random_labels(ids: Sequence[str], k: int, rng_seed: int) -> Ints:
    """A domain for each document by its id alone [N]."""
    return np.array([int(fingerprint("random", rng_seed, name)[:16], 16) % k for name in ids], np.int64)


def read_texts(shard: Shard, store: Store) -> Iterator[str]:
    """The texts of a shard, streamed."""
    return (document.text for document in documents([shard], store))


def describe(fitted: Fitted, texts: Iterable[str], label_N: Ints, k: int) -> tuple[sparse.csr_matrix | None, list[tuple[str, ...]]]:
    """Of labelled texts: the mean tf-idf row of each domain [K, V], for embedders that have one, and its telling terms."""
    found = [text[: embed.LOOKED_AT] for text in texts]
    words, count_KV = names.count_documents(found, label_N, k)
    terms = names.top_terms(words, count_KV, np.bincount(label_N, minlength=k))
    if not isinstance(fitted, Terms):
        return None, terms
    x_NV = fitted.tfidf(found)
    return sparse.csr_matrix(members(label_N, k) @ x_NV), terms


def save_centroids(centroid_KD: Floats, sparse_KV: sparse.csr_matrix | None, store: Store) -> str:
    """Store dense centroids, and the largest KEPT terms of each sparse one; the digest of the file."""
    tensors = {"centroids": np.ascontiguousarray(centroid_KD, np.float32)}
    if sparse_KV is not None:
        rows = [_largest(sparse_KV[row]) for row in range(sparse_KV.shape[0])]
        tensors |= {
            "sparse_values": np.concatenate([values for _, values in rows]).astype(np.float32),
            "sparse_terms": np.concatenate([terms for terms, _ in rows]).astype(np.int32),
            "sparse_starts": np.cumsum([0, *(len(terms) for terms, _ in rows)]).astype(np.int64),
            "sparse_columns": np.array([sparse_KV.shape[1]], np.int64),
        }
    return store.put(safetensors.numpy.save(tensors))


def _largest(row_1V: sparse.csr_matrix) -> tuple[Ints, Floats]:
    kept = np.sort(np.argsort(-row_1V.data, kind="stable")[:KEPT])
    return row_1V.indices[kept], row_1V.data[kept]


def _fitted(corpus: Corpus, store: Store, name: str, rng_seed: int, model: Model | None, progress: Progress) -> Embedder:
    """Fit an embedder on the training documents, or find it fitted before."""
    path = store.work(fingerprint("embedder", RULES, corpus.digest, name, model and model.name, rng_seed)) / "embedder.json"
    if path.exists():
        found = Embedder.model_validate_json(path.read_bytes())
        if all(store.has(blob) for blob in found.files.values()):
            return found
    texts = (text for shard in corpus.train for text in read_texts(shard, store))
    made = embed.fit(name, texts, model=model, rng_seed=rng_seed, progress=progress).save(store)
    _write(path, made.model_dump_json().encode())
    return made


def _fit(
    fitted: Fitted, corpus: Corpus, store: Store, work: Path, k: int, method: str, rng_seed: int, progress: Progress
) -> tuple[Clusters, Ints, list[tuple[str, ...]]]:
    """Cluster the first FIT training documents (shards are shuffled); their greedy labels, and ids nearest each centroid.

    For "random", the rest of the documents follow the same rule by id, and the centroids are the means of these.
    """
    total = min(FIT, sum(shard.documents for shard in corpus.train))
    stream = islice(documents(corpus.train, store), total)
    ids: list[str] = []
    x_ND = np.zeros((total, fitted.dimension), np.float32)
    while batch := list(islice(stream, BATCH)):
        x_ND[len(ids) : len(ids) + len(batch)] = fitted.embed([document.text for document in batch])
        ids += [document.id for document in batch]
        progress("embed", len(ids), total, "documents")
    saved = work / "fit.safetensors"
    if saved.exists():
        tensors = safetensors.numpy.load_file(saved)
        clusters = Clusters(tensors["centroids"], tensors["labels"], float(tensors["objective"][0]))
    elif method == "random":
        label_N = fill_empty(1.0 - np.eye(k)[:, random_labels(ids, k, rng_seed)])
        centroid_KD = (members(label_N, k) @ x_ND / np.bincount(label_N, minlength=k)[:, None]).astype(np.float32)
        clusters = Clusters(centroid_KD, label_N, float(np.square(x_ND - centroid_KD[label_N]).sum(1).mean()))
    else:
        clusters = kmeans(x_ND, k, balanced=method == "balanced", rng_seed=rng_seed, progress=progress)
    if not saved.exists():
        tensors = {"centroids": clusters.centroid_KD, "labels": clusters.label_N, "objective": np.array([clusters.objective])}
        _write(saved, safetensors.numpy.save(tensors))
    dist2_NK = squared_distances(x_ND, clusters.centroid_KD)
    examples = []
    for domain in range(k):
        mine = np.flatnonzero(clusters.label_N == domain)
        examples.append(tuple(ids[n] for n in mine[np.argsort(dist2_NK[mine, domain], kind="stable")[:EXAMPLES]]))
    return clusters, dist2_NK.argmin(1), examples


@contextmanager
def _alone(store: Store, key: str) -> Iterator[Path]:
    """The work folder of a task, held by one process at a time: the next one waits, and finds the task done."""
    work = store.work(key)
    with work.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when the process dies
        yield store.work(key)


def _write(path: Path, data: bytes) -> None:
    """All of a file, or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
