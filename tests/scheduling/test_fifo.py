"""The FIFO scheduler: never too many, first come first served, no place lost."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from composer.errors import EngineUnavailable, Overloaded
from composer.scheduling.base import Lease, Limits
from composer.scheduling.fifo import RETRY_AFTER_S, FifoScheduler
from composer.types import Call, Sampling


def call(server: str = "s", expert: str = "e") -> Call:
    return Call("id", expert, server, None, (), "hi", Sampling(), 100)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def scheduler(in_flight: int = 1, queue: int = 8, clock: Clock | None = None) -> FifoScheduler:
    made = FifoScheduler(clock or Clock())
    made.configure({"s": Limits(in_flight, queue)})
    return made


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_lease_tells_how_long_it_waited() -> None:
    clock = Clock()
    fifo = scheduler(clock=clock)
    first = await fifo.acquire(call(expert="one"))
    assert (first.server, first.expert, first.queue_s) == ("s", "one", 0.0)
    waiting = asyncio.create_task(fifo.acquire(call(expert="two")))
    await settle()
    assert fifo.stats() == {"s": {"running": 1, "waiting": 1, "in_flight": 1, "queue": 8}}
    clock.now += 2.5
    fifo.release(first)
    second = await waiting
    assert (second.expert, second.queue_s) == ("two", 2.5)


async def test_a_full_queue_refuses_with_the_time_the_pace_suggests() -> None:
    clock = Clock()
    fifo = scheduler(in_flight=2, queue=3, clock=clock)
    leases = [await fifo.acquire(call()) for _ in range(2)]
    clock.now += 8.0
    for lease in leases:
        fifo.release(lease)
    for _ in range(2):
        await fifo.acquire(call())
    waiting = [asyncio.create_task(fifo.acquire(call())) for _ in range(3)]
    await settle()
    with pytest.raises(Overloaded, match="2 calls run and 3 wait") as refused:
        await fifo.acquire(call())
    assert refused.value.retry_after == pytest.approx(8.0 * 4 / 2)
    waiting[1].cancel()
    late = fifo.acquire(call())
    late.send(None)  # the cancelled call's place is free in the same step of the event loop
    late.close()
    await settle()
    assert fifo.stats()["s"]["waiting"] == 2
    assert len(fifo._lines["s"].waiting) == 2
    for task in waiting:
        task.cancel()


@pytest.mark.parametrize(
    ("lease_s", "advice"), [(0.001, RETRY_AFTER_S[0]), (1e6, RETRY_AFTER_S[1])]
)
async def test_the_advice_stays_within_bounds(lease_s: float, advice: float) -> None:
    clock = Clock()
    fifo = scheduler(queue=0, clock=clock)
    lease = await fifo.acquire(call())
    clock.now += lease_s
    fifo.release(lease)
    await fifo.acquire(call())
    with pytest.raises(Overloaded) as refused:
        await fifo.acquire(call())
    assert refused.value.retry_after == advice


async def test_a_lease_is_released_once() -> None:
    fifo = scheduler()
    lease = await fifo.acquire(call())
    fifo.release(lease)
    with pytest.raises(ValueError, match="is not out"):
        fifo.release(lease)
    with pytest.raises(ValueError, match="is not out"):
        fifo.release(Lease(10_000, "s", "e", 0.0))


async def test_cancelling_in_the_step_of_the_grant_returns_the_place() -> None:
    fifo = scheduler()
    lease = await fifo.acquire(call())
    waiting = asyncio.create_task(fifo.acquire(call()))
    await settle()
    fifo.release(lease)  # grants to the waiting call …
    assert fifo.stats()["s"]["running"] == 1
    waiting.cancel()  # … which never wakes to see it
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert fifo.stats()["s"]["running"] == 0
    assert await asyncio.wait_for(fifo.acquire(call()), 1)


async def test_cancelling_before_the_grant_passes_the_place_on() -> None:
    fifo = scheduler()
    lease = await fifo.acquire(call())
    gone = asyncio.create_task(fifo.acquire(call(expert="gone")))
    next_ = asyncio.create_task(fifo.acquire(call(expert="next")))
    await settle()
    gone.cancel()
    fifo.release(lease)  # before the cancelled task has run its clean-up
    assert (await asyncio.wait_for(next_, 1)).expert == "next"


async def test_an_unknown_server_is_refused() -> None:
    with pytest.raises(EngineUnavailable, match="'other' is not served"):
        await scheduler().acquire(call("other"))


async def test_more_room_wakes_those_who_wait_and_less_takes_from_nobody() -> None:
    fifo = scheduler()
    first = await fifo.acquire(call())
    waiting = [asyncio.create_task(fifo.acquire(call(expert=str(i)))) for i in range(3)]
    await settle()
    fifo.configure({"s": Limits(3, 8)})
    await settle()
    assert [task.done() for task in waiting] == [True, True, False]
    fifo.configure({"s": Limits(1, 8)})
    fifo.release(first)
    fifo.release(waiting[0].result())
    await settle()
    assert not waiting[2].done()
    fifo.release(waiting[1].result())
    assert (await asyncio.wait_for(waiting[2], 1)).expert == "2"


async def test_a_server_that_leaves_fails_its_queue_and_keeps_its_leases() -> None:
    fifo = scheduler()
    lease = await fifo.acquire(call())
    waiting = asyncio.create_task(fifo.acquire(call()))
    await settle()
    fifo.configure({"t": Limits(1, 1)})
    with pytest.raises(EngineUnavailable, match="taken out of service"):
        await waiting
    with pytest.raises(EngineUnavailable):
        await fifo.acquire(call())
    assert set(fifo.stats()) == {"t"}
    fifo.configure({"s": Limits(1, 1)})  # back before its lease ended: that one still counts
    assert fifo.stats()["s"]["running"] == 1
    fifo.configure({})
    fifo.release(lease)
    with pytest.raises(ValueError, match="is not out"):
        fifo.release(lease)


@pytest.mark.parametrize(("in_flight", "queue"), [(0, 1), (1, -1)])
def test_limits_that_serve_nobody_are_refused(in_flight: int, queue: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        Limits(in_flight, queue)


class FifoMachine(RuleBasedStateMachine):
    """Random arrivals, cancellations, releases and reconfigurations, with and without a step of
    the event loop between them."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.fifo = FifoScheduler(Clock())
        self.tasks: list[asyncio.Task[Lease]] = []
        self.held: list[Lease] = []
        self.cancelled: set[int] = set()
        self.arrivals = 0
        self.in_flight = 1
        self.granted: list[int] = []

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @initialize(in_flight=st.integers(1, 3))
    def begin(self, in_flight: int) -> None:
        self.configure(in_flight)

    @rule(in_flight=st.integers(1, 4))
    def configure(self, in_flight: int) -> None:
        async def work() -> None:
            self.fifo.configure({"s": Limits(in_flight, 1000)})

        self.in_flight = max(in_flight, len(self.held))
        self.limit = in_flight
        self.run(work())

    @rule()
    def arrive(self) -> None:
        number = self.arrivals
        self.arrivals += 1

        async def acquire() -> Lease:
            lease = await self.fifo.acquire(call(expert=str(number)))
            self.held.append(lease)
            self.granted.append(number)
            return lease

        async def start() -> None:
            task = asyncio.create_task(acquire(), name=str(number))
            self.tasks.append(task)
            await asyncio.sleep(0)

        self.run(start())

    @precondition(lambda self: any(not t.done() for t in self.tasks))
    @rule(data=st.data(), release_too=st.booleans(), cancel_first=st.booleans())
    def cancel(self, data: st.DataObject, release_too: bool, cancel_first: bool) -> None:
        """Cancels a waiting call, perhaps in the very step in which it is granted."""
        waiting = [t for t in self.tasks if not t.done()]
        task = waiting[data.draw(st.integers(0, len(waiting) - 1))]

        async def work() -> None:
            if cancel_first:
                task.cancel()
            if release_too and self.held:
                self.fifo.release(self.held.pop(0))
            if not cancel_first:
                task.cancel()
            await settle()

        self.run(work())
        assert task.cancelled()
        self.cancelled.add(int(task.get_name()))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))

        async def work() -> None:
            self.fifo.release(lease)
            await settle()

        self.run(work())

    @invariant()
    def nobody_waits_beside_a_free_place_and_nobody_is_lost(self) -> None:
        self.run(settle())
        load = self.fifo.stats().get("s")
        if load is None:
            return
        waiting = sum(not t.done() for t in self.tasks)
        assert load["running"] == len(self.held)
        assert load["waiting"] == waiting
        assert len(self.held) <= self.in_flight
        assert waiting == 0 or len(self.held) >= self.limit
        if len(self.held) <= self.limit:
            self.in_flight = self.limit

    @invariant()
    def first_come_first_served(self) -> None:
        assert self.granted == sorted(self.granted)

    def teardown(self) -> None:
        async def drain() -> None:
            while self.held:
                self.fifo.release(self.held.pop())
                await settle()

        self.run(drain())
        assert sorted([*self.granted, *self.cancelled]) == list(range(self.arrivals))
        self.loop.close()


TestFifo = FifoMachine.TestCase
TestFifo.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
