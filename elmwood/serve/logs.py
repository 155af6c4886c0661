"""The log: one line of JSON, or of text, for each request. What people wrote is never in it."""

import json
import logging
import sys
from datetime import UTC, datetime

from elmwood.errors import UnknownName

logger = logging.getLogger("elmwood.serve")
KINDS = ("json", "text", "none")


class Lines(logging.Formatter):
    """A record as one line."""

    def __init__(self, as_json: bool):
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        fields |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        if self.as_json:
            return json.dumps(fields, ensure_ascii=False, default=str)
        return " ".join(str(value) if name in ("time", "level", "event") else f"{name}={value}" for name, value in fields.items())


class Stderr(logging.StreamHandler):
    """Writes to what stderr is then. What it was when the log began may be closed, and each line would become a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def start_log(kind: str) -> None:
    """Log to stderr from now on. Raises UnknownName."""
    if kind not in KINDS:
        raise UnknownName(f"no log {kind!r}; have {', '.join(KINDS)}")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO)
    handler: logging.Handler = logging.NullHandler() if kind == "none" else Stderr()
    handler.setFormatter(Lines(kind == "json"))
    logger.addHandler(handler)
