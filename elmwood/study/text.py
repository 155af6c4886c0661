"""Text: read a corpus, discover its domains, revise them, and count which domains other text belongs to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np

from elmwood.corpus.build import Means as BuildMeans
from elmwood.corpus.build import build as build_corpus
from elmwood.corpus.build import parse_memory
from elmwood.corpus.read import Reading, places, read
from elmwood.domains import partition as partitions
from elmwood.domains import publish
from elmwood.domains.embed import find_model, has_domains
from elmwood.domains.grow import Means
from elmwood.engine import Progress, placed, silent
from elmwood.errors import BadInput
from elmwood.ranges import Between, Count, RngSeed, checked
from elmwood.records import Corpus, Partition, Record, Seed
from elmwood.report.notebook import grid
from elmwood.store import AnyStore, Named, Store
from elmwood.study.routers import find_domains

R = TypeVar("R", bound=Record)


class Revision(NamedTuple):
    """A partition that revises another, and what changed."""

    partition: Partition
    parent: Partition
    domains: tuple[int, ...]  # of the new partition: the parts of the domain that was split, or the domains that were added

    @property
    def record(self) -> Partition:
        return self.partition

    def _repr_html_(self) -> str | None:
        return self.partition._repr_html_()


class Survey(NamedTuple):
    """Which domains of a partition some text belongs to."""

    partition: Partition
    counted: publish.SurveyCounts
    rejected: Mapping[str, int]  # documents and files left out, by reason
    unread: Mapping[str, str]  # the first file of each reason that concerns whole files

    def to_dict(self) -> dict[str, Any]:
        """Counts, and histograms of squared distance, as JSON takes them."""
        counted = self.counted
        domains = [
            {
                "name": domain.name,
                "documents": int(counted.documents_K[k]),
                "bytes": int(counted.bytes_K[k]),
                "far": int(counted.far_K[k]),
                "nearest": list(counted.nearest_K[k]),
                "examples": list(domain.examples),
                **self._histogram(counted.near_KB[k]),
            }
            for k, domain in enumerate(self.partition.domains)
        ]
        return {
            "partition": self.partition.digest,
            "documents": int(counted.documents_K.sum()),
            "wordless": counted.wordless,
            "far": int(counted.far_K.sum()),
            "left_out": dict(self.rejected),
            "unread": dict(self.unread),
            "edges": counted.edge_B.tolist(),
            **self._histogram(counted.near_KB.sum(0)),
            "domains": domains,
        }

    def _repr_html_(self) -> str:
        found = zip(self.partition.domains, self.counted.documents_K, self.counted.bytes_K, self.counted.far_K, strict=True)
        rows = [(domain.name, f"{documents:,}", f"{size:,}", f"{far:,}") for domain, documents, size, far in found]
        return grid(("domain", "documents", "bytes", "nearer to no words"), rows, "Domains that these documents belong to")

    def _histogram(self, near_B: np.ndarray) -> dict[str, Any]:
        found = publish.quantiles(near_B, self.counted.edge_B)
        return {"histogram": near_B.tolist(), "quantiles": found and dict(zip(map(str, publish.QUANTILES), found, strict=True))}


def build(
    sources: str | Sequence[str], store: AnyStore = None, *, holdout: float = 0.1, field: str = "text", encoding: str = "utf-8",
    follow_links: bool = False, largest_document: int | str = "64M", filters: str = "", memory: int | str = "2G",
    workers: Count = 1, engine: str = "local", name: str | None = None, progress: Progress = silent,
) -> Corpus:  # fmt: skip
    """Read sources, drop duplicates, set a share of the documents aside as holdout. Raises BadInput, BadCorpus, DoesNotFit."""
    store = open_store(store, name)
    reading = Reading.of(field, encoding, follow_links, largest_document, filters)
    means = BuildMeans(workers, engine, parse_memory(memory))
    corpus = build_corpus(as_sources(sources), store, holdout=holdout, reading=reading, means=means, progress=progress)
    return keep_name(corpus, name, store)


@placed
@checked
def cluster(
    corpus: Corpus | str | Sequence[str], store: AnyStore = None, *, domains: Count = 8, embedder: str = "tfidf",
    embedder_model: str | None = None, method: str = "balanced", rounds: Count = 4, router_tokens: int | str = "200k",
    holdout: float = 0.1, field: str = "text", encoding: str = "utf-8", follow_links: bool = False,
    largest_document: int | str = "64M", filters: str = "", memory: int | str = "2G", rng_seed: RngSeed = 0,
    workers: Count = 1, engine: str = "local", name: str | None = None, device: str | None = None, progress: Progress = silent,
) -> Partition:  # fmt: skip
    """Read a corpus (sources, or a corpus that was built) and divide it into domains. `rounds` and `router_tokens` are of the embedder
    `routers` (study/routers.py). Raises BadCorpus, BadInput, DoesNotFit."""
    store = open_store(store, name)
    model = find_model(embedder, embedder_model, store)
    reading = Reading.of(field, encoding, follow_links, largest_document, filters)
    built = _built(corpus, store, holdout, reading, BuildMeans(workers, engine, parse_memory(memory)), progress)
    means = Means(workers, engine)
    if has_domains(embedder):
        made = find_domains(
            built, store.load(embedder_model or "", Seed), store, domains=domains, rounds=rounds, tokens=router_tokens, method=method,
            rng_seed=rng_seed, means=means, progress=progress,
        )  # fmt: skip
        return keep_name(made, name, store)
    fitted = partitions.fit_embedder(built, store, embedder, model=model, rng_seed=rng_seed, progress=progress) if model else embedder
    made = partitions.partition(
        built, store, domains=domains, embedder=fitted, method=method, rng_seed=rng_seed, means=means, progress=progress
    )
    return keep_name(made, name, store)


@placed
@checked
def split(
    partition: Named, domain: int | str, store: AnyStore = None, *, parts: Annotated[int, Between(2)] = 2, rng_seed: RngSeed = 0,
    name: str | None = None, device: str | None = None, progress: Progress = silent,
) -> Revision:  # fmt: skip
    """Split one domain, by number or name, into several. The experts of the other domains stay valid. Raises BadInput, BadCorpus."""
    store = open_store(store, name)
    parent = open_partition(partition, store)
    number = find_domain(domain, parent)
    made = partitions.split(parent, number, store, parts=parts, rng_seed=rng_seed, progress=progress)
    return Revision(keep_name(made, name, store), parent, partitions.heirs(parent, made, store)[number])


@placed
@checked
def add(
    partition: Named, corpus: Corpus | str | Sequence[str], store: AnyStore = None, *, domains: Count = 1, holdout: float = 0.1,
    field: str = "text", encoding: str = "utf-8", follow_links: bool = False, largest_document: int | str = "64M", filters: str = "",
    memory: int | str = "2G", rng_seed: RngSeed = 0, workers: Count = 1, engine: str = "local", name: str | None = None,
    device: str | None = None, progress: Progress = silent,
) -> Revision:  # fmt: skip
    """Add new domains from a corpus. The experts of the old domains stay valid. Raises BadInput, BadCorpus, DoesNotFit."""
    store = open_store(store, name)
    parent = open_partition(partition, store)
    reading = Reading.of(field, encoding, follow_links, largest_document, filters)
    built = _built(corpus, store, holdout, reading, BuildMeans(workers, engine, parse_memory(memory)), progress)
    means = Means(workers, engine)
    made = partitions.add(parent, built, store, domains=domains, rng_seed=rng_seed, means=means, progress=progress)
    return Revision(keep_name(made, name, store), parent, tuple(range(len(parent.domains), len(made.domains))))


@placed
def survey(
    corpus: str | Sequence[str], partition: Named, store: AnyStore = None, *, field: str = "text", encoding: str = "utf-8",
    follow_links: bool = False, largest_document: int | str = "64M", filters: str = "", name: str | None = None,
    device: str | None = None, progress: Progress = silent,
) -> Survey:  # fmt: skip
    """Count which domains of a partition these documents belong to, and how near they are. Nothing is kept of the text.
    `name` is given to the partition. Raises BadInput, BadCorpus."""
    store = open_store(store, name)
    division = open_partition(partition, store)
    rejected: Counter[str] = Counter()
    reading = Reading.of(field, encoding, follow_links, largest_document, filters)
    found = chain.from_iterable(read(source, rejected, reading=reading) for source in as_sources(corpus))
    counted = publish.survey(division, store, found, progress=progress)
    return Survey(keep_name(division, name, store), counted, dict(rejected), places(rejected))


def open_partition(given: Named, store: Store) -> Partition:
    """A partition by its name or digest, or from a folder written by `export`, which is taken into the store."""
    if isinstance(given, str) and Path(given).is_dir():
        return publish.receive(Path(given), store)
    return store.load(given, Partition)


def _built(
    corpus: Corpus | str | Sequence[str], store: Store, holdout: float, reading: Reading, means: BuildMeans, progress: Progress
) -> Corpus:
    """A corpus that was built, or one of these sources."""
    if isinstance(corpus, Corpus):
        return corpus
    return build_corpus(as_sources(corpus), store, holdout=holdout, reading=reading, means=means, progress=progress)


def find_domain(domain: int | str, partition: Partition) -> int:
    """The number of a domain given by its number or its name. Raises BadInput."""
    names = [one.name for one in partition.domains]
    if domain in names:
        return names.index(str(domain))
    if not str(domain).isdecimal():
        raise BadInput(f"no domain is called {domain!r}: name one of {', '.join(names)}, or its number")
    return int(domain)


def as_sources(given: str | Sequence[str]) -> Sequence[str]:
    """One source, or several."""
    return [given] if isinstance(given, str) else given


def open_store(store: AnyStore, name: str | None) -> Store:
    """The store of a verb whose result gets this name, which is checked before any work. Raises UnknownName."""
    opened = Store(store)
    if name:
        opened.check_name(name)
    return opened


def keep_name(record: R, name: str | None, store: Store) -> R:
    """Give a record its name, if it gets one, and return it. Raises UnknownName."""
    if name:
        store.name(name, record.digest)
    return record
