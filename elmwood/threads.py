"""Linear algebra in one thread: how BLAS and LAPACK divide a matrix among threads decides the last bits of a result, and so digests.

Work is spread over processes instead (`--workers`). What stays is the kind of processor: OpenBLAS has other kernels for each.
"""

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def one_thread(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which computes products and decompositions of numpy and scipy in one thread; those of torch are as they were."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _libraries("scipy.linalg" in sys.modules).limit(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return call


@cache
def _libraries(scipy: bool) -> Any:
    """What is loaded; looked for again once scipy has brought a library of its own."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
