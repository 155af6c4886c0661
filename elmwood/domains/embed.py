"""Text -> unit vectors, by tf-idf and truncated SVD (c-BTM, arXiv:2303.14177).

Shapes: N documents, W words of all of them together, V rows of the term table, D dimensions.

The embedding of a text is normalise(sum over its words of tf**power * weight_V[w] * vector_VD[w]). The norm of tf-idf cancels,
so each further word of a prefix is one addition (route.py). Words in every document have weight zero, so no list of stop words
is needed.

EMBEDDERS also lists the embedders by a model (dense.py). A function `module:function` of texts, as the user types it, is one more.
"""

import hashlib
import heapq
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from scipy import sparse

from elmwood.domains.dense import Dense, Encode, Model, Open, fit_dense, load_dense, open_files, open_sentence, router_lms, sentence_model
from elmwood.domains.words import Lexicon, complete_words
from elmwood.engine import Progress, silent
from elmwood.errors import BadCorpus, BadInput, BadRecord, UnknownName
from elmwood.records import Embedder, Seed
from elmwood.registry import lookup, trust, trusted
from elmwood.store import Store
from elmwood.threads import one_thread

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

VOCABULARY = 1 << 16  # terms kept, or buckets hashed into
SAMPLE = 20_000  # documents the SVD is fitted on
LOOKED_AT = 100_000  # characters of a document that the fit reads
COUNTED = 1 << 21  # terms counted at once; beyond that the rarest are dropped
DOCUMENTS, CHARACTERS = 256, 1 << 22  # embedded at once, at most


class Words(NamedTuple):
    """How an embedder of words counts."""

    hashed: bool  # terms are buckets of a hash: no list of words leaves the machine
    power: float  # of the term frequency
    smooth: float  # added to the inverse document frequency


class EmbedderRow(NamedTuple):
    """A row of the table of embedders: one of words, or one by a model."""

    source: str
    words: Words | None = None
    needs: str = ""  # what the user has to name with --embedder-model; empty: nothing
    find: Callable[[str, Store], Model] | None = None  # the model that the user named
    open: Open | None = None  # a saved model again
    by_token: bool = False  # the model gives a vector for each token (dense.py)
    has_domains: bool = False  # each dimension is a domain of its own, so nothing is clustered


def find_seed(named: str, store: Store) -> Model:
    """The seed of this name as the model of an embedder. Raises UnknownName."""
    digest = store.load(named, Seed).digest
    return Model(digest, open_seed(digest, store))


def open_seed(digest: str, store: Store) -> Encode:
    """The hidden states of a seed. Found by name, since this room comes before that of language models and is free of torch."""
    return lookup({}, "elmwood.lm.hidden_states:open_hidden_states")(digest, store)


def open_routers(name: str, store: Store) -> Encode:
    """The scores of router LMs, found by name as the hidden states of a seed are."""
    return lookup({}, "elmwood.lm.router_lms:open_router_lms")(router_lms(name, store), store)


EMBEDDERS: dict[str, EmbedderRow] = {
    "tfidf": EmbedderRow("square roots of counts as in Hellinger PCA, arXiv:1312.5542", Words(False, 0.5, 0.0)),
    "hashing": EmbedderRow("the same without a vocabulary, arXiv:0902.2206", Words(True, 0.5, 0.0)),
    "cbtm": EmbedderRow("the weights of the published code of arXiv:2303.14177", Words(False, 1.0, 1.0)),
    "seed": EmbedderRow("mean hidden state of the seed LM", None, "a seed", find_seed, open_seed, by_token=True),
    "sentence": EmbedderRow(
        "any sentence embedder, such as arXiv:1908.10084", None, "a sentence model's folder or hub id", sentence_model, open_sentence
    ),
    "routers": EmbedderRow(
        "likelihoods under tiny LMs trained by EM, arXiv:2410.03529",
        None,
        "a seed, whose shape the router LMs have",
        None,
        open_routers,
        by_token=True,
        has_domains=True,
    ),
}


