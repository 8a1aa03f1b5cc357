"""Choices of routers in shadow, and promotions. Knows no router: an artefact is a digest to it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from composer.store.repository import Store, insert_into
from composer.store.rows import plan_of
from composer.store.tables import feedback, promotions, requests, shadows
from composer.types import Plan

MOST = 20_000
"""Judged decisions that a comparison reads at most."""

PART = 200
"""Of them, read from the database at a time: others' requests go on between two parts."""


@dataclass(frozen=True, slots=True)
class ShadowChoice:
    """Whom the router in shadow (the artefact of that digest) would have asked, and its expected
    qualities."""

    response_id: str
    policy: str
    artefact: str
    choice: str
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Compared:
    """A judged decision beside what the shadow would have done. `score` is the mean of its
    feedbacks; `expert` answered."""

    plan: Plan
    expert: str
    score: float
    choice: str
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Promotion:
    """The artefact (its digest) that serves a policy in place of the one named there, and the
    estimate on which it was promoted."""

    policy: str
    artefact: str
    created: datetime
    estimate: Mapping[str, Any]


class Shadows:
    """The part of a started store that shadows and promotions need. Errors are the store's."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def add(self, choices: Sequence[ShadowChoice]) -> None:
        """All or none; one that is there already is left as it is."""
        if not choices:
            return

        async def run(connection: AsyncConnection) -> None:
            statement = insert_into(connection, shadows)
            statement = statement.on_conflict_do_nothing(index_elements=["response_id"])
            await connection.execute(statement, [asdict(choice) for choice in choices])

        await self._store.run(run, "writing choices in shadow", writes=True)

    async def compared(self, policy: str, artefact: str, *, first: bool = False) -> list[Compared]:
        """The newest judged decisions of a policy that this artefact saw in shadow, at most `MOST`,
        or the `first` ones: a series with a fixed start. Either way the newest first."""
        created, id_ = requests.c.created, requests.c.id
        order = (created, id_) if first else (created.desc(), id_.desc())
        score = sa.func.avg(feedback.c.score).label("score")
        judged = (
            sa.select(feedback.c.response_id, score).group_by(feedback.c.response_id).subquery()
        )
        query = (
            sa.select(
                requests.c.plan,
                requests.c.expert,
                judged.c.score,
                shadows.c.choice,
                shadows.c.scores,
            )
            .join(shadows, shadows.c.response_id == requests.c.id)
            .join(judged, judged.c.response_id == requests.c.id)
            .where(
                shadows.c.policy == policy,
                shadows.c.artefact == artefact,
                requests.c.expert.is_not(None),
                requests.c.plan.is_not(sa.null()),
            )
            .order_by(*order)
            .limit(MOST)
        )

        async def run(connection: AsyncConnection) -> list[Compared]:
            found = []
            async with connection.stream(query) as rows:
                async for part in rows.partitions(PART):
                    for row in part:
                        plan = plan_of(row.plan)
                        assert plan is not None  # the query has none without
                        found.append(Compared(plan, row.expert, row.score, row.choice, row.scores))
                    await asyncio.sleep(0)  # a driver may have read several parts at once
            return found[::-1] if first else found

        return await self._store.run(run, "reading choices in shadow")

    async def promotions(self) -> dict[str, Promotion]:
        """By policy."""

        async def run(connection: AsyncConnection) -> dict[str, Promotion]:
            rows = [row._asdict() for row in await connection.execute(sa.select(promotions))]
            return {row["policy"]: Promotion(**row) for row in rows}

        return await self._store.run(run, "reading promotions")

    async def promote(self, promotion: Promotion) -> None:
        """In the place of one that is there."""

        async def run(connection: AsyncConnection) -> None:
            await connection.execute(
                sa.delete(promotions).where(promotions.c.policy == promotion.policy)
            )
            await connection.execute(sa.insert(promotions).values(asdict(promotion)))

        await self._store.run(run, "writing a promotion", writes=True)

    async def undo(self, policy: str) -> None:
        """One that is not there is no error: it is undone either way."""

        async def run(connection: AsyncConnection) -> None:
            await connection.execute(sa.delete(promotions).where(promotions.c.policy == policy))

        await self._store.run(run, "undoing a promotion", writes=True)
