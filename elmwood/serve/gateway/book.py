"""Which experts an upstream holds, who uses them, and which of them leaves when another must come. Pure: loading is for others to do."""

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

State = Literal["loading", "ready", "leaving"]


@dataclass(eq=False)
class Entry:
    """An expert at an upstream."""

    state: State
    users: int = 0
    number: int = 0  # of the load: an upstream that restarts loses them all


class Step(NamedTuple):
    """What a request has to do next for its expert."""

    do: Literal["go", "await", "load", "unload", "queue"]
    # go: it is there, and pinned; await: it is on its way, and pinned; load: the same, and this request loads it;
    # unload: this request takes out `name`, then asks again; queue: all are in use: ask again when something changes
    name: str
    entry: Entry | None = None  # what is pinned


class Book:
    """At most `most` experts, those used last at the end. An expert in use, or on its way, is never taken out."""

    def __init__(self, most: int):
        self.most = most
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        self.loads = 0

    def want(self, name: str) -> Step:
        """One more request for an expert. It is pinned where the answer is go, await or load: its `users` are
        one more, until the request has ended."""
        entry = self.entries.get(name)
        if entry and entry.state == "leaving":
            return Step("unload", name)
        if entry:
            entry.users += 1
            self.entries.move_to_end(name)
            return Step("go" if entry.state == "ready" else "await", name, entry)
        if len(self.entries) < self.most:
            self.loads += 1
            self.entries[name] = entry = Entry("loading", 1, self.loads)
            return Step("load", name, entry)
        leaving = next((one for one, other in self.entries.items() if other.state == "leaving"), None)
        idle = leaving or next((one for one, other in self.entries.items() if other.state == "ready" and not other.users), None)
        if idle is None:
            return Step("queue", name)
        self.entries[idle].state = "leaving"
        return Step("unload", idle)

    def loaded(self, name: str) -> None:
        self.entries[name].state = "ready"

    def gone(self, name: str) -> None:
        """It was taken out, or never came."""
        self.entries.pop(name, None)

    def lost(self, name: str, number: int) -> bool:
        """The upstream does not know the expert of this load; whether it must be loaded again, since nobody else has found out."""
        entry = self.entries.get(name)
        if entry is None or entry.number != number or entry.state != "ready":
            return False
        self.loads += 1
        entry.state, entry.number = "loading", self.loads
        return True

    def found(self, names: Iterable[str]) -> None:
        """An upstream that is met says what it holds: what it holds is ready, and what it does not hold is not here."""
        held = set(names)
        for name in [one for one, entry in self.entries.items() if entry.state == "ready" and not entry.users and one not in held]:
            del self.entries[name]
        for name in sorted(held - set(self.entries)):
            self.loads += 1
            self.entries[name] = Entry("ready", 0, self.loads)
            self.entries.move_to_end(name, last=False)  # nobody has asked for it here

    def retire(self, kept: Container[str]) -> list[str]:
        """Begin to take out the experts that are not kept and that nobody uses: their names."""
        found = [name for name, entry in self.entries.items() if name not in kept and entry.state == "ready" and not entry.users]
        for name in found:
            self.entries[name].state = "leaving"
        return found

    def touch(self, names: Sequence[str]) -> None:
        """A server that loads experts by itself was asked for these: it is taken to hold those asked for last."""
        for name in names:
            self.entries.setdefault(name, Entry("ready"))
            self.entries.move_to_end(name)
        while len(self.entries) > self.most:
            self.entries.popitem(last=False)

    def has(self, name: str) -> bool:
        """Whether a request for this expert would not load it."""
        entry = self.entries.get(name)
        return bool(entry and entry.state != "leaving")

    @property
    def resident(self) -> int:
        return sum(entry.state == "ready" for entry in self.entries.values())

    @property
    def loading(self) -> int:
        return sum(entry.state == "loading" for entry in self.entries.values())
