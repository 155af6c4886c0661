"""One seed at several trusted sites: DiLoCo and Streaming DiLoCo over torchft. Never exposed to strangers: see docs/sites.md.

Importing this raises MissingExtra where torchft is not installed.
"""

import logging
import os

from elmwood.registry import require

os.environ.setdefault("RUST_LOG", "error")  # read when torchft is imported: else it reports every message that it sends
logging.getLogger("torchft").setLevel(logging.CRITICAL)  # and errors from which it recovers, with their stack
require("torchft.manager", "diloco")
