"""Corpus -> partition: embed, cluster, assign, name, and write each domain's shards.

Shapes: N documents, K domains, D dimensions.
"""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray

from elmwood.domains import embed, names
from elmwood.domains.cluster import Clusters, fill_empty, kmeans, squared_distances, sum_rows
from elmwood.domains.route import distances
from elmwood.engine import Progress, silent
from elmwood.errors import BadCorpus, BadInput
from elmwood.records import Corpus, Domain, Embedder, Partition, Shard, fingerprint
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

RULES = 2  # raised when the same inputs would make another partition
FIT = 200_000  # documents clustered; the others are assigned to the nearest centroid
EXAMPLES = 3
METHODS = ("balanced", "plain", "random")


def partition(
    corpus: Corpus,
    store: Store,
    *,
    domains: int = 8,
    embedder: str | Embedder = "tfidf",
    method: str = "balanced",
    rng_seed: int = 0,
    progress: Progress = silent,
) -> Partition:
    """Divide a corpus into domains: "balanced" or "plain" k-means, or "random", the control. Done once for the same inputs.

    Documents of the fit keep the domain the fit gave them; others, and the holdout, go to the nearest centroid.
    Raises BadCorpus, BadInput.
    """
    if method not in METHODS:
        raise BadInput(f"no clustering method {method!r}; have {', '.join(METHODS)}")
    key = fingerprint("partition", RULES, corpus.digest, domains, embedder, method, rng_seed)
    if done := store.done(key):
        return store.load(done, Partition)
    started = time.perf_counter()
    count = sum(shard.documents for shard in corpus.train)
    if domains > count:
        raise BadCorpus(f"{domains} domains of {count} training documents: each needs at least one; ask for fewer, or add documents")
    if isinstance(embedder, str):
        fitted = embed.fit(
            embedder, (text for shard in corpus.train for text in _texts(shard, store)), rng_seed=rng_seed, progress=progress
        )
        embedder = fitted.save(store)
    fitted = embed.load(embedder, store)
    x_ND, ids = _embed(fitted, corpus.train, store, progress)
    clusters = _cluster(x_ND, ids, domains, method, rng_seed, progress)
    held_ND, _ = _embed(fitted, corpus.holdout, store, progress)
    held_N = squared_distances(held_ND, clusters.centroid_KD).argmin(1)
    train = _write(corpus.train, clusters.label_N, domains, store, progress)
    holdout = _write(corpus.holdout, held_N, domains, store, progress)
    nearest = squared_distances(x_ND, clusters.centroid_KD)
    texts = [text for shard in corpus.train for text in _texts(shard, store)]
    terms = names.top_terms(texts, clusters.label_N, domains)
    examples = [_examples(nearest[:, k], clusters.label_N == k, ids) for k in range(domains)]
    made = Partition(
        corpus=corpus.digest,
        embedder=embedder,
        centroids=store.put(safetensors.numpy.save({"centroids": clusters.centroid_KD})),
        domains=tuple(
            Domain(name=name, terms=terms[k], train=train[k], holdout=holdout[k], examples=examples[k])
            for k, name in enumerate(names.names(terms))
        ),
        method=method,
        rng_seed=rng_seed,
        fit_sizes=clusters.sizes,
        extra={"objective": clusters.objective},
    )
    store.finish(key, made)
    store.log(key, seconds=time.perf_counter() - started, documents=count)
    return made


def centroids(partition: Partition, store: Store) -> Floats:
    """The centroids [K, D] float32."""
    return safetensors.numpy.load_file(store.get(partition.centroids))["centroids"]


def assign(partition: Partition, store: Store, texts: Sequence[str]) -> tuple[Ints, Floats]:
    """The nearest domain of each text [N] and its squared distances to all [N, K]. Needs no text of the corpus."""
    dist2_NK = distances(embed.load(partition.embedder, store), centroids(partition, store), texts)
    return dist2_NK.argmin(1), dist2_NK


def _texts(shard: Shard, store: Store) -> list[str]:
    return pq.read_table(store.get(shard.blob), columns=["text"])["text"].to_pylist()


def _embed(fitted: embed.Terms, shards: Sequence[Shard], store: Store, progress: Progress) -> tuple[Floats, list[str]]:
    parts = [np.zeros((0, fitted.dimension), np.float32)]
    ids: list[str] = []
    total = sum(shard.documents for shard in shards)
    for shard in shards:
        parts.append(fitted.embed(_texts(shard, store)))
        ids += pq.read_table(store.get(shard.blob), columns=["id"])["id"].to_pylist()
        progress("embed", len(ids), total, "documents")
    return np.concatenate(parts), ids


def _cluster(x_ND: Floats, ids: Sequence[str], k: int, method: str, rng_seed: int, progress: Progress) -> Clusters:
    if method == "random":
        label_N = np.array([int(fingerprint(rng_seed, name)[:16], 16) % k for name in ids])
        costs = 1.0 - np.eye(k)[label_N]
        label_N = fill_empty(costs)
        count_K = np.bincount(label_N, minlength=k)
        centroid_KD = (sum_rows(x_ND, label_N, k) / count_K[:, None]).astype(np.float32)
        objective = float(np.square(x_ND - centroid_KD[label_N]).sum(1).mean())
        return Clusters(centroid_KD, label_N, objective)
    fit = kmeans(x_ND[:FIT], k, balanced=method == "balanced", rng_seed=rng_seed, progress=progress)
    rest_N = squared_distances(x_ND[FIT:], fit.centroid_KD).argmin(1)
    return fit._replace(label_N=np.concatenate([fit.label_N, rest_N]))


def _examples(dist2_N: Floats, member_N: NDArray[np.bool_], ids: Sequence[str]) -> tuple[str, ...]:
    """Ids of the members nearest the centroid."""
    members = np.flatnonzero(member_N)
    return tuple(ids[i] for i in members[np.argsort(dist2_N[members], kind="stable")[:EXAMPLES]])


def _write(shards: Sequence[Shard], label_N: Ints, k: int, store: Store, progress: Progress) -> list[tuple[Shard, ...]]:
    """Each shard's documents, parted by domain: [K] tuples of shards."""
    made: list[list[Shard]] = [[] for _ in range(k)]
    first = 0
    for number, shard in enumerate(shards):
        table = pq.read_table(store.get(shard.blob))
        mine_N = label_N[first : first + len(table)]
        first += len(table)
        for domain in range(k):
            part = table.take(pa.array(np.flatnonzero(mine_N == domain)))
            if len(part):
                path = store.work("write") / "part.parquet"
                pq.write_table(part, path, compression="zstd")
                size = sum(len(text.encode()) for text in part["text"].to_pylist())
                made[domain].append(Shard(blob=store.put(path), documents=len(part), bytes=size))
        progress("write domains", number + 1, len(shards), "shards")
    return [tuple(one) for one in made]