@dataclass(frozen=True, eq=False)
class Terms:
    """A fitted embedder: a weight and a vector for each term, or for each bucket of hashed terms."""

    name: str
    terms: tuple[str, ...]  # empty where terms are hashed
    weight_V: Floats  # inverse document frequency
    vector_VD: Floats  # right singular vectors, up to one scale

    @property
    def dimension(self) -> int:
        return self.vector_VD.shape[1]

    @property
    def power(self) -> float:
        return _words(self.name).power

    @cached_property
    def lexicon(self) -> Lexicon:
        """Words -> rows."""
        return Lexicon(_bucket if _words(self.name).hashed else _rows_of(self.terms))

    @cached_property
    def table_VD(self) -> Floats:
        """What the first occurrence of each term adds [V, D]; float64, so that long sums agree on every machine."""
        return self.weight_V.astype(np.float64)[:, None] * self.vector_VD

    def embed(self, texts: Sequence[str]) -> Floats:
        """Unit rows [N, D] float32; a zero row for a text without a known word."""
        parts = [np.zeros((0, self.dimension), np.float32)]
        parts += [unit(_counts(self, group) @ self.table_VD).astype(np.float32) for group in _groups(texts)]
        return np.concatenate(parts)

    def known(self, text: str) -> tuple[Ints, Floats, Ints]:
        """Of each known word of a text: its row [W], how often it occurred before [W], the shortest prefix in which it counts [W]."""
        row_W, count_W = self.lexicon.steps(text)
        known_W = row_W >= 0
        return row_W[known_W], occurrences(row_W[known_W]), count_W[known_W]

    def rise(self, before_W: Floats) -> Floats:
        """By how much tf**power rises with one more occurrence of a word that had `before` of them [W]."""
        return (before_W + 1) ** self.power - before_W**self.power

    def steps(self, text: str) -> tuple[Floats, Ints]:
        """What each known word adds to the sum [W, D], and the length of the shortest prefix in which it counts [W]."""
        row_W, before_W, count_W = self.known(text)
        return self.table_VD[row_W] * self.rise(before_W)[:, None], count_W

    def counted(self, text: str) -> int:
        """The length of the prefix of a growing text that the embedding is of by now."""
        return len(complete_words(text))

    def tfidf(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """Unit tf-idf rows [N, V] float64; a zero row for a text without a known word."""
        x_NV = sparse.vstack([_counts(self, group) for group in _groups(texts)], format="csr")
        x_NV.data *= self.weight_V[x_NV.indices]
        norm_N = sparse.linalg.norm(x_NV, axis=1)
        x_NV.data /= np.repeat(np.where(norm_N > 0, norm_N, 1), np.diff(x_NV.indptr))
        return x_NV

    def save(self, store: Store) -> Embedder:
        """Write the files; what `load` reads back embeds the same."""
        tensors = {"weight": self.weight_V, "vectors": self.vector_VD}
        about = json.dumps({"name": self.name, "terms": self.terms}, ensure_ascii=False).encode()
        files = {"embedder.safetensors": store.put(safetensors.numpy.save(tensors)), "embedder.json": store.put(about)}
        return Embedder(name=self.name, dimension=self.dimension, files=files)


Fitted = Terms | Dense


def load(embedder: Embedder, store: Store) -> Fitted:
    """Open a saved embedder, and its model if it has one, as its row says.

    A module:function is called only if the user of this machine has typed it before: the record may come from somebody else.
    Raises UnknownName, BadRecord, Damaged.
    """
    if ":" in embedder.name:
        encode = trusted(embedder.name, "embedder")
        return load_dense(embedder, store, lambda *_: encode)
    if embedder.name not in EMBEDDERS:
        raise UnknownName(f"no embedder {embedder.name!r}; have {', '.join(EMBEDDERS)}: a newer elmwood may have it")
    row = EMBEDDERS[embedder.name]
    if row.words is None:
        return load_dense(embedder, store, row.open, row.by_token)  # type: ignore[arg-type]
    terms, tensors = open_files(embedder, store, "terms", "weight", "vectors")
    if not isinstance(terms, list) or not all(isinstance(term, str) for term in terms):
        raise BadRecord(f"embedder {embedder.name}: its terms are no list of words; download it again")
    fitted = Terms(embedder.name, tuple(terms), tensors["weight"], tensors["vectors"])
    rows = VOCABULARY if row.words.hashed else len(fitted.terms)
    if fitted.weight_V.shape != (rows,) or fitted.vector_VD.shape != (rows, embedder.dimension) or not np.isfinite(fitted.table_VD).all():
        raise BadRecord(f"embedder {embedder.name}: {rows} terms need {rows} finite weights and vectors; download it again")
    return fitted


def find_model(name: str, named: str | None, store: Store) -> Model | None:
    """The model of an embedder that the user typed: a row of EMBEDDERS, or `module:function`, which is then trusted.

    `named` is what the user typed for the row's model. None: the embedder has no model. Raises UnknownName, BadInput.
    """
    if ":" in name:
        return Model(name, trust(name, "embedder"))
    row: EmbedderRow = lookup(EMBEDDERS, name, "embedder")
    if named and not row.needs:
        others = " or ".join(other for other, one in EMBEDDERS.items() if one.needs)
        raise BadInput(f"embedder {name!r} needs no model: leave out --embedder-model, or use {others}")
    if row.needs and not named:
        raise BadInput(f"embedder {name!r} needs a model: name {row.needs} with --embedder-model")
    return row.find(named, store) if row.find and named else None


def has_domains(name: str) -> bool:
    """Whether the dimensions of an embedder are its domains."""
    return name in EMBEDDERS and EMBEDDERS[name].has_domains


def has_terms(name: str) -> bool:
    """Whether an embedder is one of words, so that its partitions have sparse centroids too."""
    return name in EMBEDDERS and EMBEDDERS[name].words is not None


def fit(
    name: str,
    texts: Iterable[str],
    *,
    model: Model | None = None,
    dimension: int = 100,
    rng_seed: int = 0,
    progress: Progress = silent,
) -> Fitted:
    """Fit a row of EMBEDDERS, or a module:function; one by a model needs it (find_model). Raises UnknownName, BadInput, BadCorpus."""
    row = EMBEDDERS.get(name)
    if row and row.words:
        return fit_terms(name, texts, dimension=dimension, rng_seed=rng_seed, progress=progress)
    if model is None:
        if row is None and ":" not in name:
            lookup(EMBEDDERS, name, "embedder")  # raises
        raise BadInput(f"embedder {name!r} needs a model, and got none: pass what find_model returns, or use 'tfidf'")
    by_token = row is not None and row.by_token
    return fit_dense(name, texts, model, by_token=by_token, dimension=dimension, rng_seed=rng_seed, progress=progress)


@one_thread
def fit_terms(name: str, texts: Iterable[str], *, dimension: int = 100, rng_seed: int = 0, progress: Progress = silent) -> Terms:
    """Fit an embedder of words in one pass over texts; their order does not matter, and memory is bounded.

    Terms of `tfidf` occur in at least two documents; the most widespread are kept. The SVD is of a sample of documents.
    Raises BadCorpus when no text has a word.
    """
    from sklearn.utils.extmath import randomized_svd  # takes two seconds, needed only here

    kind = _words(name)

    counted = _Counted(kind.hashed)
    sample = _Sample()
    for done, text in enumerate(texts, 1):
        counted.add(text[:LOOKED_AT])
        sample.add(text[:LOOKED_AT])
        if done % 500 == 0:
            progress("fit embedder", done, 0, "documents")
    terms, df_V = counted.terms()
    if not df_V.any():
        raise BadCorpus(f"no words in {counted.documents} documents: an embedder needs text; check the corpus and its --field")
    weight_V = np.where(df_V > 0, np.log((1 + counted.documents) / np.maximum(df_V, 1)) + kind.smooth, 0).astype(np.float32)
    bare = Terms(name, terms, weight_V, np.zeros((len(weight_V), 1), np.float16))
    x_NV = bare.tfidf(sample.texts())
    used = np.flatnonzero(np.bincount(x_NV.indices, minlength=len(weight_V)))
    dimension = min(dimension, len(used), x_NV.shape[0])
    progress("fit embedder: SVD", 0, 1, "")
    _, _, vector_DU = randomized_svd(x_NV[:, used], dimension, n_iter=5, random_state=rng_seed)
    progress("fit embedder: SVD", 1, 1, "")
    vector_VD = np.zeros((len(weight_V), dimension), np.float16)
    vector_VD[used] = vector_DU.T / np.abs(vector_DU).max()  # the scale cancels, and float16 wants a large one
    return Terms(name, terms, weight_V, vector_VD)


def _words(name: str) -> Words:
    words = EMBEDDERS[name].words
    assert words is not None
    return words


def unit(x_ND: Floats) -> Floats:
    """Rows scaled to length one; zero rows stay zero."""
    norm_N = np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND))
    return x_ND / np.where(norm_N > 0, norm_N, 1)[:, None]


