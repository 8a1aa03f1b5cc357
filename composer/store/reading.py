"""The database for those who only look: what was asked, answered and said of it. Writes nothing,
not even a newer schema."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from alembic.migration import MigrationContext
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from composer.errors import ComposerError, StoreError
from composer.store import migrate
from composer.store.engine import parse_url
from composer.store.failures import translate
from composer.store.records import Feedback, Record
from composer.store.rows import feedback_of, record_of
from composer.store.tables import feedback, requests

_PAGE = 500


@dataclass(frozen=True, slots=True)
class Census:
    """Numbers of requests: all, those with feedback, and of these those whose text was stored."""

    requests: int
    judged: int
    judged_with_text: int


class Reading:
    """`async with Reading(url) as reading`. Beside a running service it is one more reader.

    Raises StoreError when there is no such database, it does not answer within `timeout_s`
    seconds, or its schema is not the newest. `name` is the URL without its password."""

    def __init__(self, url: str, *, timeout_s: float = 30.0) -> None:
        self._url = parse_url(url)
        self.name = self._url.render_as_string(hide_password=True)
        self._timeout_s = timeout_s
        self._engine: AsyncEngine | None = None

    async def __aenter__(self) -> Self:
        self._engine = _engine(self._url, self._timeout_s)
        try:
            await self._check_schema()
        except BaseException:
            await self._engine.dispose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._engine is not None
        await self._engine.dispose()

    async def census(self) -> Census:
        judged = requests.c.id.in_(sa.select(feedback.c.response_id))
        with_text = requests.c.messages.is_not(sa.null())
        rows = await self._rows(
            sa.select(
                sa.func.count(),
                sa.func.count().filter(judged),
                sa.func.count().filter(judged & with_text),
            ).select_from(requests)
        )
        total, judged_, text_ = rows[0]
        return Census(total, judged_, text_)

    async def judged(self) -> AsyncIterator[tuple[Record, list[Feedback]]]:
        """The requests that have feedback, oldest first, each with all of it, oldest first. Reads a
        page at a time, so that a slow reader holds no transaction open."""
        key = sa.tuple_(requests.c.created, requests.c.id)
        query = (
            sa.select(requests)
            .where(requests.c.id.in_(sa.select(feedback.c.response_id)))
            .order_by(requests.c.created, requests.c.id)
            .limit(_PAGE)
        )
        page_query = query
        while True:
            records = [record_of(row._asdict()) for row in await self._rows(page_query)]
            said: dict[str, list[Feedback]] = {record.id: [] for record in records}
            of_page = (
                sa.select(feedback)
                .where(feedback.c.response_id.in_(list(said)))
                .order_by(feedback.c.created, feedback.c.id)
            )
            for row in await self._rows(of_page):
                item = feedback_of(row._asdict())
                said[item.response_id].append(item)
            for record in records:
                yield record, said[record.id]
            if len(records) < _PAGE:
                return
            last = sa.tuple_(
                sa.literal(records[-1].created, requests.c.created.type), sa.literal(records[-1].id)
            )
            page_query = query.where(key > last)

    async def _check_schema(self) -> None:
        assert self._engine is not None
        newest = migrate.revisions()[-1]
        try:
            async with self._engine.connect() as connection:
                found = await connection.run_sync(
                    lambda sync: MigrationContext.configure(sync).get_current_revision()
                )
        except Exception as error:
            raise self._ours(error) from error
        if found is None:
            raise StoreError(
                f"{self.name} is no database of the service; correct the URL, or let the service "
                "run on it first"
            )
        if found != newest:
            raise StoreError(
                f"{self.name} has the schema {found}, this version reads {newest}; start the "
                "service of this version once, which brings it there, or use the version that "
                "made it"
            )

    async def _rows(self, query: sa.Select[*tuple[Any, ...]]) -> list[sa.Row[*tuple[Any, ...]]]:
        assert self._engine is not None
        try:
            async with self._engine.connect() as connection:
                return list(await connection.execute(query))
        except Exception as error:
            raise self._ours(error) from error

    def _ours(self, error: Exception) -> ComposerError:
        return translate(error, what=f"reading {self.name}")


def _engine(url: URL, timeout_s: float) -> AsyncEngine:
    if url.get_backend_name() == "postgresql":
        connect = {"timeout": timeout_s, "command_timeout": timeout_s}
        engine = create_async_engine(url, connect_args=connect)
        return engine.execution_options(postgresql_readonly=True)
    assert url.database is not None
    file = Path(url.database).absolute()
    if not file.is_file():
        raise StoreError(f"there is no database {file}; correct the URL")
    read_only = url.set(database=file.as_uri(), query={"mode": "ro", "uri": "true"})
    return create_async_engine(read_only, connect_args={"timeout": timeout_s})
