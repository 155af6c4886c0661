"""The arithmetic of torch's caching allocator for CUDA: what a program reserves, given what it allocates and frees, and in which order.

Sizes and rules are those of its defaults (c10/cuda/CUDACachingAllocator.cpp): one stream, no expandable segments, no limit on splits.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

ROUND = 512  # bytes: every block is a multiple of it
SMALL = 1 << 20  # blocks up to here come from segments of:
SMALL_SEGMENT = 2 << 20
MEDIUM = 10 << 20  # larger blocks below this one come from segments of:
MEDIUM_SEGMENT = 20 << 20
LARGE_ROUND = 2 << 20  # others have a segment of their own, a multiple of this


@dataclass
class Block:
    """A part of a segment, free or in use, between its neighbours there."""

    size: int
    small: bool
    before: "int | None" = None
    after: "int | None" = None
    used: bool = False


class CachingAllocator:
    """`allocate` returns the number of a block, `free` takes it back. `reserved` never shrinks, as long as memory lasts. All in bytes."""

    def __init__(self) -> None:
        self.reserved = self.allocated = self.most = 0  # most: allocated at once
        self._blocks: dict[int, Block] = {}
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # small? -> (size, number), sorted
        self._count = 0

    def allocate(self, size: int) -> int:
        size = max(1, -(-size // ROUND)) * ROUND
        small = size <= SMALL
        pool = self._free[small]
        place = bisect_left(pool, (size, -1))
        number = pool.pop(place)[1] if place < len(pool) else self._segment(size, small)
        block = self._blocks[number]
        if block.size - size >= (ROUND if small else SMALL + 1):
            self._split(number, block, size)
        block.used = True
        self.allocated += block.size
        self.most = max(self.most, self.allocated)
        return number

    def free(self, number: int) -> None:
        block = self._blocks[number]
        block.used = False
        self.allocated -= block.size
        if block.before is not None and not self._blocks[block.before].used:
            number = self._join(block.before)
        block = self._blocks[number]
        if block.after is not None and not self._blocks[block.after].used:
            self._forget(block.after)
            self._join(number, listed=False)
        insort(self._free[block.small], (block.size, number))

    def _segment(self, size: int, small: bool) -> int:
        whole = SMALL_SEGMENT if small else MEDIUM_SEGMENT if size < MEDIUM else -(-size // LARGE_ROUND) * LARGE_ROUND
        self.reserved += whole
        return self._new(Block(whole, small))

    def _new(self, block: Block) -> int:
        self._count += 1
        self._blocks[self._count] = block
        return self._count

    def _split(self, number: int, block: Block, size: int) -> None:
        rest = self._new(Block(block.size - size, block.small, number, block.after))
        if block.after is not None:
            self._blocks[block.after].before = rest
        block.size, block.after = size, rest
        insort(self._free[block.small], (self._blocks[rest].size, rest))

    def _join(self, number: int, listed: bool = True) -> int:
        """Add to a free block the one after it; the block is taken out of the list of free ones, if it is there."""
        if listed:
            self._forget(number)
        block = self._blocks[number]
        assert block.after is not None
        next_one = self._blocks.pop(block.after)
        block.size, block.after = block.size + next_one.size, next_one.after
        if block.after is not None:
            self._blocks[block.after].before = number
        return number

    def _forget(self, number: int) -> None:
        block = self._blocks[number]
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, number))]
