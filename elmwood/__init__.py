"""One language model grown out of many small experts.

`import elmwood as ew` has the verbs of the command line as functions, with the same options and defaults. They take names, digests or
records, and return records; `docs/python.md` is the tour. Each is imported when it is first used, so importing elmwood costs nothing.
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from elmwood.store import Store
    from elmwood.study.ancestry import forest, generate, open_model

# name -> the module it lives in
FACE = {
    "Store": "elmwood.store",
    "forest": "elmwood.study.ancestry",
    "generate": "elmwood.study.ancestry",
    "open_model": "elmwood.study.ancestry",
}
__all__ = ["Store", "forest", "generate", "open_model"]


def __getattr__(name: str) -> Any:
    if name not in FACE:
        raise AttributeError(f"module 'elmwood' has no attribute {name!r}; it has {', '.join(__all__)}")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does: waiting threads that spin slow each other down
    from elmwood.report.notebook import draw_records

    draw_records()
    found = globals()[name] = getattr(import_module(FACE[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *FACE})


class _Face(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Importing a room binds it here. Where a verb has the name of a room (`merge`), the name is the verb's.

        So a room is imported by its modules: `from elmwood.merge.checkpoint import merge`, never `from elmwood import merge`.
        """
        if not (name in FACE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
