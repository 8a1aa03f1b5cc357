"""Databases and records for the store's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from composer.store import Store
from tests.store.postgres import PostgresServer, running_server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for all tests that only need a running one; each gets a fresh database."""
    with running_server() as server:
        yield server


@pytest.fixture
async def postgres_url(postgres_server: PostgresServer) -> str:
    """An empty database on the shared server."""
    engine = create_async_engine(
        postgres_server.url.replace("postgresql", "postgresql+asyncpg"),
        isolation_level="AUTOCOMMIT",
    )
    async with engine.connect() as connection:
        await connection.execute(text("DROP DATABASE IF EXISTS composer WITH (FORCE)"))
        await connection.execute(text("CREATE DATABASE composer"))
    await engine.dispose()
    return postgres_server.url.rsplit("/", 1)[0] + "/composer"


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/db/composer.db"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest) -> str:
    """An empty database of either kind."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    store = Store(url)
    await store.start()
    yield store
    await store.close()
