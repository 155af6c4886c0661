"""Partitions: make one from a corpus, use it, and revise it while its other domains stay as they are.

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
from elmwood.domains.cluster import MANY
from elmwood.domains.dense import Model
from elmwood.domains.distances import Centroids, Sparse, distances
from elmwood.domains.grow import Means, NewDomains, Setup, grow
from elmwood.engine import Progress, silent
from elmwood.errors import BadCorpus, BadInput, BadRecord, ForeignExpert
from elmwood.records import Corpus, Domain, Embedder, Partition, fingerprint
from elmwood.store import Store
from elmwood.store.disk import write_whole
from elmwood.store.headers import load_arrays

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

RULES = 5  # increased when the same inputs would make a different partition
METHODS = ("balanced", "plain", "random")
KEPT = 4096  # terms of a sparse centroid, at most
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

    `embedder` is the name of an embedder of words, which is fitted here, or a fitted embedder (fit_embedder). The same inputs are
    divided once; an interrupted run resumes at its shard. Raises BadCorpus, BadInput.
    """
    if method not in METHODS:
        raise BadInput(f"no clustering method {method!r}; have {', '.join(METHODS)}")
    count = sum(shard.documents for shard in corpus.train)
    if not 1 <= domains <= count:
        raise BadCorpus(f"{domains} domains of {count} training documents: each needs at least one; use fewer domains, or add documents")
    if isinstance(embedder, Embedder) and embed.has_domains(embedder.name) and domains != embedder.dimension:
        raise BadInput(f"{domains} domains: this embedder has {embedder.dimension} router LMs, each with a domain of its own")
    key = fingerprint("partition", _rules(method, domains), corpus.digest, domains, embedder, None, method, rng_seed)
    with store.held(key, progress) as work:
        if done := store.done(key):
            return store.load(done, Partition)
        started = time.perf_counter()
        if isinstance(embedder, str):
            embedder = fit_embedder(corpus, store, embedder, rng_seed=rng_seed, progress=progress)
        setup = Setup(store, work, embedder, means)
        grown = grow(setup, corpus.train, corpus.holdout, domains, method, rng_seed, progress=progress)
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
    """Fit an embedder on the training documents, once. One by a model needs it (embed.find_model).
    Raises UnknownName, BadInput, BadCorpus."""
    path = store.work(fingerprint("embedder", RULES, corpus.digest, name, model and model.name, rng_seed)) / "embedder.json"
    if path.exists():
        found = Embedder.model_validate_json(path.read_bytes())
        if all(store.has(blob) for blob in found.files.values()):
            return found
    texts = (document.text for document in documents(corpus.train, store))
    made = embed.fit(name, texts, model=model, rng_seed=rng_seed, progress=progress).save(store)
    write_whole(path, made.model_dump_json().encode())
    return made


# ---- using a partition: this needs its record, centroids and embedder, and no text of the corpus -----------------------


def centroids(partition: Partition, store: Store, signal: str = "dense") -> Centroids:
    """The centroids for a router: "dense" [K, D] float32, or "sparse". Raises BadInput."""
    centroid_KD, sparse_KV = _load(partition, store)
    if signal != "sparse":
        return centroid_KD
    if sparse_KV is None:
        raise BadInput(f"this partition embeds with {partition.embedder.name!r}, which has no sparse centroids: choose another router")
    return Sparse.of(sparse_KV)


def assign(partition: Partition, store: Store, texts: Sequence[str]) -> tuple[Ints, Floats]:
    """The nearest domain of each text [N] and its squared distances to all [N, K]."""
    dist2_NK = distances(embed.load(partition.embedder, store), centroids(partition, store), texts)
    return dist2_NK.argmin(1), dist2_NK


# ---- revising one ----------------------------------------------------------------------------------------------------
# A domain that is not split keeps its index, centroid, name and shards, so its expert stays valid. The embedder stays too: it does
# not learn new words.


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
    """Split one domain into parts. The first takes its index, the others come after the last domain. Raises BadInput, BadCorpus."""
    _check_revisable(partition)
    if not 0 <= domain < len(partition.domains) or partition.method == "random":
        raise BadInput(
            f"cannot split domain {domain}: choose one from 0 to {len(partition.domains) - 1}, of a partition that is not random"
        )
    old = partition.domains[domain]
    if not 2 <= parts <= old.documents:
        raise BadCorpus(f"{parts} parts of {old.documents} documents: choose at least 2 parts, with at least one document each")
    if missing := [shard for shard in (*old.train, *old.holdout) if not store.has(shard.blob)]:
        raise BadInput(f"domain {old.name!r} cannot be split here: {len(missing)} of its shards of text stayed with their owner")
    key = fingerprint("split", _rules(partition.method, parts), partition.digest, domain, parts, rng_seed)
    others = _with_text(partition.domains[:domain] + partition.domains[domain + 1 :], store)
    with store.held(key, progress) as work:
        if done := store.done(key):
            return store.load(done, Partition)
        setup = Setup(store, work, partition.embedder, means)
        grown = grow(setup, old.train, old.holdout, parts, partition.method, rng_seed, others, progress)
        places = [*range(domain), len(partition.domains), *range(domain + 1, len(partition.domains))]
        places += range(len(partition.domains) + 1, len(partition.domains) + parts)
        made = _revise(partition, grown, domain, places, partition.corpus, store)
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
    """Add new domains from a corpus, after the last domain; no document goes to an old one. Raises BadInput, BadCorpus."""
    _check_revisable(partition)
    count = sum(shard.documents for shard in corpus.train)
    if not 1 <= domains <= count:
        raise BadCorpus(f"{domains} domains of {count} training documents: each needs at least one; use fewer domains, or add documents")
    key = fingerprint("add", _rules(partition.method, domains), partition.digest, corpus.digest, domains, rng_seed)
    with store.held(key, progress) as work:
        if done := store.done(key):
            return store.load(done, Partition)
        setup = Setup(store, work, partition.embedder, means)
        grown = grow(
            setup, corpus.train, corpus.holdout, domains, partition.method, rng_seed, _with_text(partition.domains, store), progress
        )
        made = _revise(partition, grown, None, [*range(len(partition.domains) + domains)], corpus.digest, store)
        store.finish(key, made)
        return made


