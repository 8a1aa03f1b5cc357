"""Loads and unloads under policies that say what a test tells them: carried out, told, undone, and
awaited when the service closes."""

from __future__ import annotations

import asyncio
import logging

import pytest

from composer.errors import EngineUnavailable
from composer.scheduling.base import Lease, Place
from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    Finished,
    Load,
    Loaded,
    LoadFailed,
    Lost,
    Model,
    Unload,
    Unloaded,
    Wake,
)
from composer.scheduling.moves import RETIRE_S
from composer.scheduling.scheduler import DeviceScheduler
from tests.scheduling.fakes import (
    FakeClock,
    FakeMover,
    Scripted,
    call,
    grant_all,
    settle,
)


class Device:
    """Servers "a" and "b" on a device with room for one, under a scripted policy."""

    def __init__(self, start_s: float = 3.0, stop_s: float = 1.0) -> None:
        self.clock = FakeClock(0.0)
        self.log: list[str] = []
        self.policy = Scripted()
        self.scheduler = DeviceScheduler(lambda: self.policy, clock=self.clock)
        self.movers = {
            name: FakeMover(self.clock, self.log, name, start_s=start_s, stop_s=stop_s)
            for name in "ab"
        }
        self.configure()

    def configure(self, names: str = "ab") -> None:
        places = {
            name: Place("gpu", Model(name, 4, 8, memory_gb=6.0, movable=True), self.movers[name])
            for name in names
        }
        self.scheduler.configure(places, {"gpu": 10.0})

    def do(self, *actions: Action) -> None:
        """Has the policy say this, at the arrival of a call that leaves at once."""
        self.policy.say = lambda event: actions if isinstance(event, Arrived) else ()
        late = self.scheduler.acquire(call("a"))
        late.send(None)
        late.close()
        self.policy.say = lambda event: ()

    async def lease(self, server: str) -> Lease:
        self.policy.say = grant_all
        lease = await self.scheduler.acquire(call(server))
        self.policy.say = lambda event: ()
        return lease

    async def loaded(self, server: str) -> None:
        self.do(Load(server))
        await self.clock.advance(10)
        assert self.scheduler.resident(server)
        self.policy.heard.clear()
        self.log.clear()

    @property
    def owner(self):  # type: ignore[no-untyped-def]
        return self.scheduler.owners["gpu"]


@pytest.fixture
async def device() -> Device:
    return Device()


async def test_a_swap_is_done_told_and_counted(device: Device) -> None:
    assert device.policy.heard == [
        Configured(
            (
                Model("a", 4, 8, memory_gb=6.0, movable=True),
                Model("b", 4, 8, memory_gb=6.0, movable=True),
            ),
            10.0,
        )
    ]
    device.do(Load("a"))
    await device.clock.advance(2.9)
    assert not device.scheduler.resident("a")
    await device.clock.advance(0.1)
    assert device.scheduler.resident("a")
    assert (device.policy.heard[-1], device.policy.times[-1]) == (Loaded("a"), 3.0)
    await device.clock.advance(1.0)
    device.policy.say = lambda event: [Load("b")] if event == Unloaded("a") else []
    policy_say = device.policy.say
    device.do(Unload("a"))
    device.policy.say = policy_say
    assert not device.scheduler.resident("a")
    await device.clock.advance(10)
    assert device.log == [
        "start a", "up a", "stop a", "down a", "start b", "up b",
    ]  # fmt: skip
    assert not device.scheduler.resident("a")
    assert device.scheduler.resident("b")
    residency = device.owner.residency
    assert {k: (m.count, m.seconds) for k, m in residency.moved.items()} == {
        ("a", "load"): (1, 3.0),
        ("a", "unload"): (1, 1.0),
        ("b", "load"): (1, 3.0),
    }
    told = [(i.model, i.state, i.since, i.until) for i in residency.intervals()]
    assert told == [
        ("a", "loading", 0.0, 3.0),
        ("a", "resident", 3.0, 4.0),
        ("a", "unloading", 4.0, 5.0),
        ("b", "loading", 5.0, 8.0),
        ("b", "resident", 8.0, None),
    ]
    assert residency.used_gb() == 6.0


