"""Text -> words, in any script.

A word is a run of two or more letters (with their marks), lower-cased; digits and signs part words, so `read_file2` is
`read` and `file`. Scripts written without spaces give every pair of neighbouring characters instead. A word counts once
a character that cannot belong to it follows; a pair counts at once.
"""

import regex

_JOINED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # scripts written without spaces
_WORD = regex.compile(rf"(?V1)[\p{{L}}--[{_JOINED}]][[\p{{L}}\p{{M}}]--[{_JOINED}]]+|[{_JOINED}](?=[{_JOINED}])")
_TAIL = regex.compile(rf"(?V1)[[\p{{L}}\p{{M}}]--[{_JOINED}]]+\Z")
_IS_JOINED = regex.compile(rf"[{_JOINED}]")


def words(text: str) -> list[str]:
    """The words of a text, in order, as they are written (not lower-cased)."""
    found = _WORD.findall(text)
    return spans(text)[0] if _IS_JOINED.search(text) else found


def spans(text: str) -> tuple[list[str], list[int]]:
    """The words of a text and, for each, the length of the shortest prefix of the text in which it counts."""
    found: list[str] = []
    counts: list[int] = []
    for match in _WORD.finditer(text):
        start, end = match.span()
        joined = end - start == 1
        found.append(text[start : end + 1] if joined else match.group())
        counts.append(end + 1)
    return found, counts


def finished(text: str) -> str:
    """A text without the word still being written at its end."""
    return _TAIL.sub("", text)
