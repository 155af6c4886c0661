"""Text -> unit vectors, by tf-idf and truncated SVD (c-BTM, arXiv:2303.14177).

Shapes: N documents, W words of all of them together, V rows of the term table, D dimensions.

The embedding of a text is normalise(sum over its words of weight_V[w] * vector_VD[w]): the tf-idf norm cancels, so a
prefix costs one more addition per word (see route.py).
"""

import hashlib
import heapq
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

from elmwood.domains.words import words
from elmwood.engine import Progress, silent
from elmwood.errors import BadCorpus
from elmwood.records import Embedder
from elmwood.registry import lookup
from elmwood.store import Store

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

VOCABULARY = 1 << 16  # terms kept, or buckets hashed into
SAMPLE = 20_000  # documents the SVD is fitted on
LONGEST = 100_000  # characters of a document that the fit looks at
COUNTED = 1 << 21  # terms counted at once before rare ones are forgotten
REMEMBERED = 1 << 20  # spellings remembered by an index
BATCH = 256  # documents embedded at once


class Index(dict[str, int]):
    """Spelling -> row of the term table; -1 where there is none. Remembers what it has worked out."""

    def __init__(self, row: Callable[[str], int]):
        super().__init__()
        self.row = row

    def __missing__(self, word: str) -> int:
        if len(self) >= REMEMBERED:
            self.clear()
        self[word] = row = self.row(word.lower())
        return row

    def rows(self, found: Sequence[str]) -> Ints:
        """Rows of words [W]."""
        return np.fromiter(map(self.__getitem__, found), np.int64, len(found))


def bucket(word: str, buckets: int) -> int:
    """The bucket a word is hashed to; the same on every machine."""
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) % buckets


@dataclass(frozen=True, eq=False)
class Terms:
    """A fitted tf-idf embedder: a weight and a vector for each term, or for each bucket of hashed terms."""

    name: str
    terms: tuple[str, ...]  # empty where terms are hashed
    weight_V: Floats  # inverse document frequency
    vector_VD: Floats  # right singular vectors; the last row is zero, for words that are not known
    index: Index

    @property
    def dimension(self) -> int:
        return self.vector_VD.shape[1]

    def rows(self, text: str) -> Ints:
        """Rows of a text's words [W]; -1 for words that are not known."""
        return self.index.rows(words(text))

    def embed(self, texts: Sequence[str]) -> Floats:
        """Unit rows [N, D] float32; a zero row for a text without a known word."""
        parts = [self._embed(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dimension), np.float32)

    def _embed(self, texts: Sequence[str]) -> Floats:
        rows = [self.rows(text) for text in texts]
        start_N = np.cumsum([0, *map(len, rows)])
        row_W = np.concatenate(rows)
        matrix_NV = sparse.csr_matrix((np.ones(len(row_W)), row_W % len(self.vector_VD), start_N), shape=(len(texts), len(self.vector_VD)))
        return unit(matrix_NV @ self.table_VD).astype(np.float32)

    @cached_property
    def table_VD(self) -> Floats:
        """What each word adds, float64 [V, D]."""
        return self.weight_V.astype(np.float64)[:, None] * self.vector_VD

    def save(self, store: Store) -> Embedder:
        """Write the files; what `load` reads back embeds the same."""
        tensors = safetensors.numpy.save({"weight": self.weight_V, "vectors": self.vector_VD})
        about = json.dumps({"name": self.name, "terms": self.terms}, ensure_ascii=False).encode()
        files = {"embedder.safetensors": store.put(tensors), "embedder.json": store.put(about)}
        return Embedder(name=self.name, dimension=self.dimension, files=files)


def unit(x_ND: Floats) -> Floats:
    """Rows scaled to length one; zero rows stay zero."""
    norm_N = np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND))
    return x_ND / np.where(norm_N > 0, norm_N, 1)[:, None]


def load(embedder: Embedder, store: Store) -> Terms:
    """Open a saved embedder."""
    lookup(EMBEDDERS, embedder.name, "embedder")
    about = json.loads(store.get(embedder.files["embedder.json"]).read_bytes())
    tensors = safetensors.numpy.load_file(store.get(embedder.files["embedder.safetensors"]))
    return _terms(embedder.name, tuple(about["terms"]), tensors["weight"], tensors["vectors"])


def fit(name: str, texts: Iterable[str], *, dimension: int = 100, rng_seed: int = 0, progress: Progress = silent) -> Terms:
    """Fit an embedder of the table in one pass over texts. Raises BadCorpus when no text has a word."""
    return lookup(EMBEDDERS, name, "embedder")(texts, dimension, rng_seed, progress)


