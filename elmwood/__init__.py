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
    from elmwood.study.demo import demo
    from elmwood.study.exporting import export, verify
    from elmwood.study.fitting import fit
    from elmwood.study.merging import merge, state_add, state_finalize, state_make, state_remove
    from elmwood.study.mixing import loads, mix, tune
    from elmwood.study.page import report, show
    from elmwood.study.quality.admission import accept
    from elmwood.study.quality.contest import compare
    from elmwood.study.quality.evaluation import benchmark, evaluate
    from elmwood.study.quality.forest_table import table
    from elmwood.study.seeds import diloco, import_seed, seed_from, train_seed
    from elmwood.study.text import add, build, cluster, split, survey
    from elmwood.study.training import adopt, train
    from elmwood.study.training import compute_statistics as statistics

# module -> the names it gives; `function as verb` where they differ
FACE = {
    "elmwood.store": "Store",
    "elmwood.study.quality.admission": "accept",
    "elmwood.study.ancestry": "forest, generate, open_model",
    "elmwood.study.quality.contest": "compare",
    "elmwood.study.quality.evaluation": "benchmark, evaluate",
    "elmwood.study.demo": "demo",
    "elmwood.study.exporting": "export, verify",
    "elmwood.study.fitting": "fit",
    "elmwood.study.quality.forest_table": "table",
    "elmwood.study.merging": "merge, state_add, state_finalize, state_make, state_remove",
    "elmwood.study.mixing": "loads, mix, tune",
    "elmwood.study.page": "report, show",
    "elmwood.study.seeds": "diloco, import_seed, seed_from, train_seed",
    "elmwood.study.text": "add, build, cluster, split, survey",
    "elmwood.study.training": "adopt, train, compute_statistics as statistics",
}
PLACES = {
    one.rpartition(" ")[2]: (module, one.partition(" ")[0]) for module, names in FACE.items() for one in names.split(", ")
}  # verb -> module, function
__all__ = [
    "Store",
    "accept",
    "add",
    "adopt",
    "benchmark",
    "build",
    "cluster",
    "compare",
    "demo",
    "diloco",
    "evaluate",
    "export",
    "fit",
    "forest",
    "generate",
    "import_seed",
    "loads",
    "merge",
    "mix",
    "open_model",
    "report",
    "seed_from",
    "show",
    "split",
    "state_add",
    "state_finalize",
    "state_make",
    "state_remove",
    "statistics",
    "survey",
    "table",
    "train",
    "train_seed",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'elmwood' has no attribute {name!r}; it has {', '.join(__all__)}")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does: waiting threads that spin slow each other down
    from elmwood.report.notebook import draw_records

    draw_records()
    module, function = PLACES[name]
    found = globals()[name] = getattr(import_module(module), function)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})


class _Face(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Importing a room binds it here. Where a verb has the name of a room (`merge`), the name is the verb's.

        So a room is imported by its modules: `from elmwood.merge.checkpoint import merge`, never `from elmwood import merge`.
        """
        if not (name in PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
