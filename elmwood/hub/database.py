"""The database of a hub, SQLite or PostgreSQL by URL: one writer thread with group commit, and readers beside it.

A write is a function of a connection. The writer takes all that wait, runs them in one transaction, commits, and only then answers: one
fsync serves many (`synchronous=FULL` on SQLite). Where one of them fails after it changed something, all are undone and run again, each
inside a savepoint, so that it is undone alone: a write may run twice. On PostgreSQL the transaction begins by locking the one row of the
log's end, so the batches of several hub processes follow one another. Either way writes are in one order, and no write sees another's half.

Statements are SQLAlchemy Core, compiled once and run by the driver: `Connection.all(select(...))` gives mappings.
"""

import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Table, bindparam, insert, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.sql import ClauseElement

from elmwood.errors import BadInput, DoesNotFit, ElmwoodError, MissingExtra
from elmwood.hub.tables import chain

T = TypeVar("T")
BATCH = 512  # writes in one transaction, at most
DIALECTS = {"sqlite": sqlite.dialect(paramstyle="named"), "postgresql": postgresql.dialect(paramstyle="pyformat")}
_MOVE = update(chain).where(chain.c.id == 1).values(number=bindparam("number"), hash=bindparam("hash"))


class Unavailable(ElmwoodError):
    """The database does not answer now. Nothing was written."""


class Again(Exception):
    """A write must be undone alone, and there is no savepoint."""


class Connection:
    """A connection of a driver that runs statements of SQLAlchemy Core. Rows are mappings. `kept`: for values parsed from rows that never
    change, which connections of one database share."""

    def __init__(self, raw: Any, dialect: str, kept: dict[Any, Any] | None = None):
        self.raw, self.dialect = raw, dialect
        self.cursor = raw.cursor()
        self.end: tuple[int, str] | None = None  # number and hash of the log's last event, as this transaction leaves it
        self.kept = {} if kept is None else kept
        self.changes = 0  # statements that may have changed a row
        self.savepoint = True  # whether each write has one, named `one`

    def run(self, statement: ClauseElement | str, /, **values: Any) -> Any:
        """Run a statement; the cursor has the rows, and `rowcount`."""
        if isinstance(statement, str):
            return self.cursor.execute(statement)
        text, defaults = _compile(statement, self.dialect)
        self.changes += statement.is_dml  # type: ignore[attr-defined]
        return self.cursor.execute(text, {**defaults, **values} if defaults else values)

    def all(self, statement: ClauseElement, /, **values: Any) -> list[Any]:
        return self.run(statement, **values).fetchall()

    def one(self, statement: ClauseElement, /, **values: Any) -> Any:
        """The first row, or None."""
        return self.run(statement, **values).fetchone()

    def value(self, statement: ClauseElement, /, **values: Any) -> Any:
        """The first column of the first row, or None."""
        row = self.run(statement, **values).fetchone()
        return None if row is None else next(iter(dict(row).values()))

    def changed(self, statement: ClauseElement, /, **values: Any) -> int:
        """How many rows it changed."""
        return self.run(statement, **values).rowcount

    def insert(self, table: Table, /, ignore: bool = False, **values: Any) -> int:
        """Insert a row. `ignore`: not where its key is there. Number of rows inserted."""
        self.changes += 1
        return self.cursor.execute(_compile_insert(table, tuple(values), ignore, self.dialect), values).rowcount

    def undo(self, end: tuple[int, str] | None) -> None:
        """Undo what this write did; `end` of the log was before it. Raises Again."""
        if not self.savepoint:
            raise Again
        self.run("ROLLBACK TO SAVEPOINT one")
        self.end = end