def _terms(name: str, terms: tuple[str, ...], weight_V: Floats, vector_VD: Floats) -> Terms:
    buckets = len(weight_V) - 1
    if name == "hashing":
        return Terms(name, terms, weight_V, vector_VD, Index(lambda word: bucket(word, buckets)))
    row = {term: place for place, term in enumerate(terms)}
    return Terms(name, terms, weight_V, vector_VD, Index(lambda word: row.get(word, -1)))


def fit_tfidf(texts: Iterable[str], dimension: int, rng_seed: int, progress: Progress) -> Terms:
    """Terms in at least two documents, the most widespread first, up to VOCABULARY of them."""
    count: Counter[str] = Counter()
    documents = 0
    sample = Sample()
    for text in _each(texts, progress):
        documents += 1
        sample.add(text)
        count.update({word.lower() for word in words(text[:LONGEST])})
        if len(count) > COUNTED:
            count = Counter({word: n for word, n in count.items() if n > 1})
    least = 2 if any(n > 1 for n in count.values()) else 1
    kept = sorted((-n, word) for word, n in count.items() if n >= least)[:VOCABULARY]
    if not kept:
        raise BadCorpus(f"no words in {documents} documents: an embedder needs text; check the corpus and its field")
    terms = tuple(sorted(word for _, word in kept))
    df_V = np.array([count[term] for term in terms], np.float64)
    return _finish("tfidf", terms, df_V, documents, sample, dimension, rng_seed)


def fit_hashing(texts: Iterable[str], dimension: int, rng_seed: int, progress: Progress) -> Terms:
    """The same with terms hashed to VOCABULARY buckets: no list of words leaves the machine."""
    index = Index(lambda word: bucket(word, VOCABULARY))
    df_V = np.zeros(VOCABULARY)
    documents = 0
    sample = Sample()
    for text in _each(texts, progress):
        documents += 1
        sample.add(text)
        df_V[np.unique(index.rows(words(text[:LONGEST])))] += 1
    if not df_V.any():
        raise BadCorpus(f"no words in {documents} documents: an embedder needs text; check the corpus and its field")
    return _finish("hashing", (), df_V, documents, sample, dimension, rng_seed)


def _each(texts: Iterable[str], progress: Progress) -> Iterator[str]:
    for done, text in enumerate(texts, 1):
        yield text
        if done % 500 == 0:
            progress("fit embedder", done, 0, "documents")


class Sample:
    """The texts with the smallest hashes: a sample that does not depend on their order."""

    def __init__(self) -> None:
        self.heap: list[tuple[bytes, str]] = []

    def add(self, text: str) -> None:
        item = (
            bytes(255 - byte for byte in hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()),
            text[:LONGEST],
        )
        if len(self.heap) < SAMPLE:
            heapq.heappush(self.heap, item)
        elif item > self.heap[0]:
            heapq.heapreplace(self.heap, item)

    def texts(self) -> list[str]:
        return [text for _, text in sorted(self.heap)]


def _finish(name: str, terms: tuple[str, ...], df_V: Floats, documents: int, sample: Sample, dimension: int, rng_seed: int) -> Terms:
    """Weights from document frequencies, vectors from the SVD of the sample's unit tf-idf rows."""
    weight_V = np.where(df_V > 0, np.log((1 + documents) / (1 + df_V)) + 1, 0)
    weight_V = np.append(weight_V, 0).astype(np.float32)
    bare = _terms(name, terms, weight_V, np.zeros((len(weight_V), 1), np.float32))
    x_NV = tfidf(bare, sample.texts())
    dimension = min(dimension, *x_NV.shape)
    _, _, vector_DV = randomized_svd(x_NV, dimension, random_state=rng_seed)
    return _terms(name, terms, weight_V, np.ascontiguousarray(vector_DV.T, np.float32))


def tfidf(fitted: Terms, texts: Iterable[str]) -> sparse.csr_matrix:
    """Unit tf-idf rows [N, V]; zero rows for texts without a known word."""
    rows = [fitted.rows(text) for text in texts]
    start_N = np.cumsum([0, *map(len, rows)])
    row_W = np.concatenate(rows) % len(fitted.weight_V)
    x_NV = sparse.csr_matrix((fitted.weight_V[row_W].astype(np.float64), row_W, start_N), shape=(len(rows), len(fitted.weight_V)))
    x_NV.sum_duplicates()
    norm_N = sparse.linalg.norm(x_NV, axis=1)
    return sparse.csr_matrix(sparse.diags(1 / np.where(norm_N > 0, norm_N, 1)) @ x_NV)


EMBEDDERS: dict[str, Callable[[Iterable[str], int, int, Progress], Any]] = {
    "tfidf": fit_tfidf,  # arXiv:2303.14177
    "hashing": fit_hashing,  # the same without a vocabulary
}
