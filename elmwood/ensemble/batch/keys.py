"""Keys and values of many rows, each a text that one expert reads, and attention of a pass over some of them, each by its own text.

R rows, C capacity (tokens), H heads of queries, K of keys and values, G = H / K, D width of a head, N tokens of a pass, n of them single,
T of the longest row
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "elmwood_rows"
ROWS = 4  # at first; doubled when full
CAPACITY = {"cpu": 8192}  # of a row at first, else 128; doubled when full. On a CPU tokens take memory once they are written
FEW, THREADS = 64, 2  # tokens of a pass, and threads of torch, up to which compiled loops, which use one, are at least as fast on a CPU


class KeyValues:
    """Keys and values [R, K, C, D] of each layer. Rows are numbered; whoever uses them knows how many tokens each has read."""

    def __init__(self, device: torch.device):
        self.device = device
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.clear()

    def clear(self) -> None:
        """Hold nothing, as at first."""
        self.layers.clear()
        self.rows, self.capacity = ROWS, CAPACITY.get(self.device.type, 128)
        self.written: dict[int, int] = {}  # row -> tokens that may be in it

    def wrote(self, row: int, end: int) -> None:
        """A row has tokens before `end`."""
        self.written[row] = max(end, self.written.get(row, 0))

    def reserve(self, rows: int, capacity: int) -> None:
        """Have this many rows of this many tokens."""
        if rows <= self.rows and capacity <= self.capacity:
            return
        while self.rows < rows:
            self.rows *= 2
        while self.capacity < capacity:
            self.capacity *= 2
        for layer, old in self.layers.items():
            new = self._room(*old)
            for one, before in zip(new, old, strict=True):
                for row, end in self.written.items():
                    one[row, :, :end] = before[row, :, :end]
            self.layers[layer] = new

    def layer(self, number: int, key_1KND: Tensor, value_1KND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; made when it is first asked for."""
        if number not in self.layers:
            self.layers[number] = self._room(key_1KND, value_1KND)
        return self.layers[number]

    def _room(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros, for what is masked must be finite."""
        made = [_zeros((self.rows, like.shape[1], self.capacity, like.shape[3]), like) for like in (key, value)]
        return made[0], made[1]

    def take(self, row: int, length: int) -> list[Tensor]:
        """A copy of what a row holds of its first tokens, layer by layer, keys before values."""
        return [one[row, :, :length].clone() for _, pair in sorted(self.layers.items()) for one in pair]

    def give(self, row: int, kept: Sequence[Tensor], length: int) -> None:
        """Let a row begin with what `take` has kept."""
        self.wrote(row, length)
        for one, before in zip((one for _, pair in sorted(self.layers.items()) for one in pair), kept, strict=True):
            one[row, :, :length] = before[:, :length]

    def token_bytes(self) -> int:
        """Bytes of one token in one row; 0 before the first pass."""
        return sum(one.shape[1] * one.shape[3] * one.element_size() for pair in self.layers.values() for one in pair)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """On a CPU they take memory once they are written, in small pages: huge ones would hold a whole text for its first token."""
    size = math.prod(shape)
    if like.device.type != "cpu" or not size:
        return like.new_zeros(shape)
    try:
        held = mmap.mmap(-1, size * like.element_size())
    except OSError as error:
        raise MemoryError(f"no memory for keys and values of {shape[0]} rows: {error}") from error
    with suppress(AttributeError, OSError):  # another system, or a kernel without huge pages
        held.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(held, dtype=like.dtype).view(shape)


class Chunk(NamedTuple):
    """Tokens first ... last - 1 of a pass go on with a row, which has read `begin` tokens."""

    row: int
    begin: int
    first: int
    last: int
    seen: Tensor | None  # [last - first, end of the row]; none where nothing was read before


class Step(NamedTuple):
    """The rows of a pass: first n tokens of as many rows, then chunks."""

    store: KeyValues
    row_n: Tensor
    place_n: Tensor  # how many tokens each has read before
    low: int  # the rows of the first n lie in low ... high - 1
    high: int
    straight: bool  # they are these, in this order
    seen_R11T: Tensor
    chunks: tuple[Chunk, ...]
    found: dict[tuple[int, int], Tensor]
    few: tuple[NDArray[np.int64], NDArray[np.int64]] | None  # rows and places again, of a few tokens and no chunks

    def spots(self, heads: int, capacity: int) -> Tensor:
        """Where the first n tokens go among the keys of all rows, heads and places, as one axis [n * heads]; the same for most layers."""
        if (heads, capacity) not in self.found:
            row_n1, place_n1 = self.row_n[:, None], self.place_n[:, None]
            head_K = torch.arange(heads, device=row_n1.device)
            self.found[heads, capacity] = ((row_n1 * heads + head_K) * capacity + place_n1).flatten()
        return self.found[heads, capacity]


def arrange(store: KeyValues, singles: Sequence[tuple[int, int]], chunks: Sequence[tuple[int, int, int]]) -> Step:
    """The step of these (row, tokens read) of single tokens, and (row, tokens read, new tokens) of chunks, in the order of the tokens."""
    device = store.device
    rows, places = [row for row, _ in singles], [place for _, place in singles]
    low, high = min(rows, default=0), max(rows, default=-1) + 1
    last_R = np.zeros(high - low, np.int64)
    last_R[np.array(rows, np.int64) - low] = places
    longest = max(places, default=0) + 1
    seen_RT = torch.arange(longest, device=device) <= torch.from_numpy(last_R).to(device)[:, None]
    made, first = [], len(singles)
    for row, begin, size in chunks:
        end = begin + size
        seen = torch.arange(end, device=device) <= torch.arange(begin, end, device=device)[:, None] if begin else None
        made.append(Chunk(row, begin, first, first + size, seen))
        first += size
    store.reserve(max([high, *(chunk.row + 1 for chunk in made)]), max([longest, *(begin + size for _, begin, size in chunks)]))
    for row, place in singles:
        store.wrote(row, place + 1)
    for row, begin, size in chunks:
        store.wrote(row, begin + size)
    row_n, place_n = torch.tensor(rows, dtype=torch.long, device=device), torch.tensor(places, dtype=torch.long, device=device)
    few = (np.array(rows, np.int64), np.array(places, np.int64)) if not chunks and len(rows) <= FEW else None
    return Step(store, row_n, place_n, low, high, rows == list(range(low, high)), seen_RT[:, None, None], tuple(made), {}, few)


def attend(
    module: Any, query_1HND: Tensor, key_1KND: Tensor, value_1KND: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, elmwood_step: Step | None = None, **named: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function of transformers: each token sees its own row. Without a step it is transformers' own.

    Raises ValueError for what it does not know.
    """
    if elmwood_step is None:
        named |= {"sliding_window": sliding_window}
        return sdpa_attention_forward(module, query_1HND, key_1KND, value_1KND, attention_mask, dropout, scaling, **named)
    if named.get("softcap") or named.get("s_aux") is not None or sliding_window:
        raise ValueError("attention by rows knows no capped scores, no sinks and no windows")
    step = elmwood_step
    keys_RKCD, values_RKCD = step.store.layer(module.layer_idx, key_1KND, value_1KND)
    heads, groups = key_1KND.shape[1], query_1HND.shape[1] // key_1KND.shape[1]
    y_NHD = query_1HND.new_zeros(query_1HND.shape[2], query_1HND.shape[1], value_1KND.shape[3])
    if count := len(step.row_n):
        spot_nK = step.spots(heads, keys_RKCD.shape[2])
        for kept_RKCD, new_1KND in ((keys_RKCD, key_1KND), (values_RKCD, value_1KND)):
            new_nKD = new_1KND[0, :, :count].transpose(0, 1).flatten(0, 1)
            kept_RKCD.view(-1, kept_RKCD.shape[3]).index_copy_(0, spot_nK, new_nKD)
        query_RKGD = query_1HND[0, :, :count].transpose(0, 1).unflatten(1, (heads, groups))
        if not step.straight:
            query_RKGD = query_RKGD.new_zeros(step.high - step.low, *query_RKGD.shape[1:]).index_copy_(0, step.row_n - step.low, query_RKGD)
        rows, longest = slice(step.low, step.high), step.seen_R11T.shape[-1]
        y_RKGD = scaled_dot_product_attention(
            query_RKGD, keys_RKCD[rows, :, :longest], values_RKCD[rows, :, :longest], attn_mask=step.seen_R11T, scale=scaling
        )
        y_NHD[:count] = (y_RKGD if step.straight else y_RKGD[step.row_n - step.low]).flatten(1, 2)
    for row, begin, first, last, seen in step.chunks:
        end = begin + last - first
        keys_RKCD[row, :, begin:end] = key_1KND[0, :, first:last]
        values_RKCD[row, :, begin:end] = value_1KND[0, :, first:last]
        one = slice(row, row + 1)
        y_1HTD = scaled_dot_product_attention(
            query_1HND[:, :, first:last], keys_RKCD[one, :, :end], values_RKCD[one, :, :end],
            attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=groups > 1,
        )  # fmt: skip
        y_NHD[first:last] = y_1HTD[0].transpose(0, 1)
    return y_NHD[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
