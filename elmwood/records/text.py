"""Records of text: shards, corpora, tokens and partitions."""

from typing import Literal

from elmwood.records.base import Blob, Digest, Files, Frozen, Record


class Shard(Frozen):
    """Documents in one Parquet file (zstd; columns id, text, meta)."""

    blob: Blob
    documents: int
    bytes: int  # of UTF-8 text


class Corpus(Record):
    """Documents read, cleaned of duplicates and split by content hash. Nobody trains on the holdout."""

    kind: Literal["corpus"] = "corpus"
    train: tuple[Shard, ...]
    holdout: tuple[Shard, ...]
    documents: int
    bytes: int
    holdout_share: float
    rejected: dict[str, int] = {}  # reason -> documents (or lines) left out
    licences: tuple[str, ...] = ()


class Packing(Record):
    """The tokens of shards under one tokenizer: little-endian memory maps, made once and found again."""

    kind: Literal["packing"] = "packing"
    shards: tuple[Blob, ...]
    tokenizer: Blob  # tokenizer.json
    separator: int  # token id that stands before each document
    tokens: tuple[Blob, ...]  # uint16 or uint32 [T]; none where there are no documents
    starts: tuple[Blob, ...]  # int64 [documents], where each begins
    dtype: Literal["<u2", "<u4"]
    count: int  # T


class Embedder(Frozen):
    """A fitted embedder: a row of the table of embedders, its settings and its files (safetensors + JSON)."""

    name: str
    dimension: int
    files: Files


class Domain(Frozen):
    """One discovered cluster. Its place in the partition is the row of its centroid."""

    name: str
    terms: tuple[str, ...] = ()
    train: tuple[Shard, ...] = ()
    holdout: tuple[Shard, ...] = ()
    examples: tuple[str, ...] = ()  # ids of the documents nearest the centroid
    origin: int | None = None  # its place in the partition's parent, if it was there or came out of one that was

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.train)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.train)


class Partition(Record):
    """All domains of a corpus, with the embedder and the centroids (c-BTM, arXiv:2303.14177)."""

    kind: Literal["partition"] = "partition"
    corpus: Digest
    embedder: Embedder
    centroids: Blob  # safetensors: "centroids" [K, D] float32
    domains: tuple[Domain, ...]
    method: str = "balanced"  # balanced | plain | random
    rng_seed: int = 0
    fit_sizes: tuple[int, ...] = ()  # documents per domain at the fit, where balance holds
    greedy_sizes: tuple[int, ...] = ()  # the same training documents, had each gone to its nearest centroid
    extra: dict[str, float] = {}  # measured facts, e.g. objective
    parent: Digest | None = None  # the partition this one revises: a domain was split, or domains were added
