"""Corpus -> partition; using one; and revising one, with the domains that stay as they were.

Shapes: N documents, K domains, D dimensions, V terms, B bins.
"""

import time
from collections.abc import Sequence

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from scipy import sparse

from elmwood.corpus.build import documents
from elmwood.domains import embed
from elmwood.domains.dense import Model, Open
from elmwood.domains.grow import Ground, Means, NewDomains, grow, write
from elmwood.domains.route import Centroids, Sparse, distances
from elmwood.engine import Progress, silent
from elmwood.errors import BadCorpus, BadInput, ForeignExpert
from elmwood.records import Corpus, Domain, Embedder, Partition, fingerprint
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

RULES = 5  # raised when the same inputs would make another partition
METHODS = ("balanced", "plain", "random")
KEPT = 4096  # terms of a sparse centroid
ALONE = Means()


def partition(
    corpus: Corpus,
    store: Store,
    *,
    domains: int = 8,
    embedder: str | Embedder = "tfidf",
    method: str = "balanced",
    rng_seed: int = 0,
    means: Means = ALONE,
    progress: Progress = silent,
) -> Partition:
    """Divide a corpus into domains: "balanced" or "plain" k-means, or "random", the control.

    `embedder` is a row of the table of embedders, fitted here, or one that was fitted before, as neural ones are (fit_embedder).
    Done once for the same inputs, by whatever means; what was cut off goes on at its shard. Raises BadCorpus, BadInput.
    """
    if method not in METHODS:
        raise BadInput(f"no clustering method {method!r}; have {', '.join(METHODS)}")
    count = sum(shard.documents for shard in corpus.train)
    if not 1 <= domains <= count:
        raise BadCorpus(f"{domains} domains of {count} training documents: each needs at least one; ask for fewer, or add documents")
    key = fingerprint("partition", RULES, corpus.digest, domains, embedder, None, method, rng_seed)
    with store.held(key) as work:
        if done := store.done(key):
            return store.load(done, Partition)
        started = time.perf_counter()
        if isinstance(embedder, str):
            embedder = fit_embedder(corpus, store, embedder, rng_seed=rng_seed, progress=progress)
        ground = Ground(store, work, embedder, means)
        grown = grow(ground, corpus.train, corpus.holdout, domains, method, rng_seed, progress=progress)
        made = Partition(
            corpus=corpus.digest,
            embedder=embedder,
            centroids=_save(grown.clusters.centroid_KD, grown.sparse_KV, store),
            domains=grown.domains,
            method=method,
            rng_seed=rng_seed,
            fit_sizes=grown.clusters.sizes,
            greedy_sizes=grown.greedy_sizes,
            extra={"objective": grown.clusters.objective},
        )
        store.finish(key, made)
        store.log(key, seconds=time.perf_counter() - started, documents=count)
        return made


def fit_embedder(
    corpus: Corpus, store: Store, name: str, *, model: Model | None = None, rng_seed: int = 0, progress: Progress = silent
) -> Embedder:
    """Fit a row of the table of embedders on the training documents, or find it fitted before; neural ones need their model.
    Raises UnknownName, BadInput, BadCorpus."""
    path = store.work(fingerprint("embedder", RULES, corpus.digest, name, model and model.name, rng_seed)) / "embedder.json"
    if path.exists():
        found = Embedder.model_validate_json(path.read_bytes())
        if all(store.has(blob) for blob in found.files.values()):
            return found
    texts = (document.text for document in documents(corpus.train, store))
    made = embed.fit(name, texts, model=model, rng_seed=rng_seed, progress=progress).save(store)
    write(path, made.model_dump_json().encode())
    return made


# ---- using a partition: its record, its centroids and its embedder are enough; no text of the corpus is needed -------


def centroids(partition: Partition, store: Store, signal: str = "dense") -> Centroids:
    """The centroids as a router's signal wants them: "dense" [K, D] float32, or "sparse". Raises BadInput."""
    centroid_KD, sparse_KV = _saved(partition, store)
    if signal != "sparse":
        return centroid_KD
    if sparse_KV is None:
        raise BadInput(f"this partition embeds with {partition.embedder.name!r}, which has no sparse centroids: choose another router")
    return Sparse.of(sparse_KV)


