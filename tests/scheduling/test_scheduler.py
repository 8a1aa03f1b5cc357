"""The scheduler and its owners under policies that do what a test says: whatever is decided is
done, told and undone properly, and nobody hangs."""

from __future__ import annotations

import asyncio

import pytest

from composer.errors import EngineUnavailable, Overloaded
from composer.scheduling.base import Lease, Place
from composer.scheduling.clock import LoopClock
from composer.scheduling.device import GRACE_S
from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    Event,
    Finished,
    Grant,
    Left,
    Load,
    Model,
    Refuse,
    Ticked,
    Unload,
    Waiting,
    Wake,
)
from composer.scheduling.scheduler import DeviceScheduler
from composer.scheduling.tickets import RETRY_AFTER_S
from tests.scheduling.fakes import (
    FakeClock,
    Fifo,
    Scripted,
    call,
    fifo,
    grant_all,
    refuse_all,
    settle,
    standing,
)

# --- leases, under first come, first served --------------------------------------------------


async def test_a_lease_tells_how_long_it_waited() -> None:
    clock = FakeClock()
    scheduler = fifo(clock=clock)
    first = await scheduler.acquire(call(expert="one"))
    assert (first.server, first.expert, first.queue_s) == ("s", "one", 0.0)
    waiting = asyncio.create_task(scheduler.acquire(call(expert="two", arrived=50.0)))
    await settle()
    assert scheduler.stats() == {"s": {"running": 1, "waiting": 1, "in_flight": 1, "queue": 8}}
    clock.time += 2.5
    scheduler.release(first)
    second = await waiting
    assert (second.expert, second.queue_s) == ("two", 2.5)


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    scheduler = fifo(in_flight=2, queue=3)
    for _ in range(2):
        await scheduler.acquire(call())
    waiting = [asyncio.create_task(scheduler.acquire(call())) for _ in range(3)]
    await settle()
    with pytest.raises(Overloaded, match="'s' is full: 2 calls run and 3 wait") as refused:
        await scheduler.acquire(call())
    assert refused.value.retry_after == 8.0
    waiting[1].cancel()
    late = scheduler.acquire(call())
    late.send(None)  # the cancelled call's place is free in the same step of the event loop
    late.close()
    await settle()
    assert scheduler.stats()["s"]["waiting"] == 2
    for task in waiting:
        task.cancel()
    await settle()
    assert scheduler.stats()["s"]["waiting"] == 0


@pytest.mark.parametrize(("said", "told"), [(0.001, RETRY_AFTER_S[0]), (1e9, RETRY_AFTER_S[1])])
async def test_the_advice_stays_within_bounds(said: float, told: float) -> None:
    scheduler, _ = scripted(lambda event: refuse_all(event, "full", said))
    with pytest.raises(Overloaded) as refused:
        await scheduler.acquire(call())
    assert refused.value.retry_after == told


async def test_a_lease_is_released_once() -> None:
    scheduler = fifo()
    lease = await scheduler.acquire(call())
    scheduler.release(lease)
    with pytest.raises(ValueError, match="is not out"):
        scheduler.release(lease)
    with pytest.raises(ValueError, match="is not out"):
        scheduler.release(Lease(10_000, "s", "e", 0.0))


async def test_cancelling_in_the_step_of_the_grant_returns_the_place() -> None:
    scheduler = fifo()
    lease = await scheduler.acquire(call())
    waiting = asyncio.create_task(scheduler.acquire(call()))
    await settle()
    scheduler.release(lease)  # grants to the waiting call …
    assert scheduler.stats()["s"]["running"] == 1
    waiting.cancel()  # … which never wakes to see it
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert scheduler.stats()["s"]["running"] == 0
    assert await asyncio.wait_for(scheduler.acquire(call()), 1)


async def test_cancelling_before_the_grant_passes_the_place_on() -> None:
    scheduler = fifo()
    lease = await scheduler.acquire(call())
    gone = asyncio.create_task(scheduler.acquire(call(expert="gone")))
    next_ = asyncio.create_task(scheduler.acquire(call(expert="next")))
    await settle()
    gone.cancel()
    scheduler.release(lease)  # before the cancelled task has run its clean-up
    assert (await asyncio.wait_for(next_, 1)).expert == "next"


async def test_an_unknown_server_is_refused() -> None:
    with pytest.raises(EngineUnavailable, match="'other' is not served"):
        await fifo().acquire(call("other"))


