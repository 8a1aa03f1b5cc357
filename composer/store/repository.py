"""The database: requests, feedback and runtime experts, each call bounded in time.

Knows nothing of the recorder's queue and journal, which stand before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from composer.errors import Conflict, StoreError, UnknownResponse
from composer.store import migrate
from composer.store.engine import WRITES, make_engine, parse_url
from composer.store.failures import DatabaseAway, translate
from composer.store.records import Feedback, Record, clean_text
from composer.store.rows import feedback_of, feedback_row, record_of, request_row
from composer.store.tables import experts, feedback, requests

T = TypeVar("T")

_PAGE = 500


class Store:
    """One database. Every method but `start` raises DatabaseAway (a StoreError) when it does not
    answer within `timeout_s` seconds, hanging or refusing, and RecordRefused for data it will
    never take."""

    def __init__(self, url: str, *, timeout_s: float = 5.0, migration_timeout_s: float = 600.0):
        """Connects nothing. Raises StoreError for a URL that cannot be used."""
        self._url = parse_url(url)
        self.timeout_s = timeout_s
        self._migration_timeout_s = migration_timeout_s
        self._engine: AsyncEngine | None = None
        self._abandoned: set[asyncio.Task[Any]] = set()

    # --- life ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Makes or upgrades the schema. Raises StoreError when the database cannot be used."""
        self._engine = await asyncio.to_thread(make_engine, self._url, timeout_s=self.timeout_s)
        try:
            await self.ping()
            await self._migrate()
        except StoreError as error:
            await self.close()
            where = self._url.render_as_string(hide_password=True)
            raise StoreError(
                f"the database {where} cannot be used: {error}. "
                "Start it, or set COMPOSER_DATABASE_URL to one that runs"
            ) from error

    async def _migrate(self) -> None:
        """On an engine of its own: a migration may take far longer than a statement should."""
        engine = make_engine(self._url, timeout_s=self._migration_timeout_s)

        async def run(connection: AsyncConnection) -> None:
            await connection.run_sync(migrate.upgrade)

        try:
            await self._within(
                _transaction(engine, run, writes=True), self._migration_timeout_s, "migrating"
            )
        finally:
            await _dispose(engine, self.timeout_s)

    async def close(self) -> None:
        """Closes every connection; those that hang are cut. Idempotent."""
        engine, self._engine = self._engine, None
        if self._abandoned:
            await asyncio.wait(self._abandoned, timeout=self.timeout_s)
        if engine is not None:
            await _dispose(engine, self.timeout_s)

    async def ping(self) -> None:
        """Returns when the database answered."""

        async def run(connection: AsyncConnection) -> None:
            await connection.execute(sa.select(1))

        await self.run(run, "a ping")

    # --- requests ------------------------------------------------------------------------

    async def add_requests(self, records: Sequence[Record]) -> None:
        """Commits all or none. A record whose id is there already is left as it is."""
        if not records:
            return

        async def run(connection: AsyncConnection) -> None:
            statement = insert_into(connection, requests).on_conflict_do_nothing(
                index_elements=["id"]
            )
            await connection.execute(statement, [request_row(record) for record in records])

        await self.run(run, "writing records", writes=True)

    async def get_request(self, id: str) -> Record | None:
        async def run(connection: AsyncConnection) -> Record | None:
            query = sa.select(requests).where(requests.c.id == clean_text(id))
            row = (await connection.execute(query)).one_or_none()
            return None if row is None else record_of(row._asdict())

        return await self.run(run, "reading a record")

    async def iter_requests(self, since: datetime | None = None) -> AsyncIterator[Record]:
        """Records by time, oldest first, from `since` (aware) on; reads a page at a time, so that
        a slow reader holds no transaction open."""
        key = sa.tuple_(requests.c.created, requests.c.id)
        query = sa.select(requests).order_by(requests.c.created, requests.c.id).limit(_PAGE)
        page_query = query if since is None else query.where(requests.c.created >= since)
        while True:

            async def run(
                connection: AsyncConnection, query: sa.Select[Any] = page_query
            ) -> list[Record]:
                rows = await connection.execute(query)
                return [record_of(row._asdict()) for row in rows]

            page = await self.run(run, "reading records")
            for record in page:
                yield record
            if len(page) < _PAGE:
                return
            last = sa.tuple_(
                sa.literal(page[-1].created, requests.c.created.type), sa.literal(page[-1].id)
            )
            page_query = query.where(key > last)

    # --- feedback ------------------------------------------------------------------------

    async def add_feedback(self, *items: Feedback) -> None:
        """All or none, committed when it returns. What was sent before is left as it is.

        Raises UnknownResponse when no such response was recorded, and Conflict when the response
        has a feedback of the same id with another score, comment or labels.
        """

        async def run(connection: AsyncConnection) -> None:
            for item in items:
                await _add_feedback(connection, item)

        if items:
            await self.run(run, "writing feedback", writes=True)

    async def feedback_for(self, response_id: str) -> list[Feedback]:
        """A response's feedbacks, oldest first."""

        async def run(connection: AsyncConnection) -> list[Feedback]:
            query = (
                sa.select(feedback)
                .where(feedback.c.response_id == clean_text(response_id))
                .order_by(feedback.c.created, feedback.c.id)
            )
            return [feedback_of(row._asdict()) for row in await connection.execute(query)]

        return await self.run(run, "reading feedback")

    # --- runtime experts -----------------------------------------------------------------

    async def list_experts(self) -> list[dict[str, Any]]:
        """The specs of the experts added at run time, in the order they were added."""

        async def run(connection: AsyncConnection) -> list[dict[str, Any]]:
            query = sa.select(experts.c.spec).order_by(experts.c.created, experts.c.id)
            return [dict(spec) for spec in (await connection.execute(query)).scalars()]

        return await self.run(run, "reading runtime experts")

    async def put_expert(self, id: str, spec: Mapping[str, Any]) -> None:
        """Raises Conflict when there is an expert of that id already."""

        async def run(connection: AsyncConnection) -> None:
            row = {"id": id, "spec": dict(spec), "created": datetime.now(UTC)}
            try:
                await connection.execute(sa.insert(experts).values(row))
            except IntegrityError as error:
                raise Conflict(
                    f"there is already a runtime expert {id!r}; choose another id", param="id"
                ) from error

        await self.run(run, "writing a runtime expert", writes=True)

    async def delete_expert(self, id: str) -> None:
        """An id that is not there is no error: it is gone either way."""

        async def run(connection: AsyncConnection) -> None:
            await connection.execute(sa.delete(experts).where(experts.c.id == id))

        await self.run(run, "deleting a runtime expert", writes=True)

    # --- calls ---------------------------------------------------------------------------

    async def run(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        what: str,
        *,
        writes: bool = False,
    ) -> T:
        """One transaction around `work`, committed when it returns. For the rest of this room;
        `what` names it in errors."""
        if self._engine is None:
            raise DatabaseAway("the store is not started, or closed")
        transaction = _transaction(self._engine, work, writes=writes)
        return await self._within(transaction, self.timeout_s, what)

    async def _within(self, work: Awaitable[T], timeout_s: float, what: str) -> T:
        """The result of `work`, its errors translated, DatabaseAway when it takes too long.

        In a task of its own, which a timeout cancels and leaves: undoing a call on a server
        that hangs waits for that server again, and the caller must not.
        """
        task = asyncio.ensure_future(work)
        self._abandoned.add(task)
        task.add_done_callback(self._settled)
        try:
            done, _ = await asyncio.wait({task}, timeout=timeout_s)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.cancel()
            raise DatabaseAway(f"{what} got no answer within {timeout_s:g} s")
        try:
            return task.result()
        except Exception as error:
            ours = translate(error, what=what)
            if ours is error:
                raise
            raise ours from error

    def _settled(self, task: asyncio.Task[Any]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled():
            task.exception()  # seen: the caller was told, or has given up waiting


async def _transaction(
    engine: AsyncEngine, work: Callable[[AsyncConnection], Awaitable[T]], *, writes: bool
) -> T:
    async with engine.execution_options(**{WRITES: writes}).begin() as connection:
        return await work(connection)


async def _add_feedback(connection: AsyncConnection, item: Feedback) -> None:
    known = sa.select(requests.c.id).where(requests.c.id == item.response_id)
    if (await connection.execute(known)).one_or_none() is None:
        raise UnknownResponse(f"there is no response {item.response_id!r}")
    row = feedback_row(item)
    insert = insert_into(connection, feedback).on_conflict_do_nothing(
        index_elements=["response_id", "id"]
    )
    if (await connection.execute(insert.values(row))).rowcount:
        return
    there = sa.select(feedback).where(
        feedback.c.response_id == item.response_id, feedback.c.id == item.id
    )
    old = feedback_row(feedback_of((await connection.execute(there)).one()._asdict()))
    if any(old[name] != row[name] for name in ("score", "comment", "labels")):
        raise Conflict(
            f"response {item.response_id!r} already has a feedback {item.id!r} that says "
            "otherwise; send another id",
            param="id",
        )


async def _dispose(engine: AsyncEngine, timeout_s: float) -> None:
    # A hung server keeps its connections half open; the process's end closes them.
    await asyncio.wait({asyncio.ensure_future(engine.dispose())}, timeout=timeout_s)


def insert_into(connection: AsyncConnection, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
    """Both dialects have ON CONFLICT, spelled the same; SQLAlchemy's common INSERT has not."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)
