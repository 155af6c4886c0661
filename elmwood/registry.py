"""Tables of functions, opened by name. A stranger's `module:function` comes in by the same door as a built-in."""

from collections.abc import Mapping
from importlib import import_module
from typing import TypeVar

from elmwood.errors import MissingExtra, UnknownName

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, what: str = "name") -> T:
    """The row called `name`, or what `module:attribute` points to.

    Only for names typed by the user of this machine, never for names read from a record somebody else sent.
    Raises UnknownName.
    """
    if name in table:
        return table[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UnknownName(f"cannot load {what} {name!r}: {error}; check that the module is on the Python path") from error
    raise UnknownName(f"no {what} {name!r}; have {', '.join(sorted(table))}, or pass 'module:function'")


def require(module: str, extra: str):
    """Import an optional library, or say which extra brings it. Raises MissingExtra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{module} is needed here and not installed: pip install 'elmwood[{extra}]'") from error