@lru_cache(2048)
def _compile(statement: ClauseElement, dialect: str) -> tuple[str, dict[str, Any]]:
    compiled: Any = statement.compile(dialect=DIALECTS[dialect])
    needed = set()
    for name, bind in compiled.binds.items():
        if bind.required or hasattr(bind, "given_later"):
            needed.add(name)
            bind.required, bind.given_later = False, True  # else SQLAlchemy wants values before it writes out `in_`
    compiled = statement.compile(dialect=DIALECTS[dialect], compile_kwargs={"render_postcompile": True})
    return str(compiled), {name: value for name, value in compiled.params.items() if name not in needed}


@lru_cache(2048)
def _compile_insert(table: Table, names: tuple[str, ...], ignore: bool, dialect: str) -> str:
    text = str(insert(table).compile(dialect=DIALECTS[dialect], column_keys=list(names)))
    return text + (" ON CONFLICT DO NOTHING" if ignore else "")


class Database:
    """`sqlite:///path` or `postgresql+psycopg://…`. Close it: its writer is a thread."""

    def __init__(self, url: str):
        parsed = make_url(url)
        self.url, self.dialect = url, parsed.get_backend_name()
        if self.dialect not in DIALECTS:
            raise BadInput(f"a hub has no use for the database {self.dialect!r}: sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME")
        self.path = Path(parsed.database) if self.dialect == "sqlite" and parsed.database else None
        self._waiting: queue.SimpleQueue[tuple[Callable[[Connection], Any], Future] | None] = queue.SimpleQueue()
        self._readers, self._lock = threading.local(), threading.Lock()
        self._opened: list[Connection] = []
        self._kept: dict[Any, Any] = {}
        self._writer: threading.Thread | None = None
        self.closed = False

    # ---- connections

    def connect(self) -> Connection:
        """A new connection, outside of any transaction."""
        try:
            raw = _open_sqlite(self.path) if self.dialect == "sqlite" else _open_postgres(self.url)
            return Connection(raw, self.dialect, self._kept)
        except (sqlite3.Error, OSError) as error:
            raise Unavailable(f"the database cannot be opened ({error}): look at its path, its owner and the disk") from error

    def read(self, fn: Callable[[Connection], T]) -> T:
        """Run a function that only reads; it sees one state of the database. One connection per thread."""
        connection = getattr(self._readers, "connection", None)
        if connection is None:
            connection = self._readers.connection = self.connect()
            with self._lock:
                self._opened.append(connection)
        begin = "BEGIN" if self.dialect == "sqlite" else "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
        try:
            connection.run(begin)
            try:
                return fn(connection)
            finally:
                connection.run("COMMIT")
        except Exception as error:
            if not _is_driver(error):
                raise
            self._drop(connection)
            raise _translate(error) from error

    def _drop(self, connection: Connection) -> None:
        self._readers.connection = None
        with suppress(Exception):
            connection.raw.close()
        with self._lock, suppress(ValueError):
            self._opened.remove(connection)

    # ---- writes

    def submit(self, fn: Callable[[Connection], T]) -> "Future[T]":
        """Queue a write; the future has its result once that is durable."""
        future: Future[T] = Future()
        with self._lock:
            if self.closed:
                raise Unavailable("the hub is stopping: ask again in a moment")
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_all, name="hub-writer", daemon=True)
                self._writer.start()
            self._waiting.put((fn, future))
        return future

    def write(self, fn: Callable[[Connection], T]) -> T:
        """Run a write and wait until it is durable."""
        return self.submit(fn).result()

    def close(self) -> None:
        """Finish what waits, and close all connections."""
        with self._lock:
            self.closed, writer = True, self._writer
            self._waiting.put(None)
        if writer:
            writer.join()
        for connection in self._opened:
            with suppress(Exception):
                connection.raw.close()

    def _write_all(self) -> None:
        connection: Connection | None = None
        while True:
            batch = [self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get())
            jobs = [one for one in batch if one is not None]
            try:
                connection = connection or self.connect()
                run_batch(connection, jobs)
            except Exception as error:
                failure = _translate(error)
                for _, future in jobs:
                    if not future.done():
                        future.set_exception(failure)
                with suppress(Exception):
                    assert connection is not None
                    connection.raw.close()
                connection = None
            if None in batch:
                if connection:
                    connection.raw.close()
                return