def heirs(old: Partition, new: Partition, store: Store) -> list[tuple[int, ...]]:
    """For each domain of a partition, its domains in a later revision [K]: itself, or all of its parts if it was split.

    Raises ForeignExpert if `new` is not a revision of `old`.
    """
    places = [(place, place) for place in range(len(new.domains))]  # (in new, in the ancestor)
    step = new
    while step.digest != old.digest:
        if step.parent is None:
            raise ForeignExpert(f"partition {new.digest[:8]} does not come from {old.digest[:8]}: use a revision of it")
        places = [(place, origin) for place, now in places if (origin := step.domains[now].origin) is not None]
        step = store.load(step.parent, Partition)
    return [tuple(place for place, origin in places if origin == domain) for domain in range(len(old.domains))]


def serving(partition: Partition, trained: Sequence[tuple[str | None, int | None]], store: Store) -> list[tuple[int, ...]]:
    """The domains that each expert serves, by the partition and the domain it was trained on.

    A domain is served by its own experts; if it has none, by those of the domain it was split from, and so on. So the expert of a
    domain that was split serves those parts that have no experts of their own. Raises ForeignExpert for an expert without a domain,
    or of a partition that this one does not revise.
    """
    served: list[list[int]] = [[] for _ in trained]
    of_domain: dict[tuple[str | None, int | None], list[int]] = {}
    for e, one in enumerate(trained):
        of_domain.setdefault(one, []).append(e)
    vacant = {place: place for place in range(len(partition.domains))}  # here -> in the ancestor
    strangers = {digest for digest, _ in trained}
    step = partition
    while True:
        strangers.discard(step.digest)
        for place, there in vacant.items():
            for e in of_domain.get((step.digest, there), ()):
                served[e].append(place)
        taken = {place for places in served for place in places}
        if step.parent is None or not strangers:
            break
        vacant = {p: origin for p, there in vacant.items() if p not in taken and (origin := step.domains[there].origin) is not None}
        step = store.load(step.parent, Partition)
    for digest, domain in trained:
        if digest in strangers or domain is None:
            where = "no domain" if domain is None else f"partition {(digest or 'none')[:8]}"
            raise ForeignExpert(
                f"an expert is of {where}, and the forest's partition is {partition.digest[:8]}: leave it out, or train it again"
            )
    return [tuple(places) for places in served]


# ---- inside ----------------------------------------------------------------------------------------------------------


def _rules(method: str, domains: int) -> int | str:
    """Many balanced domains were once found at once, and are found in groups now: another partition."""
    return f"{RULES}, in groups" if method == "balanced" and domains > MANY else RULES


def _check_revisable(partition: Partition) -> None:
    if embed.has_domains(partition.embedder.name):
        raise BadInput(
            f"the domains of partition {partition.digest[:8]} are those of its router LMs, one each: cluster again with another --domains"
        )


def _with_text(domains: Sequence[Domain], store: Store) -> tuple[Domain, ...]:
    """Domains without the shards that stayed with their owner: names of new domains are compared with the text that is here."""
    return tuple(one.model_copy(update={"train": tuple(shard for shard in one.train if store.has(shard.blob))}) for one in domains)


def _revise(old: Partition, grown: NewDomains, domain: int | None, places: Sequence[int], corpus: str, store: Store) -> Partition:
    """The partition with the old and the new domains, selected by `places`, which count the old domains and then the new ones."""
    old_KD, old_KV = _load(old, store)
    domains = [domain_.model_copy(update={"origin": place}) for place, domain_ in enumerate(old.domains)]
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
    """Store dense centroids, and the KEPT largest terms of each sparse one; return the digest of the file."""
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


def _load(partition: Partition, store: Store) -> tuple[Floats, sparse.csr_matrix | None]:
    """Load what `_save` stored: centroids [K, D] float32 and [K, V]. Raises Damaged, BadRecord."""
    tensors = load_arrays(store.get(partition.centroids), "centroids")
    centroid_KD, wanted = tensors["centroids"], (len(partition.domains), partition.embedder.dimension)
    refused = BadRecord(f"partition {partition.digest[:8]} has {wanted[0]} domains in {wanted[1]} dimensions, and its centroids do not fit "
                        "them: fetch it again")  # fmt: skip
    if centroid_KD.shape != wanted or not np.isfinite(centroid_KD).all():
        raise refused
    if "sparse_values" not in tensors:
        return centroid_KD, None
    try:
        values, term_N, start_K = (tensors[f"sparse_{name}"] for name in ("values", "terms", "starts"))
        columns = int(tensors["sparse_columns"][0])
        if not 0 < columns <= embed.VOCABULARY or not np.isfinite(values).all() or term_N.dtype.kind + start_K.dtype.kind != "ii":
            raise refused
        centroid_KV = sparse.csr_matrix((values.astype(np.float64), term_N, start_K), shape=(wanted[0], columns))
        centroid_KV.check_format(full_check=True)
    except (KeyError, IndexError, ValueError) as error:
        raise refused from error
    return centroid_KD, centroid_KV
