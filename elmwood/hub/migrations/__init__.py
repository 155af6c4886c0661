"""The schema's history (Alembic). A hub brings its database to the newest revision when it starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, insert, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from elmwood.hub.events import START
from elmwood.hub.tables import chain, clock, metadata


def upgrade(url: str, to: str = "head") -> None:
    """Bring a database to a revision, the newest one; an empty one gets all tables. Several processes may do this at once."""
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    config, scripts = Config(), ScriptDirectory(str(Path(__file__).parent))
    with changing(url, 7368001) as connection:
        with EnvironmentContext(config, scripts, fn=lambda now, _: scripts._upgrade_revs(to, now)) as context:
            context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
            context.run_migrations()
        if begin_chain(connection):
            connection.execute(insert(clock).values(id=1, uptime=0.0))


@contextmanager
def changing(url: str, lock: int) -> Iterator[Connection]:
    """A transaction that changes tables, one at a time: `lock` is its number among PostgreSQL's advisory locks."""
    engine = create_engine(make_url(url), poolclass=NullPool)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({lock})")
            else:
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            yield connection
    finally:
        engine.dispose()


def begin_chain(connection: Connection) -> bool:
    """Write the first row of the chain of events where there is none; whether there was none."""
    missing = connection.execute(chain.select()).first() is None
    if missing:
        connection.execute(insert(chain).values(id=1, number=0, hash=START))
    return missing


def revision(url: str) -> str | None:
    """The revision of a database; None where it has no tables."""
    engine = create_engine(make_url(url), poolclass=NullPool)
    try:
        with engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    finally:
        engine.dispose()
