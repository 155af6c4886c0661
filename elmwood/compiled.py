"""Loops over arrays, compiled by numba when they are first called, and kept beside their file or in the user's cache."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled or fetched at its first call: numba takes most of a CPU second to begin, and not every verb needs it."""
    made = cache(lambda: jit()(function))

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return made()(*arguments)

    return call


def jit(**settings: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles, for a module that only those import who need numba. `settings`: those of numba's."""
    from numba import njit

    def compile(function: Callable[..., Any]) -> Any:
        try:
            return njit(nogil=True, cache=True, **settings)(function)
        except RuntimeError:  # no folder that could be written to: compiled in each process anew
            return njit(nogil=True, **settings)(function)

    return compile
