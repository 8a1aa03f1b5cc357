"""What routers learnt from feedback, and which feedback that was: written together, or not at all.

Knows no router: a state is bytes to it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from composer.errors import Conflict
from composer.store.records import Feedback
from composer.store.repository import Store
from composer.store.rows import feedback_of, plan_of
from composer.store.tables import feedback, lessons, requests
from composer.types import Plan


@dataclass(frozen=True, slots=True)
class Judged:
    """A feedback nobody has learnt from, and the decision that it judges. `expert` wrote the
    answer; it and `plan` are None for a request that failed before."""

    feedback: Feedback
    policy: str | None
    plan: Plan | None
    expert: str | None


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the router of a policy has learnt. `version` 0: nothing is kept yet."""

    policy: str
    fingerprint: str
    version: int
    state: bytes


class Lessons:
    """The part of a started store that learning needs. Errors are the store's."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def waiting(self, limit: int) -> list[Judged]:
        """Feedback that nobody has learnt from, oldest first."""

        async def run(connection: AsyncConnection) -> list[Judged]:
            query = (
                sa.select(feedback, requests.c.policy, requests.c.plan, requests.c.expert)
                .join(requests, requests.c.id == feedback.c.response_id)
                .where(feedback.c.learned.is_(None))
                .order_by(feedback.c.created, feedback.c.response_id, feedback.c.id)
                .limit(limit)
            )
            rows = [row._asdict() for row in await connection.execute(query)]
            return [
                Judged(feedback_of(row), row["policy"], plan_of(row["plan"]), row["expert"])
                for row in rows
            ]

        return await self._store.run(run, "reading feedback to learn from")

    async def kept(self, policies: Collection[str]) -> dict[str, Lesson]:
        """By policy, where there is one."""

        async def run(connection: AsyncConnection) -> dict[str, Lesson]:
            query = sa.select(lessons).where(lessons.c.policy.in_(list(policies)))
            rows = [row._asdict() for row in await connection.execute(query)]
            return {row["policy"]: Lesson(**row) for row in rows}

        return await self._store.run(run, "reading lessons")

    async def versions(self, policies: Collection[str]) -> dict[str, int]:
        async def run(connection: AsyncConnection) -> dict[str, int]:
            query = sa.select(lessons.c.policy, lessons.c.version).where(
                lessons.c.policy.in_(list(policies))
            )
            return {policy: version for policy, version in await connection.execute(query)}

        return await self._store.run(run, "reading lessons")

    async def keep(self, learnt: Sequence[Lesson], of: Sequence[Feedback]) -> None:
        """Each lesson in the place of the version before it, and the feedback marked: all or
        nothing. Raises Conflict where another process was there first with any of it."""

        async def run(connection: AsyncConnection) -> None:
            for lesson in learnt:
                await _put(connection, lesson)
            if of:
                keys = [(item.response_id, item.id) for item in of]
                marked = await connection.execute(
                    sa.update(feedback)
                    .where(
                        sa.tuple_(feedback.c.response_id, feedback.c.id).in_(keys),
                        feedback.c.learned.is_(None),
                    )
                    .values(learned=datetime.now(UTC))
                )
                if marked.rowcount != len(of):
                    raise Conflict("another process has learnt from this feedback")

        await self._store.run(run, "writing lessons", writes=True)


async def _put(connection: AsyncConnection, lesson: Lesson) -> None:
    there = sa.select(lessons.c.version).where(lessons.c.policy == lesson.policy)
    found = (await connection.execute(there)).scalar_one_or_none()
    values = {
        "fingerprint": lesson.fingerprint,
        "version": lesson.version,
        "state": lesson.state,
    }
    conflict = Conflict(f"another process has taught the router of policy {lesson.policy!r}")
    if (found or 0) != lesson.version - 1:
        raise conflict
    if found is None:
        await connection.execute(sa.insert(lessons).values(policy=lesson.policy, **values))
        return
    written = await connection.execute(
        sa.update(lessons)
        .where(lessons.c.policy == lesson.policy, lessons.c.version == found)
        .values(values)
    )
    if written.rowcount != 1:
        raise conflict
