"""Tables of functions, looked up by name. A user's own `module:function` works like a built-in row."""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from elmwood.errors import MissingExtra, UnknownName

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, what: str = "name") -> T:
    """The row called `name`, or the object that `module:attribute` names.

    Only for names typed by the user of this machine, never for names read from a record somebody else sent.
    Raises UnknownName.
    """
    if name in table:
        return table[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UnknownName(f"cannot load {what} {name!r}: {error}; check that the module is on the Python path") from error
    raise UnknownName(f"no {what} {name!r}; have {', '.join(sorted(table))}, or pass 'module:function'")


def trust(name: str, what: str = "name") -> Any:
    """Look up a `module:function` that the user typed, and remember it, so that records on this machine may name it.

    Raises UnknownName.
    """
    found: Any = lookup({}, name, what)
    names = _remembered()
    if name not in names:
        path = trust_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text("".join(f"{one}\n" for one in sorted({*names, name})), encoding="utf-8")
        os.replace(temporary, path)
    return found


def trusted(name: str, what: str = "name") -> Any:
    """Look up a `module:function` that a record names. Raises UnknownName where the user has not typed it on this machine before."""
    if name not in _remembered():
        raise UnknownName(
            f"a record names the {what} {name!r}, code that is not part of elmwood: install and read that code, "
            f"then add the line {name} to {trust_file()}"
        )
    return lookup({}, name, what)


def trust_file() -> Path:
    """Where the names that the user typed are remembered: in the user's own folder, not in a store, which may be copied."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "elmwood" / "trusted"


def _remembered() -> set[str]:
    return set(trust_file().read_text(encoding="utf-8").split()) if trust_file().exists() else set()


def require(module: str, extra: str) -> Any:
    """Import an optional library, or say which extra installs it. Raises MissingExtra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{module} is needed here and not installed: pip install 'elmwood[{extra}]'") from error
