"""The catalogue's tables: what migrations make is what the code uses, on either database."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Table, create_mock_engine, select
from sqlalchemy.schema import CreateTable

from adapter_store.database import open_database
from adapter_store.errors import DatabaseTooNewError
from cloud.models import AuditRow, BundleRow, CatalogueBase
from cloud.service import MIGRATIONS

POSTGRESQL = create_mock_engine("postgresql://", lambda *_: None).dialect


def test_migrations_make_the_tables_that_the_code_uses(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'catalogue.db'}", MIGRATIONS)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, CatalogueBase.metadata) == []
    engine.dispose()


def test_a_database_of_a_newer_version_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.db"
    engine = open_database(f"sqlite:///{path}", MIGRATIONS)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    before = path.read_bytes()
    with pytest.raises(DatabaseTooNewError, match="'9999'"):
        open_database(f"sqlite:///{path}", MIGRATIONS)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["catalogue.db"]


@pytest.mark.parametrize("table", CatalogueBase.metadata.sorted_tables, ids=lambda t: t.name)
def test_every_table_can_be_made_in_postgresql(table: Table) -> None:
    statement = str(CreateTable(table).compile(dialect=POSTGRESQL))
    assert "BLOB" not in statement
    if table is AuditRow.__table__:
        assert "number SERIAL" in statement


def test_the_beginning_of_an_id_is_no_pattern_in_postgresql() -> None:
    query = select(BundleRow).where(BundleRow.digest.startswith("a%_", autoescape=True))
    compiled = query.compile(dialect=POSTGRESQL)
    assert compiled.params == {"digest_1": "a/%/_"}
    assert "ESCAPE '/'" in str(compiled)