def occurrences(row_W: Ints) -> Floats:
    """How often each word occurred before its place [W], as floats."""
    order = np.argsort(row_W, kind="stable")
    sorted_W = row_W[order]
    first_W = np.flatnonzero(np.diff(sorted_W, prepend=-1))
    before_W = np.empty(len(row_W))
    before_W[order] = np.arange(len(row_W)) - np.repeat(first_W, np.diff(first_W, append=len(row_W)))
    return before_W


def _bucket(word: str) -> int:
    """The bucket a word is hashed to; the same on every machine."""
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) % VOCABULARY


def _rows_of(terms: Iterable[str]) -> Callable[[str], int]:
    row = {term: place for place, term in enumerate(terms)}
    return lambda word: row.get(word, -1)


def _counts(fitted: Terms, texts: Sequence[str]) -> sparse.csr_matrix:
    """tf**power of the known terms of each text [N, V] float64."""
    rows = [fitted.lexicon.rows(text) for text in texts]
    key_W = np.concatenate(rows)
    key_W += np.repeat(np.arange(len(texts)) * len(fitted.weight_V), [len(row_W) for row_W in rows])
    key_W = np.sort(key_W[np.concatenate(rows) >= 0])  # one sort counts the terms of all the texts
    first = np.flatnonzero(np.diff(key_W, prepend=-1))
    document, term = np.divmod(key_W[first], len(fitted.weight_V))
    tf = np.diff(first, append=len(key_W)).astype(np.float64) ** fitted.power
    start_N = np.searchsorted(document, np.arange(len(texts) + 1))
    return sparse.csr_matrix((tf, term, start_N), shape=(len(texts), len(fitted.weight_V)))


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut texts into runs that are embedded at once."""
    first, size = 0, 0
    for place, text in enumerate(texts):
        if place - first == DOCUMENTS or (size and size + len(text) > CHARACTERS):
            yield texts[first:place]
            first, size = place, 0
        size += len(text)
    if first < len(texts):
        yield texts[first:]


class _Counted:
    """Document frequencies of a stream. Beyond COUNTED terms the rarest are dropped (Manku and Motwani 2002)."""

    def __init__(self, hashed: bool):
        self.documents = 0
        self.hashed = hashed
        self.row: dict[str, int] = {}
        self.df_V = np.zeros(VOCABULARY if hashed else 1024, np.int64)
        self.lexicon = Lexicon(_bucket if hashed else lambda word: self.row.setdefault(word, len(self.row)))

    def add(self, text: str) -> None:
        self.documents += 1
        found = np.unique(self.lexicon.rows(text))
        found = found[found >= 0]
        if len(self.row) > len(self.df_V):
            self.df_V = np.append(self.df_V, np.zeros(len(self.row), np.int64))
        self.df_V[found] += 1
        if len(self.row) > COUNTED:
            self._drop(int(np.sort(self.df_V[: len(self.row)])[len(self.row) // 2]))

    def _drop(self, most: int) -> None:
        kept = [(word, self.df_V[row]) for word, row in self.row.items() if self.df_V[row] > most]
        self.row.clear()
        self.row.update((word, place) for place, (word, _) in enumerate(kept))
        self.df_V = np.append([count for _, count in kept], np.zeros(1024, np.int64)).astype(np.int64)
        self.lexicon = Lexicon(lambda word: self.row.setdefault(word, len(self.row)))

    def terms(self) -> tuple[tuple[str, ...], Ints]:
        """The terms kept, sorted, and their document frequencies [V]."""
        if self.hashed:
            return (), self.df_V
        least = 2 if self.df_V.max(initial=0) > 1 else 1
        found = sorted((-self.df_V[row], word) for word, row in self.row.items() if self.df_V[row] >= least)[:VOCABULARY]
        terms = tuple(sorted(word for _, word in found))
        return terms, np.array([self.df_V[self.row[term]] for term in terms], np.int64)


class _Sample:
    """The SAMPLE texts with the smallest hashes: the same in whatever order they come."""

    def __init__(self) -> None:
        self.heap: list[tuple[int, str]] = []

    def add(self, text: str) -> None:
        item = (-int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()), text)
        if len(self.heap) < SAMPLE:
            heapq.heappush(self.heap, item)
        elif item > self.heap[0]:
            heapq.heapreplace(self.heap, item)

    def texts(self) -> list[str]:
        return [text for _, text in sorted(self.heap)]
