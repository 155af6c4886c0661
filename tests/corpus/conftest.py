"""A store, and a source of sixty short documents."""

import pytest
from sources import TEXTS, lines

from elmwood.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "trees.jsonl"
    path.write_bytes(lines(*({"text": text, "source": "woods", "licence": "CC0"} for text in TEXTS)))
    return str(path)
