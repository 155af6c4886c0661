"""Which experts are in memory, and which slot each is in: host places hold adapters ready to be copied, slots are what a pass uses.

Pure: digests and numbers. A digest is the identity of an expert, never its name. An expert is absent, `loading`, `ready` or `refused`;
one that is loading or pinned is never evicted, and neither is a slot with users. Each time a slot gets another expert its generation
grows, so that who remembers (digest, slot, generation) can tell whether it is still the same (`holds`).
"""

import threading
from collections.abc import Callable
from typing import Literal, NamedTuple

State = Literal["ready", "loading", "full", "refused"]


class Seat(NamedTuple):
    """A slot, as one of its users knows it."""

    digest: str
    slot: int
    generation: int
    fresh: bool = False  # its numbers must be copied from the host place first


class Residency:
    """Host places and slots, by digest."""

    def __init__(self, places: int, slots: int):
        self._change = threading.Lock()  # of places, for `early`
        self.place: dict[str, int] = {}  # of those loading or ready, the least recently used first
        self.loading: set[str] = set()
        self.refused: dict[str, str] = {}  # why
        self.pins: dict[str, int] = {}
        self.free = list(range(places))
        self.digest_S: list[str | None] = [None] * slots
        self.generation_S, self.users_S = [0] * slots, [0] * slots
        self.slot: dict[str, int] = {}

    def want(self, digest: str, load: Callable[[str, int], None]) -> State:
        """Where an expert stands; `load` is called where it must be read into a host place. "full": no place can be freed now."""
        with self._change:
            if digest in self.refused:
                return "refused"
            if digest in self.place:
                self.place[digest] = self.place.pop(digest)  # the most recently used is the last
                return "loading" if digest in self.loading else "ready"
            if not self.free:
                idle = next((one for one in self.place if one not in self.loading and not self.pins.get(one)), None)
                if idle is None:
                    return "full"
                self.free.append(self.place.pop(idle))
            self.place[digest] = self.free.pop()
            self.loading.add(digest)
            load(digest, self.place[digest])
            return "loading"

    def early(self, digest: str, load: Callable[[str, int], None]) -> None:
        """Begin to load an expert that is wanted soon, where a place is free. Any thread may call this, and no other method."""
        with self._change:
            if digest not in self.place and digest not in self.refused and self.free:
                self.place[digest] = self.free.pop()
                self.loading.add(digest)
                load(digest, self.place[digest])

    def loaded(self, digest: str, refused: str = "") -> None:
        """An expert has been read, or is refused for good."""
        with self._change:
            self.loading.remove(digest)
            if refused:
                self.free.append(self.place.pop(digest))
                self.refused[digest] = refused

    def pin(self, digest: str) -> None:
        """Keep an expert in its place until `unpin`."""
        self.pins[digest] = self.pins.get(digest, 0) + 1

    def unpin(self, digest: str) -> None:
        self.pins[digest] -= 1
        if not self.pins[digest]:
            del self.pins[digest]

    def seat(self, digest: str) -> Seat | None:
        """A slot for one more user of an expert that is ready: its own, or the lowest without users. None: all are in use."""
        assert digest in self.place
        assert digest not in self.loading
        slot, fresh = self.slot.get(digest), False
        if slot is None:
            slot = next((s for s, users in enumerate(self.users_S) if not users), None)
            if slot is None:
                return None
            if (before := self.digest_S[slot]) is not None:
                del self.slot[before]
            self.digest_S[slot], self.slot[digest], fresh = digest, slot, True
            self.generation_S[slot] += 1
        self.users_S[slot] += 1
        return Seat(digest, slot, self.generation_S[slot], fresh)

    def leave(self, seat: Seat) -> None:
        """One user less. The expert stays in the slot until another needs it."""
        self.users_S[seat.slot] -= 1
        assert self.users_S[seat.slot] >= 0

    def holds(self, seat: Seat) -> bool:
        """Whether the slot is still as this user knows it."""
        return self.digest_S[seat.slot] == seat.digest and self.generation_S[seat.slot] == seat.generation

    @property
    def seated(self) -> frozenset[str]:
        """Experts whose slots have users."""
        return frozenset(digest for digest, users in zip(self.digest_S, self.users_S, strict=True) if users and digest is not None)
