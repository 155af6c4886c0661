"""Tokens -> pieces of text that are valid UTF-8 and end before a stop string."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from elmwood.ensemble.batch.interface import Said


class Placed(NamedTuple):
    """A token, and where its text begins in the text of its choice, in characters."""

    said: Said
    start: int


class Piece(NamedTuple):
    """Text that may be sent, and the tokens that begin in it. All pieces of a choice join to its text and to its tokens."""

    text: str
    tokens: tuple[Placed, ...]


class Speller:
    """The text of one choice as it grows. Text that may be the beginning of a stop string waits, and so do unfinished characters."""

    def __init__(self, spelled: Sequence[bytes], stops: Sequence[str] = (), start: int = 0):
        """`spelled`: the bytes of each token; `start`: characters before this text."""
        self._spelled, self._stops = spelled, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self._sent, self._known = "", start, start  # characters sent, and decoded
        self._waiting: list[Placed] = []
        self.stopped = False  # a stop string was found: nothing follows

    @property
    def place(self) -> int:
        """Characters that were sent."""
        return self._sent

    def push(self, said: Said) -> Piece:
        """Let the text grow by a token."""
        spelled = b"" if said.stop or said.token >= len(self._spelled) else self._spelled[said.token]
        before = self._decoder.getstate()[0]
        text = self._decoder.decode(spelled)
        self._waiting.append(Placed(said, self._known + self._broken(before, spelled, text)))
        self._hold(text)
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._send(min(found), cut=True)
        return self._send(len(self._held) - self._unsure())

    def end(self) -> Piece:
        """The text ends: what is left of it."""
        self._hold(self._decoder.decode(b"", True))
        return self._send(len(self._held), last=True)

    def _hold(self, text: str) -> None:
        self._held += text
        self._known += len(text)

    def _broken(self, before: bytes, spelled: bytes, text: str) -> int:
        """Characters that only stand for the unfinished bytes before a token, where it does not finish them."""
        if not before or not spelled:
            return 0
        alone = codecs.getincrementaldecoder("utf-8")("replace")
        rest = alone.decode(spelled)
        apart = text.endswith(rest) and alone.getstate() == self._decoder.getstate()
        lost = before.decode(errors="replace")
        return len(lost) if apart and text == lost + rest else 0

    def _unsure(self) -> int:
        """How much of the end of the text may be the beginning of a stop string."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

    def _send(self, size: int, cut: bool = False, last: bool = False) -> Piece:
        text, self._held = self._held[:size], self._held[size:]
        self._sent += size
        everything = last or not (cut or self._held or self._decoder.getstate()[0])
        ready = len(self._waiting) if everything else sum(one.start < self._sent for one in self._waiting)
        tokens, self._waiting = tuple(self._waiting[:ready]), self._waiting[ready:]
        return Piece(text, tokens)


def name_of(spelled: bytes, special: str) -> str:
    """A token as a string: its text, its name for a special token, or its bytes where they are no text of their own."""
    if not spelled:
        return special
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
