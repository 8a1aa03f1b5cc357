"""Leases under random arrivals, cancellations, releases and changes: never too many, first come
first served, no place lost, nobody forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from composer.scheduling.base import Lease
from composer.scheduling.events import DevicePolicy
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.scheduler import DeviceScheduler
from tests.scheduling.fakes import FakeClock, Fifo, call, settle, standing
from tests.scheduling.workload import Day


class LeaseMachine(RuleBasedStateMachine):
    """With and without a step of the event loop between what happens."""

    make_policy: Callable[[], DevicePolicy] = Fifo

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.tasks: list[asyncio.Task[Lease]] = []
        self.held: list[Lease] = []
        self.cancelled: set[int] = set()
        self.arrivals = 0
        self.in_flight = self.limit = 1
        self.granted: list[int] = []
        self.scheduler = DeviceScheduler(self.make_policy, clock=FakeClock())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @initialize(in_flight=st.integers(1, 3))
    def begin(self, in_flight: int) -> None:
        self.configure(in_flight)

    @rule(in_flight=st.integers(1, 4))
    def configure(self, in_flight: int) -> None:
        async def work() -> None:
            self.scheduler.configure(standing("s", in_flight, 1000), {})

        self.in_flight = max(in_flight, len(self.held))
        self.limit = in_flight
        self.run(work())

    @rule()
    def arrive(self) -> None:
        number = self.arrivals
        self.arrivals += 1

        async def acquire() -> Lease:
            lease = await self.scheduler.acquire(call(expert=str(number)))
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
                self.scheduler.release(self.held.pop(0))
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
            self.scheduler.release(lease)
            await settle()

        self.run(work())

    @invariant()
    def nobody_waits_beside_a_free_place_and_nobody_is_lost(self) -> None:
        self.run(settle())
        load = self.scheduler.stats().get("s")
        if load is None:
            return
        waiting = sum(not t.done() for t in self.tasks)
        assert load["running"] == len(self.held)
        assert load["waiting"] == waiting
        assert len(self.held) <= self.in_flight
        assert waiting == 0 or len(self.held) >= self.limit
        assert all(owner.faults == 0 for owner in self.scheduler.owners.values())
        if len(self.held) <= self.limit:
            self.in_flight = self.limit

    @invariant()
    def first_come_first_served(self) -> None:
        assert self.granted == sorted(self.granted)

    def teardown(self) -> None:
        async def drain() -> None:
            while self.held:
                self.scheduler.release(self.held.pop())
                await settle()
            await self.scheduler.close()

        self.run(drain())
        assert sorted([*self.granted, *self.cancelled]) == list(range(self.arrivals))
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class SwapMachine(LeaseMachine):
    make_policy = SwapPolicy


TestFifoLeases = LeaseMachine.TestCase
TestFifoLeases.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestSwapLeases = SwapMachine.TestCase
TestSwapLeases.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("policy", [Fifo, SwapPolicy])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_a_day_with_deaths_and_changes_leaves_nobody_waiting(
    policy: Callable[[], DevicePolicy], seed: int
) -> None:
    """The device's memory is never exceeded (the servers check), every caller is told something
    within the bound, and at the end every place is free."""

    async def day() -> None:
        day = Day(seed, policy)
        told = await day.run()
        assert len(told) == day.calls
        for one in told:
            assert one.bound_s is None or one.how == "left" or one.waited_s <= one.bound_s + 1e-6
        assert all(owner.faults == 0 for owner in day.scheduler.owners.values())
        closing = asyncio.create_task(day.scheduler.close())
        await day.clock.advance(60)
        await closing

    asyncio.run(day())


@pytest.mark.parametrize("policy", [Fifo, SwapPolicy])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_a_day_on_a_starved_cpu_tells_each_caller_once_and_blames_no_policy(
    policy: Callable[[], DevicePolicy], seed: int
) -> None:
    """Callers leave and bounds pass while the event loop stands still."""

    async def day() -> None:
        day = Day(seed, policy, leaving=0.4, stalling=0.3)
        told = await day.run()
        assert len(told) == day.calls
        for owner in day.scheduler.owners.values():
            assert owner.faults == 0
            assert sum(load["running"] + load["waiting"] for load in owner.loads().values()) == 0
        closing = asyncio.create_task(day.scheduler.close())
        await day.clock.advance(60)
        await closing

    asyncio.run(day())


@pytest.mark.parametrize("policy", [Fifo, SwapPolicy])
@pytest.mark.parametrize("seed", range(3))
async def test_a_quiet_day_serves_everybody_who_can_wait(
    policy: Callable[[], DevicePolicy], seed: int
) -> None:
    day = Day(seed, policy, calls=20, failing=0, dying=0, leaving=0, changing=False)
    told = await day.run()
    patient = [one for one in told if one.bound_s is None or one.bound_s >= 60]
    assert patient
    assert {one.how for one in patient} == {"ok"}