def assign(partition: Partition, store: Store, texts: Sequence[str], open_model: Open | None = None) -> tuple[Ints, Floats]:
    """The nearest domain of each text [N] and its squared distances to all [N, K]."""
    dist2_NK = distances(embed.load(partition.embedder, store, open_model), centroids(partition, store), texts)
    return dist2_NK.argmin(1), dist2_NK


# ---- revising one ----------------------------------------------------------------------------------------------------
# A domain that is not split keeps its place, centroid, name and shards, so its expert stays what it was. The embedder
# stays too: words it does not know are still unknown.


def split(
    partition: Partition,
    domain: int,
    store: Store,
    *,
    parts: int = 2,
    rng_seed: int = 0,
    means: Means = ALONE,
    progress: Progress = silent,
) -> Partition:
    """Part one domain in several: the first takes its place, the others come after the last. Raises BadInput, BadCorpus."""
    if not 0 <= domain < len(partition.domains) or partition.method == "random":
        raise BadInput(f"cannot split domain {domain}: name one of 0-{len(partition.domains) - 1} of a partition that is not random")
    old = partition.domains[domain]
    if not 2 <= parts <= old.documents:
        raise BadCorpus(f"{parts} parts of {old.documents} documents: 2 parts or more are needed, and each needs a document")
    if missing := [shard for shard in (*old.train, *old.holdout) if not store.has(shard.blob)]:
        raise BadInput(f"domain {old.name!r} cannot be split here: {len(missing)} of its shards of text stayed with their owner")
    key = fingerprint("split", RULES, partition.digest, domain, parts, rng_seed)
    others = _readable(partition.domains[:domain] + partition.domains[domain + 1 :], store)
    with store.held(key) as work:
        if done := store.done(key):
            return store.load(done, Partition)
        ground = Ground(store, work, partition.embedder, means)
        grown = grow(ground, old.train, old.holdout, parts, partition.method, rng_seed, others, progress)
        places = [*range(domain), len(partition.domains), *range(domain + 1, len(partition.domains))]
        places += range(len(partition.domains) + 1, len(partition.domains) + parts)
        made = _revised(partition, grown, domain, places, partition.corpus, store)
        store.finish(key, made)
        return made


def add(
    partition: Partition,
    corpus: Corpus,
    store: Store,
    *,
    domains: int = 1,
    rng_seed: int = 0,
    means: Means = ALONE,
    progress: Progress = silent,
) -> Partition:
    """Let a corpus bring new domains, which come after the last; no document goes to an old one. Raises BadInput, BadCorpus."""
    count = sum(shard.documents for shard in corpus.train)
    if not 1 <= domains <= count:
        raise BadCorpus(f"{domains} domains of {count} training documents: each needs at least one; ask for fewer, or add documents")
    key = fingerprint("add", RULES, partition.digest, corpus.digest, domains, rng_seed)
    with store.held(key) as work:
        if done := store.done(key):
            return store.load(done, Partition)
        ground = Ground(store, work, partition.embedder, means)
        grown = grow(
            ground, corpus.train, corpus.holdout, domains, partition.method, rng_seed, _readable(partition.domains, store), progress
        )
        made = _revised(partition, grown, None, [*range(len(partition.domains) + domains)], corpus.digest, store)
        store.finish(key, made)
        return made


def heirs(old: Partition, new: Partition, store: Store) -> list[tuple[int, ...]]:
    """For each domain of a partition, the places in a later revision of it where its expert serves [K].

    One place for a domain that stayed; all of its parts for one that was split, until they have experts of their own.
    Raises ForeignExpert when `new` does not come from `old`.
    """
    places = [(place, place) for place in range(len(new.domains))]  # (in new, in the ancestor)
    step = new
    while step.digest != old.digest:
        if step.parent is None:
            raise ForeignExpert(
                f"partition {new.digest[:8]} does not come from {old.digest[:8]}: their domains have nothing to do with each other"
            )
        places = [(place, origin) for place, now in places if (origin := step.domains[now].origin) is not None]
        step = store.load(step.parent, Partition)
    return [tuple(place for place, origin in places if origin == domain) for domain in range(len(old.domains))]


