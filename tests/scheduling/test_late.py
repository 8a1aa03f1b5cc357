"""An event loop that comes too late: bounds pass, callers leave and swaps go on while it stands
still. Each call is told once, and nobody is blamed for what the machine did."""

from __future__ import annotations

import asyncio
import logging

import pytest

from composer.errors import Overloaded
from composer.scheduling.base import Lease, Place
from composer.scheduling.device import GRACE_S, DeviceOwner
from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    Finished,
    Grant,
    Left,
    Model,
    Refuse,
    Ticked,
)
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.scheduler import DeviceScheduler
from tests.scheduling.device import call as waiting
from tests.scheduling.device import model
from tests.scheduling.fakes import FakeClock, FakeMover, Scripted, call, settle, standing

LOAD_S = 3.0
"""What the configuration says of a load; the movers may take longer."""


class Swaps:
    """Servers "a" and "b" on a device with room for one, under the real policy; "a" is loaded."""

    def __init__(self, load_s: float) -> None:
        self.clock = FakeClock(0.0)
        self.log: list[str] = []
        self.scheduler = DeviceScheduler(SwapPolicy, clock=self.clock)
        self.movers = {
            name: FakeMover(self.clock, self.log, name, start_s=load_s, stop_s=1.0) for name in "ab"
        }
        self.scheduler.configure(
            {
                name: Place(
                    "gpu",
                    Model(
                        name, 1, 8, memory_gb=6.0, load_s=LOAD_S, unload_s=1.0, run_s=1.0,
                        movable=True,
                    ),
                    mover,
                )
                for name, mover in self.movers.items()
            },
            {"gpu": 10.0},
        )  # fmt: skip

    async def begin(self) -> None:
        lease = asyncio.create_task(self.scheduler.acquire(call("a")))
        await self.clock.advance(self.movers["a"].start_s + 1.0)
        self.scheduler.release(await soon(lease))
        await settle()

    def ask(self, server: str, max_wait_s: float | None) -> asyncio.Task[Lease]:
        return asyncio.create_task(self.scheduler.acquire(call(server, max_wait_s=max_wait_s)))

    @property
    def owner(self) -> DeviceOwner:
        return self.scheduler.owners["gpu"]


async def soon(asked: asyncio.Task[Lease]) -> Lease:
    """Nobody is left hanging where a test fails."""
    return await asyncio.wait_for(asked, 5)


async def refused(asked: asyncio.Task[Lease]) -> None:
    with pytest.raises(Overloaded, match="within its bound"):
        await soon(asked)


async def test_a_bound_that_passes_during_a_slow_swap_is_no_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The call is refused at its bound, the swap goes on, and serves who can still wait."""
    on = Swaps(load_s=40.0)  # more than ten times what is expected
    await on.begin()
    hasty, patient = on.ask("b", 10.0), on.ask("b", 600.0)
    await on.clock.advance(10.0)
    assert hasty.done()
    await refused(hasty)
    assert not patient.done()
    await on.clock.advance(600.0)
    on.scheduler.release(await soon(patient))
    assert on.owner.calls.refused == {"late": 1}
    assert on.owner.faults == 0
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_the_policy_has_its_word_before_it_is_blamed() -> None:
    """Something happens, and the loop stands still before that moment is over: the alarm of a bound
    has given way to the moment's end, which is still to come when the owner looks."""
    on = Swaps(load_s=40.0)
    await on.begin()
    running = await soon(on.ask("a", None))
    asked = on.ask("b", 30.0)
    await on.clock.advance(29.0)  # "a" drains
    patient = on.ask("b", None)
    await asyncio.sleep(0)
    await on.clock.stall(GRACE_S + 5.0)
    await refused(asked)
    on.scheduler.release(running)
    await on.clock.advance(600.0)
    on.scheduler.release(await soon(patient))
    assert on.owner.calls.refused == {"late": 1}
    assert on.owner.faults == 0


async def test_an_earlier_look_that_rings_late_is_before_a_later_bound() -> None:
    on = Swaps(load_s=40.0)
    await on.begin()
    calls = [on.ask("b", bound) for bound in (10.0, 11.5)]
    await on.clock.advance(10.0)
    await refused(calls[0])
    await on.clock.stall(GRACE_S + 2.0)  # the look of 11.0 comes first, then the bound of 11.5
    await refused(calls[1])
    assert on.owner.faults == 0


