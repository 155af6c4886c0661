"""Records of text: shards, corpora, tokens and partitions."""

from typing import Literal

from pydantic import Field

from elmwood.records.base import Blob, Digest, Files, Frozen, Record


class Shard(Frozen):
    """Documents in one Parquet file (zstd; columns id, text, meta)."""

    blob: Blob
    documents: int = Field(ge=0)
    bytes: int = Field(ge=0)  # of UTF-8 text


class Corpus(Record):
    """Documents without duplicates, split by a hash of their content. No model trains on the holdout."""

    kind: Literal["corpus"] = "corpus"
    train: tuple[Shard, ...]
    holdout: tuple[Shard, ...]
    documents: int
    bytes: int
    holdout_share: float
    rejected: dict[str, int] = {}  # reason -> number of documents (or lines, or files) left out
    unread: dict[str, str] = {}  # reason that concerns whole files -> the first of these, and where in it
    licences: tuple[str, ...] = ()


class Packing(Record):
    """The tokens of shards under one tokenizer, as little-endian arrays for memory mapping."""

    kind: Literal["packing"] = "packing"
    shards: tuple[Blob, ...]
    tokenizer: Blob  # tokenizer.json
    separator: int = Field(ge=0)  # token id before each document
    tokens: tuple[Blob, ...]  # one array, uint16 or uint32 [T]; empty without documents
    starts: tuple[Blob, ...]  # one array, int64 [documents]: where each begins; empty without documents
    dtype: Literal["<u2", "<u4"]
    count: int  # T


class Embedder(Frozen):
    """A fitted embedder: a row of the table of embedders or a module:function, and its files (safetensors and JSON)."""

    name: str
    dimension: int = Field(gt=0)
    files: Files


class Domain(Frozen):
    """A cluster of documents. Its index in the partition is the row of its centroid."""

    name: str
    terms: tuple[str, ...] = ()
    train: tuple[Shard, ...] = ()
    holdout: tuple[Shard, ...] = ()
    examples: tuple[str, ...] = ()  # ids of the documents nearest the centroid
    origin: int | None = None  # index of it, or of the domain it was split from, in the partition's parent; None: it is new

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
    fit_sizes: tuple[int, ...] = ()  # clustered documents per domain, which differ by at most one if balanced
    greedy_sizes: tuple[int, ...] = ()  # training documents per domain if each went to its nearest centroid
    extra: dict[str, float] = {}  # measurements, such as the objective
    parent: Digest | None = None  # the partition that this one revises by a split or by new domains
