"""Key-value caches of several experts that read one text: a row per expert, in preallocated tensors of one model.

Shapes: S rows, H key-value heads, C capacity (tokens), D numbers per head, T new tokens.

The rows in use come first, so that a batch of them is a view. An idle row keeps its keys and values; when its expert is
needed again it reads only what it has missed.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

ROWS = 16  # kept per model, unless more experts than that are active at once
CAPACITY = 128  # tokens at first; doubled when full
PARTS = (0, 7, 8, 12)  # of a text on which a model shows whether it keeps what it has read


class CacheWindow:
    """The rows and positions of the current pass."""

    first = last = past = 0
    place_1: Tensor | None = None  # of a pass over one token whose shapes never change: where it goes, on the device
    rows = capacity = 0  # sizes of the tensors


class LayerCache(DynamicLayer):
    """Keys and values of one attention layer, for transformers: an update writes at the window, into preallocated memory."""

    def __init__(self, window: CacheWindow):
        super().__init__()
        self.window = window

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        window = self.window
        if self.keys is None or self.values is None:
            self.keys, self.values = _room(key_states, window), _room(value_states, window)
            self.is_initialized = True
        if window.place_1 is not None:
            keys, values = self.keys[window.first : window.last], self.values[window.first : window.last]
            keys.index_copy_(2, window.place_1, key_states)
            values.index_copy_(2, window.place_1, value_states)
            return keys, values
        end = window.past + key_states.shape[2]
        keys, values = self.keys[window.first : window.last, :, :end], self.values[window.first : window.last, :, :end]
        keys[:, :, window.past :] = key_states
        values[:, :, window.past :] = value_states
        return keys, values

    def grow(self) -> None:
        """Reallocate to the sizes that the window asks for."""
        if self.keys is not None and self.values is not None:
            old = self.keys, self.values
            self.keys, self.values = _room(self.keys, self.window), _room(self.values, self.window)
            for new, states in zip((self.keys, self.values), old, strict=True):
                new[: states.shape[0], :, : states.shape[2]] = states

    def get_seq_length(self) -> Any:
        return self.window.past if self.window.place_1 is None else self.window.place_1

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange two rows, up to `length` tokens."""
        for states in (self.keys, self.values):
            if states is not None:
                kept = states[a, :, :length].clone()
                states[a, :, :length] = states[b, :, :length]
                states[b, :, :length] = kept


def _room(like: Tensor, window: CacheWindow) -> Tensor:
    return like.new_zeros(window.rows, like.shape[1], window.capacity, like.shape[3])  # what is not read yet is masked, and must be finite


