"""The errors that elmwood raises. Each message names the rule, the value and the cure.

ElmwoodError
├── BadInput            an argument cannot be used
│   ├── BadCorpus       no text, too few documents, unreadable source
│   ├── BadSeed         a checkpoint without tokenizer, an unknown architecture
│   └── UnknownName     no such table row, ref or digest
├── BadRecord           a record that is malformed, or of an unknown kind
│   └── NewerRecord     written by a later version of elmwood
├── ForeignExpert       an expert of another seed or partition
├── Damaged             stored bytes differ from their digest, or are missing
│   └── NotFinite       a model whose weights give NaN or infinity
├── DoesNotFit          the machine's memory or disk is too small
└── MissingExtra        an optional library is not installed
"""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 2000  # characters of a message: a screen; the longest of our own words have some 600


class ElmwoodError(Exception):
    """Base class of all errors of elmwood. A message quotes names, settings and files of strangers, which may be of any length: the middle
    of one that is longer than LONGEST is left out. Its beginning has the rule, its end the cure."""

    def __init__(self, message: object = ""):
        super().__init__(shorten(str(message)))


def shorten(text: str, most: int = LONGEST) -> str:
    """The text, without its middle where it is longer than this many characters."""
    if len(text) <= most:
        return text
    gap = f" … {len(text) - most + 40:,} characters left out … "
    room = most - len(gap)
    return text[: room * 2 // 3] + gap + text[len(text) - room + room * 2 // 3 :]


@contextmanager
def copied_to(folder: object, given: object) -> Iterator[None]:
    """Errors of the block that name a file of this temporary folder name what the user gave, of which that file is a copy."""
    try:
        yield
    except ElmwoodError as error:
        told = str(error).replace(f"{folder}/", f"{given}: ").replace(str(folder), str(given))
        if told == str(error):
            raise
        raise type(error)(told) from error


class BadInput(ElmwoodError):
    """An argument cannot be used."""


class BadCorpus(BadInput):
    """No text, too few documents, or a source that cannot be read."""


class BadSeed(BadInput):
    """A checkpoint that cannot be used as a seed."""


class UnknownName(BadInput, LookupError):
    """No such table row, ref or digest."""


class BadRecord(ElmwoodError):
    """A record that is malformed, or of an unknown kind."""


class NewerRecord(BadRecord):
    """A record written by a later version of elmwood."""


class ForeignExpert(ElmwoodError):
    """An expert of another seed or partition."""


class Damaged(ElmwoodError):
    """Stored bytes differ from their digest, or are missing."""


class NotFinite(Damaged):
    """A model whose weights give NaN or infinity."""


class DoesNotFit(ElmwoodError):
    """The machine's memory or disk is too small for what was asked."""


class MissingExtra(ElmwoodError):
    """An optional library is not installed."""
