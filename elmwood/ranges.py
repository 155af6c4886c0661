"""The values that an option may have, written once: in the signature of the function that takes it. A call checks them before it works.

@checked
def compare(a: str, b: str, *, alpha: ErrorRate = 0.05) -> Contest: ...
"""

import inspect
import math
import os
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, NamedTuple, ParamSpec, TypeVar, get_args, get_type_hints

from elmwood.errors import BadInput

P = ParamSpec("P")
R = TypeVar("R")


class Between(NamedTuple):
    """A range of finite numbers, with its ends unless `inside`; `zero`: or 0. None passes: it stands for a default."""

    low: float
    high: float = math.inf
    inside: bool = False
    zero: bool = False

    def check(self, name: str, value: float | None) -> None:
        """Raises BadInput."""
        if value is None or (self.zero and value == 0):
            return
        if not math.isfinite(value) or not (self.low < value < self.high if self.inside else self.low <= value <= self.high):
            raise BadInput(f"{name.replace('_', '-')} is {value}: choose {self}{'' if math.isfinite(value) else ', and finite'}")

    def __str__(self) -> str:
        low, high = (f"{end:.0f}" if float(end).is_integer() and abs(end) < 1e16 else f"{end:g}" for end in (self.low, self.high))
        if math.isinf(self.high):
            words = f"a number above {low}" if self.inside else f"{low} or more"
        else:
            words = f"a number between {low} and {high}" if self.inside else f"a number from {low} to {high}"
        return f"0, or {words}" if self.zero else words


class NewFile(NamedTuple):
    """A file that can be written; `folder`: a folder that can be made, with those above it."""

    folder: bool = False

    def check(self, name: str, value: Path | str | None) -> None:
        """Raises BadInput."""
        if value is None:
            return
        path, option = Path(value), name.replace("_", "-")
        above = next((one for one in path.absolute().parents if os.path.lexists(one)), Path("/")) if self.folder else path.absolute().parent
        if not above.is_dir():
            raise BadInput(f"{option} is {path}: {above} is no folder; make it, or name another place")
        if not os.access(above, os.W_OK | os.X_OK):
            raise BadInput(f"{option} is {path}: nothing can be written in {above}; name another place")
        if path.exists() and (path.is_dir() != self.folder or not os.access(path, os.W_OK)):
            raise BadInput(f"{option} is {path}, which is there and cannot be written as a {self}; name another place")

    def __str__(self) -> str:
        return "folder" if self.folder else "file"


Checks = (Between, NewFile)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which first compares each argument with the range in its annotation. A call raises BadInput."""

    @cache
    def ranges() -> dict[str, list[Between | NewFile]]:
        hints = get_type_hints(function, include_extras=True)
        return {name: [one for one in get_args(hint)[1:] if isinstance(one, Checks)] for name, hint in hints.items()}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in inspect.signature(function).bind(*args, **kwargs).arguments.items():
            for one in ranges().get(name, ()):
                one.check(name, value)
        return function(*args, **kwargs)

    return call


Count = Annotated[int, Between(1)]
ErrorRate = Annotated[float, Between(0, 1, inside=True)]  # probability of a wrong answer
Documents = Annotated[int | None, Between(4)]  # held-out ones: two to tune on, two to report on
Window = Annotated[int | None, Between(2)]  # tokens
RngSeed = Annotated[int, Between(0, 2**32 - 1)]
