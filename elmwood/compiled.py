"""Loops over arrays, compiled by numba when they are first called, and kept beside their file or in the user's cache."""

from collections.abc import Callable, Collection
from functools import cache, wraps
from typing import Any


def compiled(function: Callable[..., Any], fastmath: Collection[str] = ()) -> Callable[..., Any]:
    """The function, compiled or fetched at its first call: numba takes most of a CPU second to begin, and not every verb needs it.
    `fastmath`: sums may be taken in any order, which is that of the processor's registers."""

    @cache
    def made() -> Callable[..., Any]:
        from numba import njit

        try:
            return njit(function, nogil=True, cache=True, fastmath={*fastmath})
        except RuntimeError:  # no folder that could be written to: compiled in each process anew
            return njit(function, nogil=True, fastmath={*fastmath})

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return made()(*arguments)

    return call
