"""A database URL becomes an async engine that never waits for ever. Knows no table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from composer.errors import StoreError
from composer.store.records import to_json

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
}

WRITES = "composer_writes"
"""Execution option of transactions that write. SQLite must know at BEGIN: a reader that turns
writer while another writes fails at once, whatever its busy timeout."""


def parse_url(url: str) -> URL:
    """The URL with the async driver filled in. Raises StoreError, with the remedy, for others."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StoreError(
            f"the database URL is not one ({error}); "
            "write sqlite:///path/to/file.db or postgresql://user@host/name"
        ) from None
    driver = _DRIVERS.get(parsed.drivername, parsed.drivername)
    if driver not in _DRIVERS.values():
        family = parsed.drivername.split("+")[0]
        remedy = (
            f"write {_DRIVERS[family]}://… instead"
            if family in _DRIVERS
            else "SQLite and PostgreSQL are supported"
        )
        raise StoreError(f"the database driver {parsed.drivername!r} cannot be used; {remedy}")
    parsed = parsed.set(drivername=driver)
    if driver == "sqlite+aiosqlite" and parsed.database in (None, "", ":memory:"):
        raise StoreError(
            "an in-memory SQLite database would forget everything between two connections; "
            "write sqlite:///path/to/file.db"
        )
    if "sslmode" in parsed.query:  # libpq's word, which hosted databases' URLs carry
        mode = parsed.query["sslmode"]
        parsed = parsed.difference_update_query(["sslmode"]).update_query_dict({"ssl": mode})
    return parsed


def make_engine(url: URL, *, timeout_s: float) -> AsyncEngine:
    """An engine not yet connected. `timeout_s` bounds connecting, each statement, waiting for a
    pooled connection and waiting for SQLite's write lock, each on its own.

    Raises StoreError when the folder of a SQLite file cannot be made.
    """
    options: dict[str, Any] = {
        "pool_pre_ping": True,
        "pool_timeout": timeout_s,
        "pool_size": 5,
        "max_overflow": 0,
        "json_serializer": lambda value: to_json(value).decode(),
    }
    if url.get_backend_name() == "postgresql":
        connect = {"timeout": timeout_s, "command_timeout": timeout_s}
        return create_async_engine(url, connect_args=connect, **options)

    assert url.database is not None
    folder = Path(url.database).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the database folder {folder} cannot be made: {error}; "
            "make it writable, or set COMPOSER_DATABASE_URL to another file"
        ) from error
    engine = create_async_engine(url, connect_args={"timeout": timeout_s}, **options)
    sa.event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    sa.event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:
    # The driver's own transactions leave DDL outside; ours begin in `_begin_sqlite`.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a commit survives a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
