"""A database opens whole, at the right version, or not at all; a failing disk is named."""

import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from adapter_store.database import open_database, reading, transaction
from adapter_store.errors import DatabaseTooNewError, DiskFullError, StoreError
from adapter_store.models import DeviceBase, SettingRow
from adapter_store.state import MIGRATIONS


@pytest.fixture
def url(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture
def engine(url):
    engine = open_database(url, MIGRATIONS)
    yield engine
    engine.dispose()


def put(engine, key, value="1") -> None:
    with transaction(engine) as session:
        session.add(SettingRow(key=key, value=value))


def keys(engine) -> list[str]:
    with reading(engine) as session:
        return list(session.scalars(sa.select(SettingRow.key).order_by(SettingRow.key)))


def test_the_migrations_make_the_tables_that_the_code_knows(engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, DeviceBase.metadata) == []


def test_what_is_owed_survives_a_power_cut_and_the_journal_is_quick(url, engine) -> None:
    quick = open_database(url, MIGRATIONS, durable=False)
    modes = []
    for opened in (engine, quick):
        with opened.connect() as connection:
            modes.append(
                [
                    connection.exec_driver_sql(f"PRAGMA {pragma}").scalar()
                    for pragma in ("journal_mode", "synchronous", "foreign_keys")
                ]
            )
    assert modes == [["wal", 2, 1], ["wal", 1, 1]]
    quick.dispose()


def test_opening_again_changes_nothing(url, engine) -> None:
    put(engine, "a")
    again = open_database(url, MIGRATIONS)
    assert keys(again) == ["a"]
    again.dispose()


def test_a_failed_transaction_leaves_nothing(engine) -> None:
    def dies() -> None:
        with transaction(engine) as session:
            session.add(SettingRow(key="a", value="1"))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dies()
    assert keys(engine) == []


def test_a_database_of_a_newer_version_is_refused_and_untouched(url, engine, tmp_path) -> None:
    put(engine, "a")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0999'")
    engine.dispose()
    with sqlite3.connect(tmp_path / "test.db") as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    before = (tmp_path / "test.db").read_bytes()
    with pytest.raises(DatabaseTooNewError, match=r"schema '0999'.*knows up to '\d+'"):
        open_database(url, MIGRATIONS)
    assert (tmp_path / "test.db").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["test.db"]


def test_a_file_that_is_no_database_is_refused_and_untouched(url, tmp_path) -> None:
    (tmp_path / "test.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(StoreError, match="not a database"):
        open_database(url, MIGRATIONS)
    assert (tmp_path / "test.db").read_bytes() == b"something else entirely" * 100


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(StoreError, match="URL"):
        open_database("not a url", MIGRATIONS)


def test_a_migration_that_dies_in_the_middle_leaves_the_old_schema(url, tmp_path) -> None:
    broken = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, broken, ignore=shutil.ignore_patterns("__pycache__"))
    (broken / "versions/9999_broken.py").write_text(
        '"""Dies."""\n'
        "import sqlalchemy as sa\n"
        "from alembic import op\n"
        'revision, down_revision = "9999", "0002"\n'
        "def upgrade():\n"
        '    op.create_table("half", sa.Column("x", sa.Integer()))\n'
        '    raise RuntimeError("power cut")\n'
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match="power cut"):
            open_database(url, broken)
        with sqlite3.connect(tmp_path / "test.db") as connection:
            assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
        connection.close()
    engine = open_database(url, MIGRATIONS)
    put(engine, "a")
    engine.dispose()
    with pytest.raises(RuntimeError, match="power cut"):
        open_database(url, broken)
    engine = open_database(url, MIGRATIONS)
    assert keys(engine) == ["a"]
    engine.dispose()


def test_a_full_disk_is_named_and_keeps_what_was_there(engine) -> None:
    put(engine, "a")

    @sa.event.listens_for(engine, "begin")
    def _full(connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    with pytest.raises(DiskFullError, match=r"full.*free some space"):
        put(engine, "b", "x" * 100_000)
    assert keys(engine) == ["a"]
    put(engine, "c")
    assert keys(engine) == ["a", "c"]


def test_writers_in_many_threads_do_not_lose_each_others_work(url, engine) -> None:
    quick = open_database(url, MIGRATIONS, durable=False)
    put(engine, "count", "0")

    def count_up(own) -> None:
        for _ in range(20):
            with transaction(own) as session:
                row = session.get_one(SettingRow, "count")
                row.value = str(int(row.value) + 1)

    threads = [threading.Thread(target=count_up, args=(own,)) for own in (engine, quick) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with reading(engine) as session:
        assert session.get_one(SettingRow, "count").value == "80"
    quick.dispose()


def test_readers_do_not_wait_for_a_writer(engine) -> None:
    put(engine, "a")
    with transaction(engine) as session:
        session.add(SettingRow(key="b", value="1"))
        session.flush()
        seen = []
        thread = threading.Thread(target=lambda: seen.extend(keys(engine)))
        thread.start()
        thread.join()
    assert seen == ["a"]
    assert keys(engine) == ["a", "b"]


@pytest.mark.parametrize("folder", ["adapter_store", "cloud"])
def test_a_revision_is_named_as_its_file_begins(folder: str) -> None:
    scripts = ScriptDirectory(str(MIGRATIONS.parents[1] / folder / "migrations"))
    found = list(scripts.walk_revisions())
    assert found
    for revision in found:
        assert Path(revision.path).name.startswith(f"{revision.revision}_")
    assert scripts.get_current_head() == max(revision.revision for revision in found)


def test_a_schema_that_is_the_newest_loads_no_migrations(url, engine) -> None:
    del engine
    code = (
        "import sys; from pathlib import Path; from adapter_store.database import open_database; "
        f"open_database({url!r}, Path({str(MIGRATIONS)!r})).dispose(); "
        "sys.exit('alembic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
