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
├── DoesNotFit          the machine's memory or disk is too small
└── MissingExtra        an optional library is not installed
"""


class ElmwoodError(Exception):
    """Base class of all errors of elmwood."""


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


class DoesNotFit(ElmwoodError):
    """The machine's memory or disk is too small for what was asked."""


class MissingExtra(ElmwoodError):
    """An optional library is not installed."""