async def test_more_room_wakes_those_who_wait_and_less_takes_from_nobody() -> None:
    scheduler = fifo()
    first = await scheduler.acquire(call())
    waiting = [asyncio.create_task(scheduler.acquire(call(expert=str(i)))) for i in range(3)]
    await settle()
    scheduler.configure(standing(in_flight=3), {})
    await settle()
    assert [task.done() for task in waiting] == [True, True, False]
    scheduler.configure(standing(in_flight=1), {})
    scheduler.release(first)
    scheduler.release(waiting[0].result())
    await settle()
    assert not waiting[2].done()
    scheduler.release(waiting[1].result())
    assert (await asyncio.wait_for(waiting[2], 1)).expert == "2"


async def test_a_server_that_leaves_fails_its_queue_and_keeps_its_leases() -> None:
    scheduler = fifo()
    lease = await scheduler.acquire(call())
    waiting = asyncio.create_task(scheduler.acquire(call()))
    await settle()
    scheduler.configure(standing("t"), {})
    with pytest.raises(EngineUnavailable, match="taken out of service"):
        await waiting
    with pytest.raises(EngineUnavailable):
        await scheduler.acquire(call())
    assert set(scheduler.stats()) == {"t"}
    scheduler.configure(standing("s"), {})  # back before its lease ended: that one still counts
    assert scheduler.stats()["s"]["running"] == 1
    scheduler.configure({}, {})
    assert list(scheduler.owners) == ["s"]  # drained before it is dropped
    scheduler.release(lease)
    assert not scheduler.owners
    with pytest.raises(ValueError, match="is not out"):
        scheduler.release(lease)


async def test_a_server_that_moves_takes_its_queue_along() -> None:
    scheduler = fifo()
    lease = await scheduler.acquire(call())
    waiting = asyncio.create_task(scheduler.acquire(call()))
    await settle()
    moved = Place("elsewhere", *(standing()["s"].model, standing()["s"].mover))
    scheduler.configure({"s": moved}, {})
    assert (await asyncio.wait_for(waiting, 1)).server == "s"  # there is room on the new device
    assert scheduler.stats()["s"]["running"] == 1
    scheduler.release(lease)  # of the old device, which is free to go now
    assert list(scheduler.owners) == ["elsewhere"]


async def test_a_place_under_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="is of a model 's'"):
        fifo().configure({"t": standing()["s"]}, {})


# --- what the policy hears ---------------------------------------------------------------------


def scripted(
    say: object = lambda event: (), clock: FakeClock | None = None, **movable: float
) -> tuple[DeviceScheduler, Scripted]:
    """A scheduler of server "s", always there, under a scripted policy."""
    policy = Scripted(say)  # type: ignore[arg-type]
    scheduler = DeviceScheduler(lambda: policy, clock=clock or FakeClock())
    scheduler.configure(standing(), {})
    return scheduler, policy


async def test_a_call_is_told_with_its_bound() -> None:
    clock = FakeClock(100.0)
    scheduler, policy = scripted(grant_all, clock)
    await scheduler.acquire(call(max_wait_s=5.0, arrived=98.0, priority="batch"))
    await scheduler.acquire(call(max_wait_s=5.0))
    await scheduler.acquire(call())
    assert policy.heard[0] == Configured((Model("s", 1, 8),), 0.0, ("s",))
    assert policy.heard[1:] == [
        Arrived(Waiting(1, "s", 98.0, deadline=103.0, batch=True)),
        Arrived(Waiting(2, "s", 100.0, deadline=105.0)),
        Arrived(Waiting(3, "s", 100.0)),
    ]


async def test_the_same_configuration_is_told_once() -> None:
    scheduler, policy = scripted()
    scheduler.configure(standing(), {})
    scheduler.configure(standing(queue=9), {})
    assert policy.heard[1:] == [Configured((Model("s", 1, 9),), 0.0, ())]


async def test_a_wake_comes_at_its_time_and_the_newest_counts() -> None:
    clock = FakeClock(100.0)

    def say(event: Event) -> list[Action]:
        return [Wake(105.0)] if isinstance(event, Configured) else []

    scheduler, policy = scripted(say, clock)
    policy.say = lambda event: [Wake(103.0), Wake(102.0)] if isinstance(event, Arrived) else []
    waiting = asyncio.create_task(scheduler.acquire(call()))
    await clock.advance(1.9)
    assert Ticked() not in policy.heard
    await clock.advance(10)
    assert policy.kinds().count("Ticked") == 1
    assert policy.times[-1] == 102.0
    waiting.cancel()
    await settle()
    assert policy.heard[-1] == Left(1)


async def test_time_never_goes_back() -> None:
    clock = FakeClock(100.0)
    scheduler, policy = scripted(grant_all, clock)
    clock.time = 99.0
    await scheduler.acquire(call())
    assert policy.times == [100.0, 100.0]


