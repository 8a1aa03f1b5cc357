"""Batch calls leave room in the queue, wait out refusals, and leave no trace when cancelled."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from composer.batch.gate import Gate
from composer.engines.base import Capacity
from composer.errors import Overloaded
from composer.scheduling.base import Lease
from composer.types import Adapter, Call, Sampling
from tests.fakes import FakeEngine, FakeScheduler, place


def call(number: int, adapter: str | None = None) -> Call:
    made = None if adapter is None else Adapter(Path("/"), adapter, 8, 8.0, ())
    return Call(f"r/{number}", "e", "server", made, (), "hi", Sampling(), 4096)


def bench(in_flight: int, queue: int) -> tuple[Gate, FakeScheduler, list[str]]:
    scheduler = FakeScheduler()
    engine = FakeEngine("server")
    scheduler.configure({"server": place(engine, in_flight=in_flight, queue=queue)}, {})
    ended: list[str] = []
    gate = Gate(
        scheduler, lambda server: Capacity(in_flight, queue), lambda call: ended.append(call.id)
    )
    return gate, scheduler, ended


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_half_of_the_queue_is_left_to_others() -> None:
    gate, scheduler, _ = bench(in_flight=4, queue=8)
    tasks = [asyncio.create_task(gate.acquire(call(i))) for i in range(50)]
    await settle()
    assert scheduler.stats()["server"] == {"in_flight": 4, "running": 4, "waiting": 4}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_all_get_their_lease_and_ends_are_told() -> None:
    gate, scheduler, ended = bench(in_flight=2, queue=2)
    order: list[str] = []

    async def one(number: int, adapter: str) -> None:
        lease = await gate.acquire(call(number, adapter))
        order.append(adapter)
        await asyncio.sleep(0)
        gate.release(lease)

    await asyncio.gather(*(one(i, "xyz"[i % 3]) for i in range(30)))
    assert sorted(ended) == sorted(f"r/{i}" for i in range(30))
    assert scheduler.out == {}
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes <= 8  # by threes, the first few aside, not 29 as they came


async def test_it_tells_who_waits_and_who_runs() -> None:
    scheduler = FakeScheduler()
    scheduler.configure({"server": place(FakeEngine("server"), in_flight=1, queue=4)}, {})
    came: list[str] = []
    gate = Gate(scheduler, lambda server: Capacity(1, 4), came=lambda call: came.append(call.id))
    lease = await gate.acquire(call(0))
    waiting = [asyncio.create_task(gate.acquire(call(i))) for i in range(1, 5)]
    await settle()

    def ids(calls: list[Call]) -> list[str]:
        return [call.id for call in calls]

    assert came == [f"r/{i}" for i in range(5)]
    assert (ids(gate.running), ids(gate.waiting)) == (["r/0"], came[1:])
    waiting[3].cancel()
    gate.release(lease)
    gate.release(await waiting[0])
    last = await waiting[1]
    assert (ids(gate.running), ids(gate.waiting)) == (["r/2"], ["r/3"])
    gate.release(last)
    gate.release(await waiting[2])
    assert (gate.running, gate.waiting) == ([], [])


async def test_a_refusal_is_waited_out() -> None:
    gate, scheduler, _ = bench(in_flight=1, queue=0)
    first = await gate.acquire(call(1))
    second = asyncio.create_task(gate.acquire(call(2)))
    await asyncio.sleep(0.02)
    assert not second.done()
    gate.release(first)
    async with asyncio.timeout(0.9):  # at once, not after the second that was advised
        gate.release(await second)
    assert scheduler.out == {}


async def test_who_leaves_gives_the_turn_on() -> None:
    gate, scheduler, _ = bench(in_flight=1, queue=2)
    lease = await gate.acquire(call(0))
    waiting = [asyncio.create_task(gate.acquire(call(i))) for i in range(1, 6)]
    await settle()
    for task in waiting[:3]:
        task.cancel()
    await settle()
    gate.release(lease)
    gate.release(await waiting[3])
    gate.release(await waiting[4])
    assert scheduler.out == {}
    assert (await gate.acquire(call(9))).server == "server"


async def test_the_wait_here_counts_as_queue_time() -> None:
    gate, _, _ = bench(in_flight=1, queue=2)
    lease = await gate.acquire(call(0))
    second = asyncio.create_task(gate.acquire(call(1)))
    await asyncio.sleep(0.05)
    gate.release(lease)
    assert (await second).queue_s >= 0.05


async def test_other_errors_pass_and_leases_are_given_back_once() -> None:
    class Broken(FakeScheduler):
        async def acquire(self, call: Call) -> Lease:
            raise RuntimeError("a bug")

    gate = Gate(Broken(), lambda server: Capacity(1, 2))
    for _ in range(3):  # the place is free again each time
        with pytest.raises(RuntimeError, match="a bug"):
            await gate.acquire(call(1))
    with pytest.raises(ValueError, match="not out"):
        gate.release(Lease(7, "server", "e", 0.0))


async def test_a_refusal_with_nothing_running_is_tried_again_after_its_time() -> None:
    class Once(FakeScheduler):
        refused = False

        async def acquire(self, call: Call) -> Lease:
            if not self.refused:
                self.refused = True
                raise Overloaded("full of others' calls", retry_after=0.01)
            return await super().acquire(call)

    gate = Gate(Once(), lambda server: Capacity(1, 2))
    async with asyncio.timeout(5):
        assert (await gate.acquire(call(1))).server == "server"
