"""What rows that have ended had read: the next text that begins alike, under the same expert, reads on from there.

An expert is known by the digest of its content, never by its name. The least recently used is forgotten first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

SHORTEST = 16  # tokens worth keeping


class Kept(NamedTuple):
    """What a row had read."""

    tokens_T: NDArray[np.int64]
    loglik_T: NDArray[np.float64]  # of the tokens; empty where nobody asked
    states: list[Tensor]  # keys and values

    @property
    def size(self) -> int:
        return sum(one.numel() * one.element_size() for one in self.states)


class Found(NamedTuple):
    """The beginning of a text that was read before: its first `length` tokens, and one more that may be known without its keys."""

    kept: Kept
    length: int


class Prefixes:
    """Texts that were read, by the digest of who read them."""

    def __init__(self, most: int):
        self.most, self.size = most, 0  # bytes
        self.kept: dict[tuple[str, int], Kept] = {}  # the least recently used first
        self.count = self.hits = 0

    def find(self, digest: str, tokens: Sequence[int]) -> Found | None:
        """The longest beginning of a text that this expert has read."""
        wanted_T = np.asarray(tokens, np.int64)
        found = [(common(kept.tokens_T, wanted_T), key) for key, kept in self.kept.items() if key[0] == digest]
        length, key = max(found, default=(0, ("", 0)))
        if length < SHORTEST:
            return None
        self.hits += 1
        self.kept[key] = self.kept.pop(key)
        return Found(self.kept[key], length)

    def wants(self, digest: str, tokens: Sequence[int]) -> bool:
        """Whether what was read is worth keeping: it is long enough, and no beginning of what is kept already."""
        if len(tokens) < SHORTEST or not self.most:
            return False
        read_T = np.asarray(tokens, np.int64)
        return not any(key[0] == digest and common(kept.tokens_T, read_T) == len(read_T) for key, kept in self.kept.items())

    def keep(self, digest: str, kept: Kept) -> None:
        """Keep what was read, in the place of its own beginnings."""
        for key, other in list(self.kept.items()):
            if key[0] == digest and common(other.tokens_T, kept.tokens_T) == len(other.tokens_T):
                self._forget(key)
        if kept.size > self.most:
            return
        self.count += 1
        self.kept[digest, self.count] = kept
        self.size += kept.size
        while self.size > self.most:
            self._forget(next(iter(self.kept)))

    def clear(self) -> None:
        self.kept, self.size = {}, 0

    def _forget(self, key: tuple[str, int]) -> None:
        self.size -= self.kept.pop(key).size


def common(one_T: NDArray[np.int64], other_T: NDArray[np.int64]) -> int:
    """Tokens that two texts have in common at their beginning."""
    length = min(len(one_T), len(other_T))
    differs = np.flatnonzero(one_T[:length] != other_T[:length])
    return int(differs[0]) if len(differs) else length