class KeyValueCache:
    """The keys and values of the experts of one model. `owner[s]` is the expert of row s, which has read `length[s]` tokens."""

    def __init__(self, layers: int, shared: int = 0):
        """`shared`: the first layers, which read one row for all experts."""
        self.window, self.trunk = CacheWindow(), CacheWindow()
        self.layers = [LayerCache(self.trunk if number < shared else self.window) for number in range(layers)]
        self.own = self.layers[shared:]
        self.cache = Cache(layers=list(self.layers))
        self.owner: list[int] = []
        self.length: list[int] = []

    def arrange(self, experts: Sequence[int], total: int) -> list[tuple[int, int]]:
        """Move the rows of these experts to the front, those that have read most first, and allocate for `total` tokens.

        Returns runs (first row, last row + 1) of rows that have read equally many tokens: each run needs one pass.
        """
        for expert in experts:
            if expert not in self.owner:
                self._admit(expert, experts)
        self.reserve(total)
        wanted = sorted(experts, key=lambda expert: -self.length[self.owner.index(expert)])
        front = self.owner[: len(experts)]
        if set(front) != set(experts) or any(a < b for a, b in zip(self.length, self.length[1 : len(experts)], strict=False)):
            for place, expert in enumerate(wanted):
                self._swap(place, self.owner.index(expert))
        runs = [list(run) for _, run in groupby(range(len(experts)), key=lambda row: self.length[row])]
        return [(run[0], run[-1] + 1) for run in runs]

    def _admit(self, expert: int, active: Sequence[int]) -> None:
        """A row for a new expert: a new one, or that of the expert that has been idle for longest."""
        idle = [row for row, owner in enumerate(self.owner) if owner not in active]
        if len(self.owner) < ROWS or not idle:
            self.owner.append(expert)
            self.length.append(0)
        else:
            row = min(idle, key=lambda row: self.length[row])
            self.owner[row], self.length[row] = expert, 0

    def reserve(self, total: int) -> None:
        """Allocate for `total` tokens."""
        if len(self.owner) <= self.window.rows and total <= self.window.capacity:
            return
        self.window.rows = len(self.owner)
        while self.window.capacity < total:
            self.window.capacity = max(CAPACITY, 2 * self.window.capacity)
        self.trunk.rows, self.trunk.capacity = 1, self.window.capacity
        for layer in self.layers:
            layer.grow()

    def copy(self, expert: int, others: Sequence[int]) -> None:
        """Let other experts have read what one has."""
        for other in others:
            if other not in self.owner:
                self._admit(other, [expert, *others])
        row = self.owner.index(expert)
        length = self.length[row]
        self.reserve(length)
        for other in map(self.owner.index, others):
            for layer in self.own:
                for states in (layer.keys, layer.values):
                    if states is not None:
                        states[other, :, :length] = states[row, :, :length]
            self.length[other] = length

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        if longest := max(self.length[a], self.length[b]):
            for layer in self.own:
                layer.swap(a, b, longest)
        self.owner[a], self.owner[b] = self.owner[b], self.owner[a]
        self.length[a], self.length[b] = self.length[b], self.length[a]

    def open(self, first: int, last: int) -> Cache:
        """The cache for a pass over a run of rows."""
        self.window.first, self.window.last, self.window.past, self.window.place_1 = first, last, self.length[first], None
        self.trunk.first, self.trunk.last, self.trunk.past, self.trunk.place_1 = 0, 1, self.length[first], None
        return self.cache

    def open_in_place(self, rows: int, place_1: Tensor) -> Cache:
        """The cache for a pass of the first rows over one token, which goes to `place_1` on the device: keys and values are those of all
        the capacity, for a mask to choose among."""
        self.window.first, self.window.last, self.window.place_1 = 0, rows, place_1
        self.trunk.first, self.trunk.last, self.trunk.place_1 = 0, 1, place_1
        return self.cache

    def clear(self) -> None:
        """Forget the text; the memory stays for another."""
        self.owner, self.length = [], []

    def close(self, first: int, last: int, total: int) -> None:
        """Note that the run has read all `total` tokens."""
        self.length[first:last] = [total] * (last - first)


def kept_layers(model: Any) -> int:
    """How many layers of keys and values a cache of this model holds; 0 for one that keeps none, or another state besides.

    Found by trying, whatever the architecture is called: a text that grows has the logits of the whole text, or it must be read anew.
    """
    count = len(DynamicCache(config=model.config).layers) or model.config.get_text_config().num_hidden_layers
    tokens_1T = (31 * torch.arange(1, PARTS[-1] + 1, device=model.device) % model.config.get_text_config().vocab_size)[None]
    whole_V = model(input_ids=tokens_1T, use_cache=False).logits[0, -1].float()
    cache = KeyValueCache(count)
    cache.arrange([0], PARTS[-1])
    try:
        for first, last in pairwise(PARTS):
            grown_V = model(input_ids=tokens_1T[:, first:last], cache=cache.open(0, 1), use_cache=True).logits[0, -1].float()
            cache.close(0, 1, last)
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, NotImplementedError):  # it asks a cache for something else
        return 0
    rounding = (64 if model.dtype == torch.float32 else 4) * torch.finfo(model.dtype).eps
    return count if (grown_V - whole_V).abs().max() <= max(1e-4, rounding * float(whole_V.abs().max())) else 0
