"""PostgreSQL crashes, or hangs, under load: every record is there at the end, none twice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import monotonic

import pytest

from composer.store import Feedback, Recorder, Store
from tests.store.postgres import PostgresServer, running_server
from tests.store.records import make_record

pytestmark = pytest.mark.postgres

RATE = 300  # records a second


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of the test's own, to be stopped as it likes."""
    with running_server() as server:
        yield server


class Load:
    """Puts records at `RATE`, and feedback on every tenth, until stopped."""

    def __init__(self, recorder: Recorder) -> None:
        self.put: list[str] = []
        self.judged: list[str] = []
        self.in_journal = 0
        self.slowest_put_s = 0.0
        self._recorder = recorder
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        began = monotonic()
        async with asyncio.TaskGroup() as judges:
            while not self._stop.is_set():
                for _ in range(round((monotonic() - began) * RATE) - len(self.put)):
                    id = f"r{len(self.put):06d}"
                    before = monotonic()
                    self._recorder.put(make_record(id))
                    self.slowest_put_s = max(self.slowest_put_s, monotonic() - before)
                    self.put.append(id)
                    if len(self.put) % 10 == 0:
                        judges.create_task(self._judge(id))
                await asyncio.sleep(0.01)

    async def _judge(self, id: str) -> None:
        receipt = await self._recorder.add_feedback(Feedback.checked(id, 1.0, id="load"))
        self.judged.append(id)
        self.in_journal += receipt.stored == "journal"

    async def stop(self) -> None:
        self._stop.set()
        await self._task


async def crash(server: PostgresServer, outage_s: float) -> None:
    await asyncio.to_thread(server.stop, "immediate")
    await asyncio.sleep(outage_s)
    await asyncio.to_thread(server.start)


async def hang(server: PostgresServer, outage_s: float) -> None:
    await asyncio.to_thread(server.pause)
    await asyncio.sleep(outage_s)
    await asyncio.to_thread(server.resume)


@pytest.mark.parametrize(
    ("outage", "outage_s"),
    [
        pytest.param(crash, 2, id="crash"),
        pytest.param(hang, 3, id="hang"),
        pytest.param(crash, 60, id="crash-of-a-minute", marks=pytest.mark.slow),
        pytest.param(hang, 60, id="hang-of-a-minute", marks=pytest.mark.slow),
    ],
)
async def test_every_record_is_there_once_after_an_outage(
    server: PostgresServer,
    tmp_path: Path,
    outage: Callable[[PostgresServer, float], Awaitable[None]],
    outage_s: float,
) -> None:
    store = Store(server.url, timeout_s=1.0)
    await store.start()
    recorder = Recorder(store, tmp_path / "journal", probe_s=1.0, backoff_s=(0.1, 2.0))
    await recorder.start()
    load = Load(recorder)

    await asyncio.sleep(0.5)
    before = recorder.stats()
    await outage(server, outage_s)
    during = recorder.stats()
    await asyncio.sleep(0.5)
    await load.stop()

    async with asyncio.timeout(60):
        await recorder.flush()
        while recorder.stats()["journal_bytes"]:
            await asyncio.sleep(0.05)
    after = recorder.stats()
    await recorder.close()
    await store.close()
    reader = Store(server.url, timeout_s=60.0)  # a busy machine may take its time over a page
    await reader.start()
    found = [record async for record in reader.iter_requests()]
    judged = [item.response_id for id in load.judged for item in await reader.feedback_for(id)]
    await reader.close()

    assert before["written"] > 0
    assert during["journaled"] > outage_s * RATE / 2
    assert sorted(record.id for record in found) == load.put
    assert sorted(judged) == load.put[9::10]
    assert load.in_journal > 0
    assert (after["lost"], after["rejected"], after["database_up"]) == (0, 0, True)
    # Put never waits for anything; a second would be the database's or the disk's doing.
    assert load.slowest_put_s < 1


async def test_a_cold_start_while_the_server_hangs_fails_in_time(server: PostgresServer) -> None:
    from composer.errors import StoreError

    await asyncio.to_thread(server.pause)
    store = Store(server.url, timeout_s=0.5)
    began = monotonic()
    with pytest.raises(StoreError, match="no answer within"):
        await store.start()
    assert monotonic() - began < 30
