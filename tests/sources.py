"""Sources of text for tests: sixty short documents, and JSON lines."""

import json

TEXTS = [f"Tree {n} grows {n * n} leaves, and its {n}th branch holds {n + 7} birds of kind {n % 3}." for n in range(60)]


def lines(*rows) -> bytes:
    """JSON lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
