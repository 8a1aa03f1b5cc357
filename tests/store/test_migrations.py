"""Any older database, an empty one too, becomes the schema that tables.py describes."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from composer.errors import StoreError
from composer.store import Feedback, Store
from composer.store.engine import parse_url
from composer.store.migrate import revisions
from composer.store.tables import metadata
from tests.store.records import NOON, failed_record, full_record, make_record

FIXTURES = Path(__file__).parent / "fixtures"
OLDEST = "0001"


def connect(url: str) -> AsyncEngine:
    return create_async_engine(parse_url(url))


async def differences(url: str) -> list[Any]:
    """What alembic would change to make the database what tables.py describes."""

    def compare(connection: Connection) -> list[Any]:
        options = {"compare_type": True, "compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)

    engine = connect(url)
    async with engine.connect() as connection:
        found = await connection.run_sync(compare)
    await engine.dispose()
    return found


async def version(url: str) -> str:
    engine = connect(url)
    async with engine.connect() as connection:
        found = (await connection.execute(text("SELECT version_num FROM alembic_version"))).scalar()
    await engine.dispose()
    return str(found)


async def restore(url: str) -> None:
    """The database as version 0001 left it, with rows."""
    if url.startswith("sqlite"):
        path = Path(url.removeprefix("sqlite:///"))
        path.parent.mkdir()
        database = sqlite3.connect(path)
        database.executescript((FIXTURES / f"schema_{OLDEST}.sqlite.sql").read_text())
        database.close()
        return
    engine = connect(url)
    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        await driver.execute((FIXTURES / f"schema_{OLDEST}.postgres.sql").read_text())
        # The dump empties its session's search path, which this connection must not keep.
        await connection.invalidate()
    await engine.dispose()


def test_migrations_are_numbered_without_gaps_from_the_oldest() -> None:
    found = revisions()
    assert found == tuple(f"{i + 1:04d}" for i in range(len(found)))
    assert found[0] == OLDEST


async def test_an_empty_database_becomes_what_the_tables_say(url: str) -> None:
    store = Store(url)
    await store.start()
    await store.close()
    assert await differences(url) == []
    assert await version(url) == revisions()[-1]


async def test_the_oldest_database_keeps_its_rows_and_becomes_the_newest(url: str) -> None:
    await restore(url)
    assert await version(url) == OLDEST
    store = Store(url)
    await store.start()
    for record in (make_record("plain"), full_record("full"), failed_record("failed")):
        assert await store.get_request(record.id) == record
    kept = Feedback("full", 0.75, "mine", "good", {"lang": "en"}, NOON)
    assert await store.feedback_for("full") == [kept]
    assert await store.list_experts() == [{"id": "shout", "server": "tiny"}]

    await store.add_requests([make_record("new")])
    await store.add_feedback(Feedback.checked("plain", 1))
    await store.close()
    assert await differences(url) == []
    assert await version(url) == revisions()[-1]


async def test_a_newer_database_is_refused_untouched(url: str) -> None:
    store = Store(url)
    await store.start()
    await store.close()
    engine = connect(url)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await engine.dispose()
    with pytest.raises(StoreError, match="made by a newer version"):
        await Store(url).start()
    assert await version(url) == "9999"


async def test_a_migration_that_fails_leaves_nothing_behind(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last table of the first version cannot be made: then none of them is."""
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir()
    engine = connect(url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE experts (mine TEXT)"))
    with pytest.raises(StoreError, match=r"experts.* already exists"):
        await Store(url).start()
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE experts"))
    await engine.dispose()
    store = Store(url)
    await store.start()
    await store.close()
    assert await differences(url) == []


async def test_processes_that_boot_together_take_turns(url: str) -> None:
    script = (
        "import asyncio, sys\n"
        "from composer.store import Store\n"
        "async def main():\n"
        "    store = Store(sys.argv[1], timeout_s=30)\n"
        "    print('ready', flush=True); sys.stdin.readline()\n"
        "    await store.start(); await store.ping(); await store.close()\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script, url]
    pipe = subprocess.PIPE

    def boot() -> list[tuple[int, str]]:
        booting = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            for _ in range(3)
        ]
        for process in booting:
            assert process.stdout is not None
            process.stdout.readline()
        for process in booting:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        errors = [process.communicate()[1] for process in booting]
        return [(p.returncode, error) for p, error in zip(booting, errors, strict=True)]

    assert await asyncio.to_thread(boot) == [(0, "")] * 3
    assert await differences(url) == []
