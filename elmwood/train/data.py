"""Packed tokens -> batches: a pure function of packing, recipe and step.

D documents, N of them chosen, B rows of a batch, L tokens of a row
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count, islice, pairwise
from typing import NamedTuple

import numpy as np

from elmwood.corpus.build import split
from elmwood.corpus.tokens import Packed
from elmwood.errors import BadCorpus
from elmwood.records import Recipe

UNSCORED = -100
VALIDATION = 0.05  # share of the training documents that are kept for validation, if the recipe has patience


Row = tuple[np.ndarray, np.ndarray]  # length + 1 tokens int64, and where documents begin in them


class Batch(NamedTuple):
    """Rows cut from documents that follow one another."""

    tokens_BL: np.ndarray  # int64
    targets_BL: np.ndarray  # int64, the next token; UNSCORED if it begins another document
    positions_BL: np.ndarray  # int64, from the start of the document, or of the row if the document began before it


def batches(packed: Packed, recipe: Recipe, start: int = 0, chosen_N: np.ndarray | None = None) -> Iterator[Batch]:
    """Batches of steps start, start + 1, … without end, from all documents or the chosen ones. Raises BadCorpus.

    Each epoch shuffles the documents, joins them, cuts the tokens into rows and shuffles the rows. Every token except separators is a
    target once per epoch; what is left over for less than a row is dropped.
    """
    if not len(packed.tokens):
        raise BadCorpus("there are no tokens to train on: give shards that hold documents")
    chosen_N = np.arange(len(packed.starts)) if chosen_N is None else chosen_N
    rows = _rows(packed, chosen_N, recipe.length, recipe.rng_seed, start * recipe.batch)
    while chosen := list(islice(rows, recipe.batch)):
        yield join_rows(chosen)


def split_batch(batch: Batch, count: int) -> Iterator[Batch]:
    """A batch in `count` parts of about equal size; at most one part per row."""
    ends = np.linspace(0, len(batch.tokens_BL), min(count, len(batch.tokens_BL)) + 1).round().astype(int)
    return (Batch(*(array[first:last] for array in batch)) for first, last in pairwise(ends))


def count_scored(batch: Batch) -> int:
    """Number of targets that are scored."""
    return int((batch.targets_BL != UNSCORED).sum())


def split_validation(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """The documents to train on [N] and to validate on [M], decided by their content. Raises BadCorpus."""
    if len(packed.starts) < 2:
        raise BadCorpus("patience needs at least two documents, one of them for validation: give more text, or leave patience out")
    ends_D = np.append(packed.starts[1:], len(packed.tokens))
    tokens = (packed.tokens[first:last].astype("<u4").tobytes() for first, last in zip(packed.starts, ends_D, strict=True))
    held_D = split([f"validation {hashlib.sha256(one).hexdigest()}" for one in tokens], VALIDATION)
    return np.flatnonzero(~held_D), np.flatnonzero(held_D)


def _rows(packed: Packed, chosen_N: np.ndarray, length: int, rng_seed: int, skip: int) -> Iterator[Row]:
    """Rows of length + 1 tokens from row `skip` on, epoch after epoch."""
    per_epoch = rows_of_epoch(int(np.diff(packed.starts, append=len(packed.tokens))[chosen_N].sum()), length)
    for epoch in count(skip // per_epoch):
        rng = np.random.default_rng((rng_seed, epoch))
        yield from cut_epoch(packed, chosen_N, length, rng, skip % per_epoch if epoch == skip // per_epoch else 0)


def rows_of_epoch(tokens: int, length: int) -> int:
    """How many rows of length + 1 tokens so many give; fewer tokens than a row are repeated."""
    return (-(-(length + 1) // tokens) * tokens - 1) // length


def cut_epoch(packed: Packed, chosen_N: np.ndarray, length: int, rng: np.random.Generator, skip: int = 0) -> Iterator[Row]:
    """The rows of one epoch from row `skip` on: the documents shuffled and joined, the rows cut and shuffled."""
    size_N = np.diff(packed.starts, append=len(packed.tokens))[chosen_N]
    total = int(size_N.sum())
    order_N = np.tile(rng.permutation(len(size_N)), -(-(length + 1) // total))
    end_N, order_N = np.cumsum(size_N[order_N]), chosen_N[order_N]
    for row in rng.permutation(rows_of_epoch(total, length))[skip:]:
        yield _cut(packed, order_N, end_N, int(row) * length, length + 1)


def _cut(packed: Packed, order_N: np.ndarray, end_N: np.ndarray, at: int, size: int) -> Row:
    """`size` tokens from place `at` of the documents joined in this order."""
    tokens, begins = np.empty(size, np.int64), np.zeros(size, bool)
    place, filled = int(np.searchsorted(end_N, at, "right")), 0
    ends = len(packed.tokens)
    while filled < size:
        document = order_N[place]
        first = packed.starts[document]
        last = packed.starts[document + 1] if document + 1 < len(packed.starts) else ends
        inside = at + filled - (end_N[place] - (last - first))  # tokens of the document before this piece
        piece = packed.tokens[first + inside : min(last, first + inside + size - filled)]
        tokens[filled : filled + len(piece)] = piece
        begins[filled] = inside == 0
        filled += len(piece)
        place += 1
    return tokens, begins


def join_rows(rows: Sequence[Row]) -> Batch:
    """A batch of rows."""
    tokens, begins = np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])
    place = np.arange(tokens.shape[1] - 1)
    begun = np.maximum.accumulate(np.where(begins[:, :-1], place, 0), axis=1)
    return Batch(tokens[:, :-1], np.where(begins[:, 1:], UNSCORED, tokens[:, 1:]), place - begun)