@pytest.mark.parametrize(
    "error", [EngineUnavailable("no memory; free some"), OSError("odd"), asyncio.CancelledError()]
)
async def test_a_load_that_fails_is_told_and_kept(
    device: Device, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    device.movers["a"].fail = error
    device.do(Load("a"))
    await device.clock.advance(3)
    assert device.policy.heard[-1] == LoadFailed("a")
    assert not device.scheduler.resident("a")
    assert str(error) in device.owner.failures["a"]
    assert caplog.records[-1].levelno >= logging.WARNING
    device.movers["a"].fail = None
    device.do(Load("a"))
    await device.clock.advance(3)
    assert device.policy.heard[-1] == Loaded("a")
    assert device.owner.failures == {}


async def test_an_unload_that_fails_does_not_hold_up_the_device(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    await device.loaded("a")
    device.movers["a"].fail = OSError("it clings")
    device.do(Unload("a"))
    await device.clock.advance(1)
    assert device.policy.heard[-1] == Unloaded("a")
    assert "it clings" in caplog.text
    assert "it clings" in device.owner.failures["a"]


async def test_a_lost_server_is_told_once_and_before_its_place_is_free(device: Device) -> None:
    await device.loaded("a")
    one, two, three = [await device.lease("a") for _ in range(3)]
    device.policy.heard.clear()
    device.scheduler.release(one, lost=True)
    assert device.policy.heard == [Lost("a"), Finished(one.id)]
    assert not device.scheduler.resident("a")
    device.policy.heard.clear()
    device.scheduler.release(two, lost=True)
    assert device.policy.heard == [Finished(two.id)]
    device.do(Load("a"))
    await device.clock.advance(3)
    four = await device.lease("a")
    device.policy.heard.clear()
    device.scheduler.release(three, lost=True)  # of before it was brought back
    assert device.policy.heard == [Finished(three.id)]
    device.scheduler.release(four, lost=True)
    assert device.policy.heard[1:] == [Lost("a"), Finished(four.id)]
    assert device.owner.residency.losses == {"a": 2}


async def test_calls_cut_by_an_unload_are_no_loss(device: Device) -> None:
    await device.loaded("a")
    lease = await device.lease("a")
    device.policy.heard.clear()
    device.do(Unload("a"))
    device.scheduler.release(lease, lost=True)
    assert "Lost" not in device.policy.kinds()


async def test_what_moves_is_not_moved_twice(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.do(Load("a"), Load("a"), Unload("a"))
    await device.clock.advance(10)
    assert device.owner.faults == 2
    assert device.log == ["start a", "up a"]


async def test_a_lost_server_that_its_policy_was_letting_go_is_still_unloaded(
    device: Device,
) -> None:
    await device.loaded("a")
    lease = await device.lease("a")
    device.scheduler.release(lease, lost=True)
    device.do(Unload("a"))  # the policy was draining it, so to it the loss was no news
    await device.clock.advance(1)
    assert device.policy.heard[-1] == Unloaded("a")
    assert device.owner.faults == 0


async def test_a_server_always_there_can_be_lost_and_brought_back() -> None:
    log: list[str] = []
    mover = FakeMover(FakeClock(), log, "s")
    policy = Scripted(grant_all)
    scheduler = DeviceScheduler(lambda: policy, clock=FakeClock())
    scheduler.configure({"s": Place("s", Model("s", 1, 8), mover)}, {})
    assert scheduler.resident("s")
    lease = await scheduler.acquire(call())
    policy.say = lambda event: [Load("s")] if isinstance(event, Lost) else []
    scheduler.release(lease, lost=True)
    assert not scheduler.resident("s")
    await settle()
    assert log == ["start s", "up s"]
    assert scheduler.resident("s")
    assert policy.heard[-1] == Loaded("s")
    scheduler.configure({}, {})
    assert not scheduler.owners  # nothing of it has to be unloaded


async def test_a_device_that_leaves_is_drained_before_it_is_dropped(device: Device) -> None:
    await device.loaded("a")
    lease = await device.lease("a")
    device.policy.say = lambda e: [Unload("a")] if isinstance(e, Finished) else []
    device.scheduler.configure({}, {})
    assert device.policy.heard[-1] == Configured((), 0.0)
    device.scheduler.release(lease)
    assert list(device.scheduler.owners) == ["gpu"]
    await device.clock.advance(1)
    assert device.log == ["stop a", "down a"]
    assert not device.scheduler.owners
    device.configure()
    assert list(device.scheduler.owners) == ["gpu"]


async def test_a_model_that_leaves_while_it_loads_is_unloaded_by_its_own_mover(
    device: Device,
) -> None:
    device.do(Load("a"))
    await device.clock.advance(1)
    device.configure("b")
    device.policy.say = lambda e: [Unload("a")] if e == Loaded("a") else []
    await device.clock.advance(3)
    assert device.log == ["start a", "up a", "stop a", "down a"]


async def test_a_replaced_server_is_stopped_before_anything_is_loaded_in_its_place(
    device: Device,
) -> None:
    await device.loaded("a")
    lease = await device.lease("a")
    old = device.movers["a"]
    device.movers["a"] = FakeMover(device.clock, device.log, "new a", start_s=3)
    device.policy.heard.clear()
    device.policy.say = lambda e: [Load("a")] if isinstance(e, Lost) else []
    device.configure()
    assert device.policy.heard == [Lost("a")]
    await device.clock.advance(5)
    assert device.log == []
    assert old.up
    device.scheduler.release(lease, lost=True)
    assert device.policy.heard[1:] == [Finished(lease.id)]  # no loss of the new one
    await device.clock.advance(10)
    assert device.log == ["stop a", "down a", "start new a", "up new a"]
    assert device.scheduler.resident("a")


async def test_a_server_replaced_while_it_loads_is_loaded_anew(device: Device) -> None:
    device.do(Load("a"))
    await device.clock.advance(1)
    device.movers["a"] = FakeMover(device.clock, device.log, "new a", start_s=3)
    device.configure()
    await device.clock.advance(10)
    assert device.log == ["start a", "up a", "stop a", "down a", "start new a", "up new a"]
    assert device.policy.kinds().count("Loaded") == 1


# --- closing -----------------------------------------------------------------------------------


async def test_closing_waits_for_what_moves_and_starts_nothing(device: Device) -> None:
    await device.loaded("a")
    lease = await device.lease("a")
    waiting = asyncio.create_task(device.scheduler.acquire(call("b", max_wait_s=5)))
    device.do(Load("b"))
    await settle()
    device.policy.say = lambda event: [Load("b"), Unload("a"), Wake(0)]
    closing = asyncio.create_task(device.scheduler.close())
    await settle()
    with pytest.raises(EngineUnavailable, match="closing"):
        await waiting
    with pytest.raises(EngineUnavailable, match="closing"):
        await device.scheduler.acquire(call("a"))
    assert not closing.done()
    await device.clock.advance(2)
    assert not closing.done()
    await device.clock.advance(1)
    await asyncio.wait_for(closing, 5)
    assert device.log == ["start b", "up b"]
    device.scheduler.release(lease)
    await device.scheduler.close()
    await device.clock.advance(100)
    assert device.log == ["start b", "up b"]


async def test_closing_cuts_the_calls_of_a_replaced_server_short(device: Device) -> None:
    await device.loaded("a")
    await device.lease("a")
    device.movers["a"] = FakeMover(device.clock, device.log, "new a")
    device.configure()
    await settle()
    assert device.log == []
    closing = asyncio.create_task(device.scheduler.close())
    await device.clock.advance(1)
    await asyncio.wait_for(closing, RETIRE_S / 2)
    assert device.log == ["stop a", "down a"]
