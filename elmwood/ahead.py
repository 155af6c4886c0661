"""Imported by the process whose copies workers are (elmwood.engine.prepare): it imports the modules that AHEAD names.

`module:function` calls a function too. What is wrong is said by the task that needs it.
"""

import gc
import os
from contextlib import suppress
from importlib import import_module

from elmwood.engine import AHEAD

gc.disable()  # nothing that is imported is garbage
for name in os.environ.pop(AHEAD, "").split():
    with suppress(Exception):
        module, _, function = name.partition(":")
        found = import_module(module)
        if function:
            getattr(found, function)()
gc.freeze()  # the memory stays common to all copies
gc.enable()
