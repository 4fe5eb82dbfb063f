"""Migrating a database, with Alembic; loaded only where a schema is not the newest.

A revision's name is the number that its file's name begins with: `adapter_store.database` tells by
it whether there is anything to do.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command, context
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, MetaData

from adapter_store.database import READ_ONLY
from adapter_store.errors import DatabaseTooNewError


def upgrade(engine: Engine, migrations: Path) -> None:
    """Bring a database's schema up to date, one transaction a migration.

    Args:
        engine: The database.
        migrations: The directory with the Alembic scripts of its tables.

    Raises:
        DatabaseTooNewError: A newer version wrote it; nothing was changed.
    """
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    script = ScriptDirectory.from_config(config)
    known = {revision.revision for revision in script.walk_revisions()}
    head = script.get_current_head()
    with engine.execution_options(**{READ_ONLY: True}).connect() as connection:
        found = MigrationContext.configure(connection).get_current_heads()
    _refuse_newer(engine, found, known, head)
    if found == (head,):
        return
    with engine.begin() as connection:
        # Another process may have migrated it while this one waited for the lock.
        found = MigrationContext.configure(connection).get_current_heads()
        _refuse_newer(engine, found, known, head)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def run_migrations(metadata: MetaData) -> None:
    """What an Alembic ``env.py`` calls: run the migrations on `open_database`'s connection.

    Args:
        metadata: The tables as the code knows them.
    """
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=metadata,
        render_as_batch=True,
        # The connection's transaction is real on SQLite too: all of a migration, or nothing.
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _refuse_newer(
    engine: Engine, found: tuple[str, ...], known: set[str], head: str | None
) -> None:
    unknown = sorted(set(found) - known)
    if unknown:
        raise DatabaseTooNewError(
            f"database {engine.url.render_as_string()} has schema {unknown[0]!r}, this version "
            f"knows up to {head!r}; install the version that wrote it, nothing was changed"
        )
