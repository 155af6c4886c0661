"""Text -> words, in any script.

A word is a run of two or more letters (with their marks), in lower case. Digits and signs separate words, so `read_file2` is
`read` and `file`. In scripts without spaces, and in Hangul, every pair of neighbouring letters is a word. A word counts once it
is complete, that is, when a character follows that cannot belong to it; a pair counts at once.

Shapes: W words of one text, in order.
"""

from collections.abc import Callable

import numpy as np
import regex
from numpy.typing import NDArray

Ints = NDArray[np.integer]

LONGEST = 64  # letters; a longer run is data, not a word
REMEMBERED = 1 << 20  # spellings in the cache of a lexicon
_JOINED = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_PAIRED = rf"[[{_JOINED}]&&[\p{{L}}\p{{M}}]]"
_WORD = regex.compile(rf"(?V1)(?P<pair>{_PAIRED})(?={_PAIRED})|[\p{{L}}--[{_JOINED}]][[\p{{L}}\p{{M}}]--[{_JOINED}]]+")
_TAIL = regex.compile(rf"(?V1)[\p{{L}}--[{_JOINED}]][[\p{{L}}\p{{M}}]--[{_JOINED}]]*\Z")
# ASCII letters become lower case, other ASCII characters become spaces, other bytes stay. What is between spaces is a unit: a word,
# or something with other characters, which is parsed once by the regular expression.
_UNITS = bytes(byte if byte >= 128 else byte | 32 if chr(byte).isalpha() else 32 for byte in range(256))


def words(text: str) -> list[str]:
    """The words of a text, in order, in lower case."""
    return [word for word, _ in spans(text)]


def spans(text: str) -> list[tuple[str, int]]:
    """Each word of a text, and the length of the shortest prefix in which it is complete."""
    found = []
    for match in _WORD.finditer(text):
        end = match.end() + 1  # including the second letter of a pair, or the character after a word
        word = text[match.start() : end] if match.lastgroup else match.group()
        if len(word) <= LONGEST:
            found.append((word.lower(), end))
    return found


def complete_words(text: str) -> str:
    """A text without the incomplete word at its end."""
    return _TAIL.sub("", text)


class Lexicon:
    """Words -> rows of a term table, with a cache of spellings."""

    def __init__(self, row: Callable[[str], int]):
        """`row` returns the row of a word, or -1 if it has none."""
        self._memo = _Memo(row)

    def rows(self, text: str) -> Ints:
        """Rows of the words of a text [W], in any order; -1 for a word without a row."""
        code_U = self._codes(text.encode("utf-8", "surrogatepass").translate(_UNITS).split())
        if len(code_U) and code_U.min() < -1:
            several = [self._memo.several[-2 - code] for code in code_U[code_U < -1]]
            return np.concatenate([code_U[code_U >= -1], *several])
        return code_U

    def steps(self, text: str) -> tuple[Ints, Ints]:
        """Rows of the words of a text in order [W], and the length of the shortest prefix in which each is complete [W]."""
        data = text.encode("utf-8", "surrogatepass").translate(_UNITS)
        byte_B = np.frombuffer(data, np.uint8)
        edges = np.flatnonzero(np.diff(byte_B != 32, prepend=False, append=False))
        start_U, end_U = edges[::2], edges[1::2]
        units = data.split()
        code_U = self._codes(units)
        if text.isascii():
            return code_U, end_U + 1
        characters_B = np.cumsum((byte_B & 0xC0) != 0x80)  # up to and including each byte
        plain_U = np.maximum.reduceat(byte_B, start_U) < 128 if len(start_U) else np.zeros(0, bool)
        rows = [code_U[plain_U]]
        counts = [characters_B[end_U[plain_U] - 1] + 1]
        for u in np.flatnonzero(~plain_U):
            inside = spans(units[u].decode("utf-8", "surrogatepass"))
            code = code_U[u]
            rows.append(self._memo.several[-2 - code] if code < -1 else np.full(len(inside), code))
            counts.append(np.array([end for _, end in inside], np.int64) + characters_B[start_U[u]] - 1)
        count_W = np.concatenate(counts)
        order = np.argsort(count_W, kind="stable")
        return np.concatenate(rows)[order], count_W[order]

    def _codes(self, units: list[bytes]) -> Ints:
        if len(self._memo) > REMEMBERED:
            self._memo.clear()
            self._memo.several.clear()
        return np.fromiter(map(self._memo.__getitem__, units), np.int64, len(units))


class _Memo(dict[bytes, int]):
    """Unit -> row of its word; -1 for none; -2 - index in `several` if it has more than one word."""

    def __init__(self, row: Callable[[str], int]):
        super().__init__()
        self.row = row
        self.several: list[Ints] = []

    def __missing__(self, unit: bytes) -> int:
        rows = [self.row(word) for word, _ in spans(unit.decode("utf-8", "surrogatepass"))]
        if len(rows) > 1:
            self.several.append(np.array(rows, np.int64))
        self[unit] = code = -1 - len(self.several) if len(rows) > 1 else rows[0] if rows else -1
        return code