async def test_who_leaves_past_the_bound_and_before_the_policy_hears_of_it() -> None:
    on = Swaps(load_s=40.0)
    await on.begin()
    gone, other, patient = on.ask("b", 10.0), on.ask("b", 10.0), on.ask("b", None)
    await settle()
    on.clock.time += 10.2  # the bound is over; its alarm has not rung
    gone.cancel()
    await settle()
    assert gone.cancelled()
    await refused(other)  # by the very event of the first one's leaving
    await on.clock.advance(600.0)
    on.scheduler.release(await soon(patient))
    assert on.owner.faults == 0
    assert (on.owner.calls.left, on.owner.calls.refused) == (1, {"late": 1})


async def test_a_late_loop_leaves_no_lease_out_and_no_place_taken() -> None:
    """Bounds pass, one caller leaves and the load ends, all while the loop stands still."""
    on = Swaps(load_s=8.0)
    await on.begin()
    calls = [on.ask("b", bound) for bound in (30.0, 30.0, 600.0)]
    await settle()
    while not any(line == "start b" for line in on.log):
        await on.clock.advance(0.5)
    calls[0].cancel()
    await on.clock.stall(35.0)
    assert calls[0].cancelled()
    await refused(calls[1])
    on.scheduler.release(await soon(calls[2]))
    assert on.scheduler.stats()["b"] == {"running": 0, "waiting": 0, "in_flight": 1, "queue": 8}
    assert on.owner.faults == 0


# --- what an owner's policy has not heard yet --------------------------------------------------


@pytest.mark.parametrize("answer", [Grant(2), Refuse(2, "late", 1.0)])
async def test_who_left_is_answered_in_the_step_that_finds_it(answer: Action) -> None:
    """Call 2 is cancelled, and cleared away for the sake of call 3, which found the queue full; the
    same step answers call 2. Its place is given back, and its leaving is no news any more."""
    says: list[list[Action]] = [[Grant(1)], [], [Refuse(3, "full", 1.0), answer], [Grant(3)]]
    policy = Scripted(lambda event: says.pop(0) if isinstance(event, Arrived) else [])
    scheduler = DeviceScheduler(lambda: policy, clock=FakeClock(0.0))
    scheduler.configure(standing(), {})
    first = await scheduler.acquire(call())
    gone = asyncio.create_task(scheduler.acquire(call()))
    await settle()
    policy.heard.clear()
    gone.cancel()
    async with asyncio.timeout(5):
        third = await scheduler.acquire(call())  # not as a task: before the other's own clean-up
    await settle()
    arrived = Arrived(waiting(3, "s", wait=None))
    told = [Finished(2)] if isinstance(answer, Grant) else []
    assert policy.heard[0] == arrived
    assert policy.heard[1:] == [arrived, *told]
    owner = scheduler.owners["s"]
    assert (owner.faults, owner.calls.left) == (0, 1)
    scheduler.release(first)
    scheduler.release(third)
    assert scheduler.stats()["s"]["running"] == 0


# --- the bare policy -------------------------------------------------------------------------


def test_a_caller_who_left_is_not_told_that_it_is_late() -> None:
    policy = SwapPolicy()
    policy.on(Configured((model("a"), model("b")), 10.0, ("a",)), 0.0)
    policy.on(Arrived(waiting(1, "b", 0.0, wait=40.0)), 0.0)
    policy.on(Arrived(waiting(2, "b", 0.0, wait=40.0)), 0.0)
    said = policy.on(Left(1), 50.0)
    assert [action.call for action in said if isinstance(action, Refuse)] == [2]


def test_what_was_decided_before_an_event_that_cannot_be_is_told_with_the_next() -> None:
    policy = SwapPolicy()
    policy.on(Configured((model("a"), model("b")), 10.0, ("a",)), 0.0)
    policy.on(Arrived(waiting(1, "b", 0.0, wait=40.0)), 0.0)
    with pytest.raises(ValueError, match="call 9 does not run"):
        policy.on(Finished(9), 50.0)
    said = policy.on(Ticked(), 50.0)
    assert [action.call for action in said if isinstance(action, Refuse)] == [1]
