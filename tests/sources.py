"""Sources of text for tests: sixty short documents, and JSON lines."""

import json
import lzma
from pathlib import Path

from elmwood.corpus.read import SAMPLE

TEXTS = [f"Tree {n} grows {n * n} leaves, and its {n}th branch holds {n + 7} birds of kind {n % 3}." for n in range(60)]


def lines(*rows) -> bytes:
    """JSON lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_sample(path: Path) -> None:
    """A thirtieth of the bundled text: real prose and code on each of its topics, the beginning of every sixth document."""
    with lzma.open(SAMPLE, "rt", encoding="utf-8") as file, path.open("wb") as small:
        for number, line in enumerate(file):
            row = json.loads(line)
            if number % 6 == 0:
                small.write(lines(row | {"text": row["text"][:700]}))