def run_batch(connection: Connection, jobs: list[tuple[Callable[[Connection], Any], Future]]) -> None:
    """Run writes in one transaction. A write that raises is undone alone. Raises what the driver raises where all is undone."""
    try:
        results = _run_all(connection, jobs, savepoints=False)
    except Again:
        results = _run_all(connection, jobs, savepoints=True)
    for (_, future), (result, raised) in zip(jobs, results, strict=True):
        if raised is None:
            future.set_result(result)
        else:
            future.set_exception(raised)


def _run_all(
    connection: Connection, jobs: list[tuple[Callable[[Connection], Any], Future]], savepoints: bool
) -> list[tuple[Any, Exception | None]]:  # fmt: skip
    """Results of writes, or what they raised. Raises Again: without savepoints, none of them was done."""
    results: list[tuple[Any, Exception | None]] = []
    connection.savepoint = savepoints
    with transaction(connection):
        for fn, _ in jobs:
            if savepoints:
                connection.run("SAVEPOINT one")
            end = connection.end
            try:
                results.append((fn(connection), None))
            except Again:
                raise
            except Exception as error:
                if _is_fatal(error):
                    raise
                connection.undo(end)
                results.append((None, error))
            if savepoints:
                connection.run("RELEASE SAVEPOINT one")
    return results


@contextmanager
def transaction(connection: Connection) -> Any:
    """One transaction that writes, alone. The end of the log is written once, at its end."""
    connection.end = None
    if connection.dialect == "sqlite":
        connection.run("BEGIN IMMEDIATE")
    else:
        connection.run("BEGIN")
        connection.run("SELECT number FROM chain WHERE id = 1 FOR UPDATE")
    try:
        yield
        if connection.end:
            connection.run(_MOVE, number=connection.end[0], hash=connection.end[1])
        connection.run("COMMIT")
    except BaseException:
        with suppress(Exception):
            connection.run("ROLLBACK")
        raise


# ---- drivers --------------------------------------------------------------------------------------------------------


def _open_sqlite(path: Path | None) -> sqlite3.Connection:
    raw = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False, timeout=30, cached_statements=512)
    raw.row_factory = sqlite3.Row
    for line in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        "busy_timeout = 30000",
        "wal_autocheckpoint = 4000",
        "cache_size = -65536",
    ):
        raw.execute(f"PRAGMA {line}")
    return raw


def _open_postgres(url: str) -> Any:
    try:
        import psycopg
        from psycopg.rows import dict_row
    except ImportError as error:
        raise MissingExtra("a hub on PostgreSQL needs psycopg: pip install 'elmwood[postgres]'") from error
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        return psycopg.connect(plain, autocommit=True, row_factory=dict_row, connect_timeout=10)
    except psycopg.Error as error:
        raise Unavailable(f"PostgreSQL cannot be reached ({str(error).splitlines()[0]}): is it running, and is the URL right?") from error


def _is_driver(error: Exception) -> bool:
    return isinstance(error, sqlite3.Error) or type(error).__module__.partition(".")[0] == "psycopg"


def _is_fatal(error: Exception) -> bool:
    """Whether nothing of the transaction can be kept: the disk is full, or the connection is lost."""
    if isinstance(error, sqlite3.Error):
        return not isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError)
    return _is_driver(error) and type(error).__name__ in ("OperationalError", "InterfaceError", "AdminShutdown", "DiskFull")


def _translate(error: Exception) -> Exception:
    """What the driver says, as an error of ours."""
    if not _is_driver(error):
        return error
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "full" in said or "No space left" in said or "I/O" in said:
        return DoesNotFit(f"the database's disk is full ({said}): make room; what was acknowledged is kept")
    return Unavailable(f"the database does not answer ({said}): ask again in a moment")
