"""Opening a database: durability settings, migrations, and a refusal of what is newer.

Device and catalogue both open theirs here, each with its own tables and migrations. SQLite runs in
WAL mode with ``synchronous=FULL``: what a transaction acknowledged is there after a power cut. A
migration is one transaction too, so that a process killed in the middle leaves the old schema.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.orm import Session

from adapter_store.errors import DiskFullError, StoreError

# The execution option of connections that only read.
READ_ONLY: Final = "driftkeel_reads"
_VERSION_TABLE: Final = "alembic_version"
_BUSY_TIMEOUT_S: Final = 10.0
# What SQLite says when a write did not reach the disk (SQLITE_FULL, SQLITE_IOERR, SQLITE_READONLY).
_DISK: Final = ("is full", "disk I/O", "readonly database", "unable to open database file")


def open_database(url: str, migrations: Path, *, durable: bool = True) -> Engine:
    """Open a database and bring its schema up to date.

    Args:
        url: An SQLAlchemy URL; SQLite or PostgreSQL.
        migrations: The directory with the Alembic scripts of its tables.
        durable: False trades the last moments before a power cut for speed (SQLite only).

    Raises:
        DatabaseTooNewError: A newer version wrote it; nothing was changed.
        DiskFullError: The disk is full or failed; the schema is what it was.
        StoreError: It cannot be opened.
    """
    try:
        engine = create_engine(url)
    except (SQLAlchemyError, ModuleNotFoundError) as error:
        raise StoreError(f"database URL cannot be used: {error}") from error
    if engine.dialect.name == "sqlite":
        _tune(engine, "FULL" if durable else "NORMAL")
    try:
        _upgrade(engine, migrations)
        if engine.dialect.name == "sqlite":
            with engine.connect() as connection:
                # Kept in the file, so it comes only once the file is known to be ours.
                connection.connection.execute("PRAGMA journal_mode=WAL")
    except (SQLAlchemyError, sqlite3.Error) as error:
        engine.dispose()
        raise _translated(error, engine) from error
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """One transaction that may write: committed at the end, rolled back on any error.

    On SQLite it takes the write lock at once, so what it reads first is still true when it writes.

    Raises:
        DiskFullError: The disk is full or failed; nothing of the transaction is kept.
        StoreError: The database is locked for too long, or damaged; nothing is kept.
    """
    with _session(engine) as session:
        yield session


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """One consistent view of the database that never waits for a writer.

    Raises:
        DiskFullError: The disk failed.
        StoreError: The database is damaged.
    """
    with _session(engine.execution_options(**{READ_ONLY: True})) as session:
        yield session


@contextmanager
def _session(engine: Engine) -> Iterator[Session]:
    try:
        with Session(engine) as session, session.begin():
            yield session
    except (IntegrityError, ProgrammingError):
        # Mistakes of the caller, for the caller to see as they are.
        raise
    except (DBAPIError, sqlite3.Error) as error:
        raise _translated(error, engine) from error


def _translated(error: Exception, engine: Engine) -> StoreError:
    name = engine.url.render_as_string()
    text = str(getattr(error, "orig", None) or error)
    if any(sign in text for sign in _DISK):
        return DiskFullError(
            f"cannot write database {name}: {text}; free some space, nothing was changed"
        )
    return StoreError(f"database {name} cannot be used: {text}")


def _upgrade(engine: Engine, migrations: Path) -> None:
    newest = max(path.name for path in (migrations / "versions").glob("*.py")).partition("_")[0]
    with engine.execution_options(**{READ_ONLY: True}).connect() as connection:
        if not inspect(connection).has_table(_VERSION_TABLE):
            found = None
        else:
            found = connection.exec_driver_sql(f"SELECT version_num FROM {_VERSION_TABLE}").scalar()  # noqa: S608 - a constant
    if found == newest:
        return
    # Megabytes of modules that are needed once for each version of the schema.
    from adapter_store.migrating import upgrade  # noqa: PLC0415

    upgrade(engine, migrations)


def _tune(engine: Engine, synchronous: str) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: sqlite3.Connection, _: Any) -> None:
        # The driver must not begin transactions by itself: it would not do so before DDL, and a
        # migration that is killed in the middle would leave half of its tables.
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout={int(_BUSY_TIMEOUT_S * 1000)}")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get(READ_ONLY)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
