"""Corpora -> batches, shard by shard: a shard is packed when its first row is due, and one shard of each corpus is open at a time.

S corpora; a row is cut from one shard of one of them
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from elmwood.corpus.tokens import Packed, pack
from elmwood.engine import Progress, silent
from elmwood.errors import BadCorpus
from elmwood.records import Corpus, Recipe, Shard
from elmwood.store import Store
from elmwood.train.data import Batch, Row, cut_epoch, join_rows, rows_of_epoch

GOLDEN = (5**0.5 - 1) / 2
BLOCK = 1 << 20  # rows whose corpora are chosen at once


class Source(NamedTuple):
    """A corpus, and the share of the rows that are cut from it."""

    corpus: Corpus
    weight: float = 1.0


class Read(NamedTuple):
    """How much of a source a run reads."""

    corpus: str  # digest
    epochs: float
    exact: bool  # all of its shards were packed; else from the tokens per byte of those that were


class Stream:
    """Batches of several corpora, in an order that is a function of the recipe alone: the step is the exact position.

    Row n is cut from the corpus in whose share the fraction of n times the golden ratio falls, so that any stretch of rows has the shares
    of all within a few rows. Each corpus goes through its shards, in another order in every epoch; within a shard documents and
    rows are shuffled as `data.batches` does it. One corpus of one shard gives the batches of `data.batches`.
    """

    def __init__(
        self, sources: Sequence[Source], words: Tokenizer, separator: int, recipe: Recipe, store: Store, progress: Progress = silent
    ):
        self.sources, self.words, self.separator = sources, words, separator
        self.recipe, self.store, self.progress = recipe, store, progress
        self.counts: dict[str, int] = {}  # blob of a shard -> its tokens
        self.open: dict[int, tuple[str, Packed]] = {}  # source -> its open shard
        total = sum(source.weight for source in sources)
        self.edge_S = np.cumsum([source.weight / total for source in sources])[:-1]

    def __call__(self, start: int = 0) -> Iterator[Batch]:
        """Batches of steps start, start + 1, … without end. Raises BadCorpus."""
        first = start * self.recipe.batch
        rows = [self._rows(number, int(skip)) for number, skip in enumerate(self._before(first))]
        chosen = (next(rows[number]) for number in self._owners(first))
        while batch := list(islice(chosen, self.recipe.batch)):
            yield join_rows(batch)

    def reads(self) -> list[Read]:
        """How many epochs of each corpus the whole run reads. One shard of each is packed for that, if none was. Raises BadCorpus."""
        found = []
        for number, (source, rows) in enumerate(zip(self.sources, self._before(self.recipe.steps * self.recipe.batch), strict=True)):
            shards = source.corpus.train
            if not any(self.counts.get(shard.blob) for shard in shards):
                next(self._rows(number, 0))
            packed = [shard for shard in shards if shard.blob in self.counts]
            tokens, size = sum(self.counts[shard.blob] for shard in packed), sum(shard.bytes for shard in packed)
            whole = tokens * sum(shard.bytes for shard in shards) / max(1, size)
            found.append(Read(source.corpus.digest, int(rows) * self.recipe.length / max(1.0, whole), len(packed) == len(shards)))
        return found

    def _owners(self, first: int) -> Iterator[int]:
        """The source of each row, from row `first` on."""
        for block in count(first, BLOCK):
            yield from self._owner_N(block, BLOCK).tolist()

    def _owner_N(self, first: int, size: int) -> np.ndarray:
        shift = np.random.default_rng(self.recipe.rng_seed).random()
        return np.searchsorted(self.edge_S, (np.arange(first, first + size) * GOLDEN + shift) % 1.0, "right")

    def _before(self, rows: int) -> np.ndarray:
        """How many of the first rows each source has [S]."""
        if len(self.sources) == 1:
            return np.array([rows])
        owned = (self._owner_N(first, min(BLOCK, rows - first)) for first in range(0, rows, BLOCK))
        return sum((np.bincount(owner_N, minlength=len(self.sources)) for owner_N in owned), np.zeros(len(self.sources), int))

    def _rows(self, number: int, skip: int) -> Iterator[Row]:
        """Rows of one source from its row `skip` on. Raises BadCorpus."""
        shards, recipe = self.sources[number].corpus.train, self.recipe
        alone = len(self.sources) == len(shards) == 1
        for epoch in count():
            order = [0] if alone else np.random.default_rng((recipe.rng_seed, epoch, number)).permutation(len(shards)).tolist()
            for place in order:
                if not (rows := self._count(number, shards[place])):
                    continue
                if skip >= rows:
                    skip -= rows
                    continue
                packed = self._packed(number, shards[place])
                rng = np.random.default_rng((recipe.rng_seed, epoch) if alone else (recipe.rng_seed, epoch, number, place))
                yield from cut_epoch(packed, np.arange(len(packed.starts)), recipe.length, rng, skip)
                skip = 0
            if not any(self.counts[shard.blob] for shard in shards):
                raise BadCorpus("there are no tokens to train on: give a corpus that holds documents")

    def _count(self, number: int, shard: Shard) -> int:
        """Rows of one epoch of a shard."""
        tokens = self.counts.get(shard.blob)
        if tokens is None:
            tokens = len(self._packed(number, shard).tokens)
        return rows_of_epoch(tokens, self.recipe.length) if tokens else 0

    def _packed(self, number: int, shard: Shard) -> Packed:
        known, packed = self.open.get(number, ("", None))
        if packed is None or known != shard.blob:
            packed = pack([shard], self.words, self.separator, self.store, self.progress)
            self.open[number], self.counts[shard.blob] = (shard.blob, packed), len(packed.tokens)
        return packed
