"""PostgreSQL for whatever keeps its state in a database."""

import itertools

import pytest

from tests.hub.server import services

_number = itertools.count()


@pytest.fixture(scope="session")
def postgres():
    with services.postgres() as url:
        yield url


@pytest.fixture
def new_database(postgres):
    """The URL of a new, empty database of PostgreSQL."""
    return services.create_database(postgres, f"test{next(_number)}")
