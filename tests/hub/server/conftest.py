"""A hub's database: an SQLite file, and PostgreSQL where a test asks for both."""

import pytest

from elmwood.hub.database import Database
from elmwood.hub.migrations import upgrade


@pytest.fixture
def database(tmp_path):
    url = f"sqlite:///{tmp_path}/hub.sqlite"
    upgrade(url)
    opened = Database(url)
    yield opened
    opened.close()
