"""One seed at several trusted sites: DiLoCo and Streaming DiLoCo over torchft. Never exposed to strangers: see docs/sites.md."""

import logging
import os

os.environ.setdefault("RUST_LOG", "error")  # torchft reports every message that it sends
logging.getLogger("torchft").setLevel(logging.CRITICAL)  # and errors from which it recovers, with their stack
