"""Packed tokens -> batches. The position in the data is the step: the batches are a pure function of packing, recipe and step.

D documents, B rows of a batch, L tokens of a row
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import NamedTuple

import numpy as np

from elmwood.corpus.tokens import Packed
from elmwood.errors import BadCorpus
from elmwood.records import Recipe

UNSCORED = -100


class Batch(NamedTuple):
    """Rows cut from documents standing one after another."""

    tokens_BL: np.ndarray  # int64
    targets_BL: np.ndarray  # int64, the token that follows; UNSCORED where another document begins
    positions_BL: np.ndarray  # int64, counted from the start of the document (or of the row, where it began before)


def batches(packed: Packed, recipe: Recipe, start: int = 0) -> Iterator[Batch]:
    """The batches of steps start, start + 1, … without end. Raises BadCorpus.

    Each epoch shuffles the documents, joins them, cuts the tokens into rows and shuffles the rows. Every token but the separators is
    a target once per epoch, save what is left over for less than a row.
    """
    if not len(packed.tokens):
        raise BadCorpus("there are no tokens to train on: give shards that hold documents")
    rows = _rows(packed, recipe.length, recipe.rng_seed, start * recipe.batch)
    while chosen := list(islice(rows, recipe.batch)):
        yield _batch(chosen)


def _rows(packed: Packed, length: int, rng_seed: int, skip: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of length + 1 tokens from row `skip` on, and where in them documents begin."""
    size_D = np.diff(packed.starts, append=len(packed.tokens))
    repeats = -(-(length + 1) // len(packed.tokens))  # a domain smaller than a row is read several times for one
    per_epoch = (repeats * len(packed.tokens) - 1) // length
    for epoch in count(skip // per_epoch):
        rng = np.random.default_rng((rng_seed, epoch))
        order_D = np.tile(rng.permutation(len(size_D)), repeats)
        end_D = np.cumsum(size_D[order_D])
        shuffled = rng.permutation(per_epoch)
        for row in shuffled[skip % per_epoch :] if epoch == skip // per_epoch else shuffled:
            yield _cut(packed, order_D, end_D, int(row) * length, length + 1)


def _cut(packed: Packed, order_D: np.ndarray, end_D: np.ndarray, at: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`size` tokens from place `at` of the documents joined in this order."""
    tokens, begins = np.empty(size, np.int64), np.zeros(size, bool)
    place, filled = int(np.searchsorted(end_D, at, "right")), 0
    ends = len(packed.tokens)
    while filled < size:
        document = order_D[place]
        first = packed.starts[document]
        last = packed.starts[document + 1] if document + 1 < len(packed.starts) else ends
        inside = at + filled - (end_D[place] - (last - first))  # tokens of the document that stand before
        piece = packed.tokens[first + inside : min(last, first + inside + size - filled)]
        tokens[filled : filled + len(piece)] = piece
        begins[filled] = inside == 0
        filled += len(piece)
        place += 1
    return tokens, begins


def _batch(rows: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    tokens, begins = np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])
    place = np.arange(tokens.shape[1] - 1)
    begun = np.maximum.accumulate(np.where(begins[:, :-1], place, 0), axis=1)
    return Batch(tokens[:, :-1], np.where(begins[:, 1:], UNSCORED, tokens[:, 1:]), place - begun)
