"""The database goes away under load and comes back: all is answered, and recorded once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.store.postgres import PostgresServer, running_server
from tests.tiny import ASKED, chat, registry, serving

CLIENTS = 8

pytestmark = pytest.mark.postgres


@pytest.fixture
def database() -> Iterator[PostgresServer]:
    with running_server() as server:
        yield server


@pytest.mark.parametrize("outage_s", [3, pytest.param(60, marks=pytest.mark.slow)])
async def test_every_answer_is_served_and_every_record_kept_once(
    database: PostgresServer, tmp_path: Path, outage_s: float
) -> None:
    skills = ("uppercase", "reverse")
    answered: list[httpx.Response] = []
    stop = asyncio.Event()

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        while not stop.is_set():
            said = ASKED[skills[number % 2]][0]
            answered.append(await client.post("/v1/chat/completions", json=chat(said)))

    async with serving(tmp_path, registry(*skills), database_url=database.url) as (client, service):
        work = [asyncio.create_task(ask(client, number)) for number in range(CLIENTS)]
        try:
            await _grown(answered, 20)
            await asyncio.to_thread(database.stop, "immediate")
            before = len(answered)
            await asyncio.sleep(outage_s)
            await _grown(answered, before + 20)

            # Feedback given meanwhile is durable too, on the journal.
            feedback = {"response_id": answered[-1].json()["id"], "score": 0.5}
            given = await client.post("/v1/feedback", json=feedback)
            assert given.status_code == 201, given.text
            assert given.json()["stored"] == "journal"
            health = (await client.get("/health")).json()
            assert health["status"] == "degraded"
            assert health["recorder"]["database_up"] is False

            await asyncio.to_thread(database.start)
            await _grown(answered, len(answered) + 20)
        finally:
            stop.set()
            await asyncio.gather(*work)
        assert [r.text for r in answered if r.status_code != 200] == []
        while (state := service.recorder.stats())["journal_bytes"] or state["queued"]:
            await asyncio.sleep(0.1)
        assert state["lost"] == state["rejected"] == 0
        assert state["journaled"] > 0

    engine = create_async_engine(database.url.replace("postgresql", "postgresql+asyncpg"))
    async with engine.connect() as connection:
        kept = (await connection.execute(text("SELECT id FROM requests"))).scalars().all()
        scores = (await connection.execute(text("SELECT score FROM feedback"))).scalars().all()
    await engine.dispose()
    assert sorted(kept) == sorted(response.json()["id"] for response in answered)
    assert scores == [0.5]


async def _grown(answered: list[httpx.Response], size: int) -> None:
    while len(answered) < size:
        await asyncio.sleep(0.05)
