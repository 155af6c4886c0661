"""Make domains out of documents: cluster, assign, write the shards of each domain, name the domains.

Shapes: N documents, K domains, D dimensions, V terms, S shards.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray
from scipy import sparse

from elmwood.corpus.build import documents
from elmwood.domains import embed, names
from elmwood.domains.cluster import Clusters, assign, fill_empty, kmeans, members, squared_distances
from elmwood.domains.distances import distances
from elmwood.domains.embed import Fitted, Terms
from elmwood.engine import Progress, run, silent
from elmwood.records import Domain, Embedder, Shard, fingerprint
from elmwood.store import Store
from elmwood.store.disk import write_whole

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
In = TypeVar("In")
Out = TypeVar("Out")

FIT = 200_000  # documents clustered, at most; the others go to the nearest centroid
SAMPLE = 20_000  # of these, documents that sparse centroids and names are made from
EXAMPLES = 3  # documents nearest to a centroid
BATCH = 4096  # documents embedded at once


class Means(NamedTuple):
    """How the work is done. The result does not depend on it."""

    workers: int = 1  # shards processed in parallel
    engine: str = "local"  # a row of elmwood.engine.ENGINES


class Setup(NamedTuple):
    """What all steps share: the store, the work folder of the task, the embedder, and how the work is done."""

    store: Store
    work: Path
    embedder: Embedder
    means: Means

    def fitted(self) -> Fitted:
        return embed.load(self.embedder, self.store)

    def run(self, task: Callable[[In, Progress], Out], inputs: Sequence[In], what: str, progress: Progress) -> list[Out]:
        """Run a task for each shard."""
        return run(task, inputs, workers=self.means.workers, engine=self.means.engine, what=what, progress=progress)


class NewDomains(NamedTuple):
    """Domains that were made out of documents."""

    domains: tuple[Domain, ...]
    clusters: Clusters  # of the clustered documents
    sparse_KV: sparse.csr_matrix | None
    greedy_sizes: tuple[int, ...]


def grow(
    setup: Setup,
    train: Sequence[Shard],
    holdout: Sequence[Shard],
    k: int,
    method: str,
    rng_seed: int,
    others: Sequence[Domain] = (),
    progress: Progress = silent,
) -> NewDomains:
    """Divide documents into k domains, with names that tell them from each other and from the `others`.

    Clustered documents keep their cluster. All others, and the holdout, go to the nearest centroid.
    """
    clusters, greedy_N, examples = _fit(setup, train, k, method, rng_seed, progress)
    random_seed = rng_seed if method == "random" else None
    parts, greedy_K = divide_all(setup, "train", train, clusters, random_seed, progress)
    held, _ = divide_all(setup, "holdout", holdout, clusters._replace(label_N=clusters.label_N[:0]), None, progress)
    label_N = clusters.label_N[:SAMPLE]
    texts = [text[: embed.LOOKED_AT] for text in islice(_texts(train, setup.store), len(label_N))]
    terms, called = _name(texts, label_N, k, others, setup.store)
    made = tuple(
        Domain(name=name, terms=terms[place], train=parts[place], holdout=held[place], examples=examples[place])
        for place, name in enumerate(called)
    )
    return NewDomains(
        made,
        clusters,
        _sparse_centroids(setup.fitted(), texts, label_N, k),
        tuple((greedy_K + np.bincount(greedy_N, minlength=k)).tolist()),
    )


# ---- fit -------------------------------------------------------------------------------------------------------------


class EmbedTask(NamedTuple):
    """The first documents of one shard to embed, and the file for their vectors."""

    setup: Setup
    marker: Path
    shard: Shard
    wanted: int


def embed_shard(task: EmbedTask, progress: Progress = silent) -> Path:
    """Write the vectors [N, D] float32 of the first documents of one shard, once."""
    if not task.marker.exists():
        fitted = task.setup.fitted()
        stream = islice(documents([task.shard], task.setup.store), task.wanted)
        x_ND, done = np.zeros((task.wanted, fitted.dimension), np.float32), 0
        while batch := list(islice(stream, BATCH)):
            x_ND[done : done + len(batch)] = fitted.embed([document.text for document in batch])
            done += len(batch)
            progress(f"embed {task.marker.stem}", done, task.wanted, "documents")
        write_whole(task.marker, safetensors.numpy.save({"x": x_ND}))
    return task.marker


def _embed(setup: Setup, train: Sequence[Shard], progress: Progress) -> tuple[Floats, list[str]]:
    """The vectors [N, D] and ids of the first FIT documents."""
    before_S = np.cumsum([0, *(shard.documents for shard in train)])
    counts = [int(min(shard.documents, FIT - before)) for shard, before in zip(train, before_S, strict=False) if before < FIT]
    tasks = [
        EmbedTask(setup, setup.work / f"shard-{number}.safetensors", shard, count)
        for number, (shard, count) in enumerate(zip(train, counts, strict=False))
    ]
    parts = setup.run(embed_shard, tasks, "embed", progress)
    x_ND = np.zeros((sum(counts), setup.embedder.dimension), np.float32)
    ids: list[str] = []
    for task, part in zip(tasks, parts, strict=True):
        x_ND[len(ids) : len(ids) + task.wanted] = safetensors.numpy.load_file(part)["x"]
        ids += pq.read_table(setup.store.get(task.shard.blob), columns=["id"])["id"].slice(0, task.wanted).to_pylist()
    return x_ND, ids


def _fit(
    setup: Setup, train: Sequence[Shard], k: int, method: str, rng_seed: int, progress: Progress
) -> tuple[Clusters, Ints, list[tuple[str, ...]]]:
    """Cluster the first FIT documents (shards are shuffled): clusters, the nearest centroid of each, and the ids nearest to each centroid.

    For the method "random", labels depend on the ids only, and centroids are the means.
    """
    x_ND, ids = _embed(setup, train, progress)
    saved = setup.work / "fit.safetensors"
    if saved.exists():
        tensors = safetensors.numpy.load_file(saved)
        clusters = Clusters(tensors["centroids"], tensors["labels"], float(tensors["objective"][0]))
    elif method == "random":
        label_N = fill_empty(1.0 - np.eye(k)[:, random_labels(ids, k, rng_seed)])
        centroid_KD = (members(label_N, k) @ x_ND / np.bincount(label_N, minlength=k)[:, None]).astype(np.float32)
        clusters = Clusters(centroid_KD, label_N, float(np.square(x_ND - centroid_KD[label_N]).sum(1).mean()))
    elif embed.has_domains(setup.embedder.name):
        clusters = assign(x_ND, np.eye(k, dtype=np.float32), balanced=method == "balanced")
    else:
        clusters = kmeans(x_ND, k, balanced=method == "balanced", rng_seed=rng_seed, progress=progress)
    if not saved.exists():
        tensors = {"centroids": clusters.centroid_KD, "labels": clusters.label_N, "objective": np.array([clusters.objective])}
        write_whole(saved, safetensors.numpy.save(tensors))
    near_N, own2_N = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.float32)  # the nearest centroid, and the distance of the own one
    for first in range(0, len(ids), BATCH):
        some = slice(first, first + BATCH)
        dist2_BK = squared_distances(x_ND[some], clusters.centroid_KD)
        near_N[some] = dist2_BK.argmin(1)
        own2_N[some] = np.take_along_axis(dist2_BK, clusters.label_N[some, None], 1)[:, 0]
    order_N = np.lexsort((own2_N, clusters.label_N))
    begin_K = np.searchsorted(clusters.label_N[order_N], np.arange(k + 1))
    examples = [tuple(ids[n] for n in order_N[begin:end][:EXAMPLES]) for begin, end in pairwise(begin_K)]
    return clusters, near_N, examples


# ---- divide ---------------------------------------------------------------------------------------------------------


def divide_all(
    setup: Setup, role: str, shards: Sequence[Shard], clusters: Clusters, random_seed: int | None, progress: Progress
) -> tuple[list[tuple[Shard, ...]], Ints]:
    """Divide shards by domain: the shards of each domain [K], and how many documents that were not clustered are nearest to each [K].

    The first documents are the clustered ones. The others go to the nearest centroid, or at random by their id.
    """
    first_S = np.cumsum([0, *(shard.documents for shard in shards)])
    tasks = []
    for number, shard in enumerate(shards):
        known_N = clusters.label_N[first_S[number] : first_S[number + 1]]
        tasks.append(DivideTask(setup, clusters.centroid_KD, setup.work / f"{role}-{number}.json", shard, known_N, random_seed))
    found = setup.run(divide, tasks, f"divide {role} documents", progress)
    k = len(clusters.centroid_KD)
    made = [tuple(Shard(**one[str(domain)]) for one, _ in found if str(domain) in one) for domain in range(k)]
    return made, sum((np.array(greedy) for _, greedy in found), np.zeros(k, np.int64))


class DivideTask(NamedTuple):
    """One shard to divide by domain. `marker` is the file for the result."""

    setup: Setup
    centroid_KD: Floats
    marker: Path
    shard: Shard
    known_N: Ints
    random_seed: int | None


def divide(task: DivideTask, progress: Progress = silent) -> tuple[dict[str, dict], list[int]]:
    """Write the documents of one shard as a shard per domain, once: their fields by domain, and counts by nearest centroid [K]."""
    setup, store = task.setup, task.setup.store
    if not task.marker.exists():
        k = len(task.centroid_KD)
        table = pq.read_table(store.get(task.shard.blob))
        rest = table.slice(len(task.known_N))
        texts = rest["text"].to_pylist()
        near_N: Ints = np.zeros(0, np.int64)
        if texts:
            near_N = nearest(setup.fitted(), task.centroid_KD, texts)
        rest_N = near_N if task.random_seed is None else random_labels(rest["id"].to_pylist(), k, task.random_seed)
        label_N = np.concatenate([task.known_N, rest_N])
        made, order_N = {}, np.argsort(label_N, kind="stable")
        table = table.take(pa.array(order_N))  # once, for it takes time with the whole table; slices do not
        met, begin_K = np.unique(label_N[order_N], return_index=True)
        for domain, begin, end in zip(met.tolist(), begin_K, [*begin_K[1:], len(order_N)], strict=True):
            chosen = table.slice(begin, end - begin).combine_chunks()
            path = task.marker.with_suffix(".parquet")
            pq.write_table(chosen, path, compression="zstd")
            size = sum(len(text.encode()) for text in chosen["text"].to_pylist())
            made[str(domain)] = Shard(blob=store.put(path), documents=len(chosen), bytes=size).model_dump()
        write_whole(task.marker, json.dumps([made, np.bincount(near_N, minlength=k).tolist()]).encode())
    made, greedy = json.loads(task.marker.read_bytes())
    return made, greedy


def nearest(fitted: Fitted, centroid_KD: Floats, texts: Sequence[str]) -> Ints:
    """The nearest domain of each text [N]."""
    batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
    return np.concatenate([np.zeros(0, np.int64), *(distances(fitted, centroid_KD, batch).argmin(1) for batch in batches)])


def random_labels(ids: Sequence[str], k: int, rng_seed: int) -> Ints:
    """A random domain for each document, by its id only [N]."""
    return np.array([int(fingerprint("random", rng_seed, name)[:16], 16) % k for name in ids], np.int64)


# ---- describe -------------------------------------------------------------------------------------------------------


def _name(texts: Sequence[str], label_N: Ints, k: int, others: Sequence[Domain], store: Store) -> tuple[list[tuple[str, ...]], list[str]]:
    """The terms and the name of each domain, from labelled texts, compared with the text of other domains."""
    each = SAMPLE // max(len(others), 1)
    aside = list(chain.from_iterable(islice(_texts(domain.train, store), each) for domain in others))
    all_N = np.concatenate([label_N, np.full(len(aside), k)])
    reading = names.read(chain(texts, aside))
    terms = names.top_terms(reading, all_N, k + 1)[:k]
    return terms, names.names(terms, names.code_names(reading.languages, all_N, k), [domain.name for domain in others])


def _sparse_centroids(fitted: Fitted, texts: Sequence[str], label_N: Ints, k: int) -> sparse.csr_matrix | None:
    """The summed tf-idf rows of each domain [K, V], for embedders that have terms."""
    return sparse.csr_matrix(members(label_N, k) @ fitted.tfidf(texts)) if isinstance(fitted, Terms) else None


def _texts(shards: Sequence[Shard], store: Store) -> Iterator[str]:
    return (document.text for document in documents(shards, store))
