"""Opening a database: durability settings, migrations, and a refusal of what is newer.

Device and catalogue both open theirs here, each with its own tables and migrations. SQLite runs in
WAL mode with ``synchronous=FULL``: what a transaction acknowledged is there after a power cut.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from adapter_store.errors import DatabaseTooNewError, DiskFullError, StoreError


def open_database(url: str, migrations: Path, *, durable: bool = True) -> Engine:
    """Open a database and bring its schema up to date.

    Args:
        url: An SQLAlchemy URL; SQLite or PostgreSQL.
        migrations: The directory with the Alembic scripts of its tables.
        durable: False trades the last moments before a power cut for speed (SQLite only).

    Raises:
        DatabaseTooNewError: A newer version wrote it; nothing was changed.
        StoreError: It cannot be opened.
    """
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        _tune(engine, "FULL" if durable else "NORMAL")
    try:
        _upgrade(engine, migrations)
    except (SQLAlchemyError, sqlite3.Error) as error:
        engine.dispose()
        raise StoreError(
            f"database {engine.url.render_as_string()} cannot be opened: {error.__cause__ or error}"
        ) from error
    return engine


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """One transaction: committed at the end, rolled back on any error.

    Raises:
        DiskFullError: The disk is full or failed; nothing of the transaction is kept.
    """
    try:
        with Session(engine) as session, session.begin():
            yield session
    except DBAPIError as error:
        text = str(error.orig)
        if "full" in text or "disk I/O" in text:
            raise DiskFullError(f"cannot write the database: {text}; free some space") from error
        raise


def _upgrade(engine: Engine, migrations: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    script = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    known = {revision.revision for revision in script.walk_revisions()}
    head = script.get_current_head()
    if found is not None and found not in known:
        engine.dispose()
        raise DatabaseTooNewError(
            f"database {engine.url.render_as_string()} has schema {found!r}, this version knows "
            f"up to {head!r}; install the version that wrote it, nothing was changed"
        )
    if found == head:
        return
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _tune(engine: Engine, synchronous: str) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: sqlite3.Connection, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout=10000")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute(f"PRAGMA synchronous={synchronous}")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()