def serving(partition: Partition, trained: Sequence[tuple[str | None, int | None]], store: Store) -> list[tuple[int, ...]]:
    """The domains that each expert serves, by the partition and the domain it was trained on.

    A domain is served by experts of its own; while it has none, by those of the domain it came out of, and so on back. So an
    expert of a domain that was split serves all parts, then those without experts, and none in the end.
    Raises ForeignExpert for one of no domain, or of a partition that this one does not come from.
    """
    served: list[list[int]] = [[] for _ in trained]
    vacant = {place: place for place in range(len(partition.domains))}  # here -> in the ancestor
    strangers = {digest for digest, _ in trained}
    step = partition
    while True:
        strangers.discard(step.digest)
        for place, there in vacant.items():
            for e, one in enumerate(trained):
                if one == (step.digest, there):
                    served[e].append(place)
        taken = {place for places in served for place in places}
        if step.parent is None or not strangers:
            break
        vacant = {p: origin for p, there in vacant.items() if p not in taken and (origin := step.domains[there].origin) is not None}
        step = store.load(step.parent, Partition)
    for digest, domain in trained:
        if digest in strangers or domain is None:
            where = "no domain" if domain is None else f"partition {(digest or 'none')[:8]}"
            raise ForeignExpert(f"an expert is of {where}, the forest's partition is {partition.digest[:8]}: leave it out, or retrain it")
    return [tuple(places) for places in served]


# ---- inside ----------------------------------------------------------------------------------------------------------


def _readable(domains: Sequence[Domain], store: Store) -> tuple[Domain, ...]:
    """Domains without the shards that stayed with their owner: names of new ones are told from the text that is here."""
    return tuple(one.model_copy(update={"train": tuple(shard for shard in one.train if store.has(shard.blob))}) for one in domains)


def _revised(old: Partition, grown: NewDomains, domain: int | None, places: Sequence[int], corpus: str, store: Store) -> Partition:
    """Old domains and new ones, in the order of places: those of the old, then of the new."""
    old_KD, old_KV = _saved(old, store)
    domains = [place_of.model_copy(update={"origin": place}) for place, place_of in enumerate(old.domains)]
    domains += [new.model_copy(update={"origin": domain}) for new in grown.domains]
    sparse_KV = None if old_KV is None or grown.sparse_KV is None else sparse.csr_matrix(sparse.vstack([old_KV, grown.sparse_KV]))[places]
    return old.model_copy(
        update={
            "corpus": corpus,
            "centroids": _save(np.concatenate([old_KD, grown.clusters.centroid_KD])[places], sparse_KV, store),
            "domains": tuple(domains[place] for place in places),
            "fit_sizes": tuple((*old.fit_sizes, *grown.clusters.sizes)[place] for place in places),
            "greedy_sizes": tuple((*old.greedy_sizes, *grown.greedy_sizes)[place] for place in places),
            "extra": {"objective": grown.clusters.objective},
            "parent": old.digest,
        }
    )


def _save(centroid_KD: Floats, sparse_KV: sparse.csr_matrix | None, store: Store) -> str:
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


def _saved(partition: Partition, store: Store) -> tuple[Floats, sparse.csr_matrix | None]:
    """What `_save` stored: centroids [K, D] float32 and [K, V]."""
    tensors = safetensors.numpy.load_file(store.get(partition.centroids))
    if "sparse_values" not in tensors:
        return tensors["centroids"], None
    shape = len(tensors["centroids"]), int(tensors["sparse_columns"][0])
    values = tensors["sparse_values"].astype(np.float64)
    return tensors["centroids"], sparse.csr_matrix((values, tensors["sparse_terms"], tensors["sparse_starts"]), shape=shape)