async def test_what_an_action_causes_at_once_waits_for_its_turn() -> None:
    """A grant to a caller that was cancelled gives its place back before anything else happens,
    but not inside the policy's own step."""
    scheduler, policy = scripted()
    gone = asyncio.create_task(scheduler.acquire(call()))
    await settle()
    gone.cancel()
    policy.say = lambda e: [Grant(1), Grant(2)] if isinstance(e, Arrived) else []
    lease = await scheduler.acquire(call())
    assert lease.id == 2
    assert policy.heard[2:] == [Arrived(Waiting(2, "s", 100.0)), Finished(1)]
    await settle()
    assert len(policy.heard) == 4


@pytest.mark.parametrize(
    ("reason", "kind", "words"),
    [
        ("full", Overloaded, "'s' is full: 0 calls run and 0 wait; come back in 5 s"),
        ("late", Overloaded, "'s' cannot take the call within its bound: 0 calls run"),
        ("gone", EngineUnavailable, "'s' was taken out of service"),
        ("mood", Overloaded, r"'s' refuses \(mood\)"),
    ],
)
async def test_a_refusal_says_why(reason: str, kind: type[Exception], words: str) -> None:
    scheduler, _ = scripted(lambda event: refuse_all(event, reason))
    with pytest.raises(kind, match=words):
        await scheduler.acquire(call())
    assert scheduler.owners["s"].calls.refused == {reason: 1}


# --- policies that go wrong --------------------------------------------------------------------


async def test_a_policy_that_forgets_a_call_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock(100.0)
    scheduler, policy = scripted(clock=clock)
    first = asyncio.create_task(scheduler.acquire(call(max_wait_s=5.0)))
    second = asyncio.create_task(scheduler.acquire(call(max_wait_s=9.0)))
    third = asyncio.create_task(scheduler.acquire(call(max_wait_s=1.0)))
    await settle()
    policy.say = lambda event: [Grant(3)] if isinstance(event, Left) else []
    third.cancel()  # granted too late to count
    await clock.advance(5.0 + GRACE_S - 0.1)
    assert not first.done()
    await clock.advance(0.1)
    with pytest.raises(Overloaded, match="within its bound"):
        await first
    assert not second.done()
    await clock.advance(4.0)
    with pytest.raises(Overloaded):
        await second
    owner = scheduler.owners["s"]
    assert owner.calls.refused == {"late": 2}
    assert policy.heard[-4:] == [Ticked(), Left(1), Ticked(), Left(2)]  # asked before it is blamed
    assert "waiting past its bound" in caplog.text
    assert scheduler.stats()["s"]["waiting"] == 0


async def test_a_policy_that_raises_fails_the_call_and_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheduler, policy = scripted(grant_all)
    lease = await scheduler.acquire(call())

    def broken(event: Event) -> list[Action]:
        raise KeyError("a bug")

    policy.say = broken
    with pytest.raises(KeyError, match="a bug"):
        await scheduler.acquire(call())
    scheduler.release(lease)
    policy.say = grant_all
    assert await scheduler.acquire(call())
    assert scheduler.owners["s"].faults == 2
    assert caplog.text.count("a fault of its policy") == 2


@pytest.mark.parametrize("action", [Grant(9), Refuse(9, "full", 1), Load("x"), Unload("x")])
async def test_what_cannot_be_done_is_a_fault(
    action: Action, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, policy = scripted(
        lambda e: [*grant_all(e), action] if isinstance(e, Arrived) else []
    )
    assert await scheduler.acquire(call())
    assert scheduler.owners["s"].faults == 1
    assert "a fault of its policy" in caplog.text
    await settle()
    assert policy.kinds() == ["Configured", "Arrived"]


# --- the real clock ----------------------------------------------------------------------------


async def test_the_loops_clock_rings_in_order_and_never_early() -> None:
    clock, rung = LoopClock(), []
    done = asyncio.Event()
    now = clock.now()

    def ring(at: float) -> None:
        assert clock.now() >= at
        rung.append(at)
        if len(rung) == 3:
            done.set()

    for at in (now + 0.02, now - 5, now + 0.01):
        clock.call_at(at, lambda at=at: ring(at))  # type: ignore[misc]
    clock.call_at(now + 0.005, lambda: rung.append(0)).cancel()
    assert rung == []
    await asyncio.wait_for(done.wait(), 10)
    assert rung == [now - 5, now + 0.01, now + 0.02]


async def test_a_cancelled_wait_under_the_real_clock_leaves_nothing_behind() -> None:
    scheduler = DeviceScheduler(Fifo)
    scheduler.configure(standing(), {})
    lease = await scheduler.acquire(call())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(scheduler.acquire(call(max_wait_s=60)), 0.01)
    scheduler.release(lease)
    assert scheduler.stats()["s"] == {"running": 0, "waiting": 0, "in_flight": 1, "queue": 8}
    await scheduler.close()
