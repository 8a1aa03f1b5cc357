"""What happens together is decided together; nothing leaves for nobody; nothing stays empty.

From the bare policy up to a vote of the pipeline over servers that share a device.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from composer.eligibility import Eligibility
from composer.generations import Generation, Generations, Way
from composer.outcome import Outcome
from composer.pipeline import Pipeline
from composer.scheduling.base import Lease, Place
from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    Event,
    Finished,
    Left,
    Load,
    LoadFailed,
    Model,
    Ticked,
    Unload,
    Wake,
)
from composer.scheduling.log import encode, replay
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.scheduler import DeviceScheduler
from composer.scheduling.state import PolicySettings
from composer.strategies.vote import Vote, VoteSettings
from composer.types import (
    Ask,
    Call,
    Catalog,
    Chunk,
    Component,
    Expert,
    Plan,
    Policy,
    Request,
    Server,
    Usage,
)
from tests.fakes import FakeEngine, FakeRouter, FakeSettings, request
from tests.scheduling.device import EXACT, Device, arrive, estimated, model, moves
from tests.scheduling.device import call as waiting
from tests.scheduling.fakes import FakeClock, FakeMover, Scripted, call, settle

EAGER = replace(EXACT, patience=0.01)
PRELOADING = replace(EAGER, preload=True)


def device(
    *models: Model,
    memory_gb: float = 10.0,
    settings: PolicySettings = PRELOADING,
    resident: Sequence[str] = (),
) -> Device:
    named = {m.id: m for m in models}
    return Device(SwapPolicy(settings), named, memory_gb, estimated(named)).start(resident)


# --- one moment ----------------------------------------------------------------------


def test_the_calls_of_one_moment_are_all_heard_before_a_swap_is_decided_on() -> None:
    """a is idle, so the swap to b begins with b's call; those for a that come with it go first."""
    on = device(model("a"), model("b"), settings=EAGER, resident="a")
    arrive(on, waiting(1, "a", 5.0), waiting(2, "b", 5.0), waiting(3, "a", 5.0))
    on.run()
    assert on.granted == {1: 5.0, 3: 5.0, 2: 18.0}
    assert moves(on) == [(6.0, "-a"), (8.0, "+b")]


def test_swaps_are_decided_on_at_the_end_of_a_moment_only() -> None:
    on = device(model("a"), model("b"), settings=EAGER, resident="a")
    arrive(on, waiting(1, "a", 5.0), waiting(2, "b", 5.0), waiting(3, "a", 6.0))
    on.run()
    for _, event, actions in on.log:
        if any(isinstance(action, Load | Unload) for action in actions):
            assert isinstance(event, Ticked)
        if Wake(on.now) in actions:
            assert not isinstance(event, Ticked)


def test_who_leaves_in_the_moment_in_which_the_other_calls_end_moves_nothing() -> None:
    """A vote: two members agree, and the third is cancelled."""
    on = device(model("a"), model("b"), settings=EAGER, resident="a")
    arrive(on, waiting(1, "a", 5.0), waiting(2, "b", 5.0), waiting(3, "a", 5.0))
    on.run(until=5.5)
    assert on.policy.snapshot()["models"]["a"]["state"] == "draining"  # type: ignore[attr-defined]
    on.at(6.0, Left(2))  # behind the two ends at the same time
    on.run()
    assert moves(on) == []
    assert on.state == {"a": "loaded"}
    assert on.policy.snapshot()["models"]["a"]["state"] == "resident"  # type: ignore[attr-defined]


# --- a reason that has left ------------------------------------------------------------


def test_calls_of_a_model_that_may_stay_after_all_are_served_by_it() -> None:
    """a drains for b; a's new call is put off to its next visit; b's caller leaves."""
    on = device(model("a", run_s=20.0), model("b"), settings=EAGER, resident="a")
    arrive(on, waiting(1, "a", 0.0), waiting(2, "b", 1.0), waiting(3, "a", 2.0, wait=100.0))
    on.at(10.0, Left(2))
    on.run()
    assert on.granted == {1: 0.0, 3: 10.0}
    assert moves(on) == []


def test_who_still_has_to_leave_for_others_is_not_kept() -> None:
    """a and b leave for c and d; d's caller goes, and only one of them has to."""
    on = device(
        model("a", run_s=5.0), model("b", run_s=30.0), model("c"), model("d"),
        memory_gb=20.0, settings=EAGER, resident="ab",
    )  # fmt: skip
    arrive(on, waiting(1, "a"), waiting(2, "b"), waiting(3, "c", 1.0), waiting(4, "d", 1.0))
    on.at(2.0, Left(4))
    on.run()
    assert on.granted[3] == 17.0  # a, which is gone first: 5, 2 to unload, 10 to load
    assert moves(on) == [(5.0, "-a"), (7.0, "+c")]
    assert on.state == {"b": "loaded", "c": "loaded"}


def test_a_configuration_that_drops_all_claims_drops_their_reasons() -> None:
    on = device(model("a", run_s=20.0), model("b"), settings=EAGER, resident="a")
    arrive(on, waiting(1, "a", 0.0), waiting(2, "b", 1.0))
    on.at(5.0, Configured((model("a", run_s=20.0),), 10.0))
    on.run()
    assert on.refused == {2: "gone"}
    assert moves(on) == []


# --- never left empty ------------------------------------------------------------------


@pytest.mark.parametrize(("preload", "loaded"), [(True, ["b"]), (False, [])])
def test_a_device_whose_swap_lost_its_reason_half_way_loads_what_is_asked_for_most(
    preload: bool, loaded: list[str]
) -> None:
    on = device(
        model("a"), model("b"), model("c"), settings=replace(EAGER, preload=preload), resident="a"
    )
    arrive(on, waiting(1, "b", 1.0), waiting(2, "b", 1.0), waiting(3, "a", 40.0))
    arrive(on, waiting(4, "c", 70.0))
    on.at(71.0, Left(4))  # a's unload is under way
    on.run()
    assert list(on.state) == loaded
    assert all(state == "loaded" for state in on.state.values())


def test_at_the_start_what_fits_is_loaded_in_the_order_of_configuration() -> None:
    on = device(model("a"), model("b", memory_gb=15.0), model("c"), model("d"), memory_gb=22.0)
    on.run()
    assert moves(on) == [(0.0, "+a"), (10.0, "+c")]


def test_a_call_during_a_preload_is_served_in_time() -> None:
    on = device(model("a"), model("b"))
    arrive(on, waiting(1, "b", 4.0, wait=18.5))
    on.run()
    assert moves(on) == [(0.0, "+a"), (10.0, "-a"), (12.0, "+b")]
    assert on.granted == {1: 22.0}


@pytest.mark.parametrize(("wait", "loaded"), [(15.0, []), (60.0, ["a"])])
def test_nothing_is_loaded_that_would_shut_out_calls_as_they_came(
    wait: float, loaded: list[str]
) -> None:
    """b's load fails, and its caller goes. Loading a, unloading it and loading b takes 22 s."""
    on = device(model("a"), model("b"))
    on.fails = lambda name: name == "b"
    arrive(on, waiting(1, "b", 0.0, wait=wait))
    on.at(5.0, Left(1))
    on.run()
    assert list(on.state) == loaded


def test_a_load_ahead_that_failed_is_not_repeated_until_somebody_asks() -> None:
    failed = iter([True])
    on = device(model("a"), model("b", memory_gb=11.0), memory_gb=11.0)
    on.fails = lambda name: next(failed, False)
    arrive(on, waiting(1, "a", 100.0))
    on.run()
    assert sum(isinstance(event, LoadFailed) for _, event, _ in on.log) == 1
    assert moves(on) == [(0.0, "+a"), (10.0, "+b"), (100.0, "-b"), (102.0, "+a")]


# --- the owner ---------------------------------------------------------------------------


class Waking:
    """Grants what comes, and asks to be woken at once by everything but a tick."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def on(self, event: Event, now: float) -> list[Action]:
        self.heard.append(event)
        return [] if isinstance(event, Ticked) else [Wake(now)]


async def test_an_owner_ends_a_moment_once_however_much_happens_in_it() -> None:
    policy, clock = Waking(), FakeClock()
    scheduler = DeviceScheduler(lambda: policy, clock=clock)
    mover = FakeMover(clock, [], "s")
    scheduler.configure({"s": Place("s", Model("s", 1, 8), mover)}, {})
    await settle()
    policy.heard.clear()
    asked = [asyncio.create_task(scheduler.acquire(call())) for _ in range(3)]
    await asyncio.sleep(0)
    asked[0].cancel()
    await settle()
    assert [type(event) for event in policy.heard] == [Arrived, Arrived, Arrived, Left, Ticked]
    for task in asked:
        task.cancel()
    await settle()
    assert [type(event) for event in policy.heard[5:]] == [Left, Left, Ticked]


async def test_an_owner_that_closes_ends_no_moment() -> None:
    policy = Waking()
    scheduler = DeviceScheduler(lambda: policy, clock=FakeClock())
    scheduler.configure({"s": Place("s", Model("s", 1, 8), FakeMover(FakeClock(), [], "s"))}, {})
    await scheduler.close()
    await settle()
    assert [type(event) for event in policy.heard] == [Configured]


async def test_a_later_wake_takes_the_place_of_one_that_comes_at_once() -> None:
    policy = Scripted(lambda e: [Wake(0.0), Wake(500.0)] if isinstance(e, Configured) else [])
    clock = FakeClock(100.0)
    scheduler = DeviceScheduler(lambda: policy, clock=clock)
    scheduler.configure({"s": Place("s", Model("s", 1, 8), FakeMover(clock, [], "s"))}, {})
    await settle()
    assert policy.kinds() == ["Configured"]
    await clock.advance(400.0)
    assert policy.kinds() == ["Configured", "Ticked"]


# --- a vote of the pipeline ----------------------------------------------------------------


@dataclass
class Swapped(FakeEngine):
    """A server with weights to be loaded, whose experts answer as told after `run_s`."""

    server: str
    clock: FakeClock
    answers: dict[str, str]
    run_s: float = 1.0
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.server)
        self.log: list[str] = []
        self.mover = FakeMover(self.clock, self.log, self.server, start_s=30.0, stop_s=2.0)

    async def start(self) -> None:
        await self.mover.start()

    async def stop(self) -> None:
        await self.mover.stop()

    async def run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        self.asked.append(call.expert)
        await self.clock.sleep(self.run_s)
        self.mover.check_up()
        yield Chunk(text=self.answers[call.expert], finish_reason="stop", usage=Usage(1, 1))


class OneDevice:
    """Servers "large" and "small" on a device with room for one, under the service's policy, and
    a vote of three of their experts, the small one's answer being `odd`."""

    def __init__(self, odd: str) -> None:
        self.clock = FakeClock(0.0)
        self.engines = {
            "large": Swapped("large", self.clock, {"upper": "A", "reverse": "A"}),
            "small": Swapped("small", self.clock, {"small": odd}),
        }
        policy = PolicySettings(patience=0.01, preload=True)
        self.make_policy = lambda: SwapPolicy(policy)
        self.scheduler = DeviceScheduler(self.make_policy, clock=self.clock)
        experts = {
            "upper": Expert(id="upper", server="large"),
            "small": Expert(id="small", server="small"),
            "reverse": Expert(id="reverse", server="large"),
        }
        vote = Component("vote", VoteSettings(weights="majority"))
        auto = Policy("auto", Component("fake", FakeSettings()), vote, tuple(experts), k=3)
        way = Way(
            auto,
            Eligibility.of(list(experts.values())),
            np.zeros(len(experts), np.float32),
            FakeRouter(auto.experts),
            Vote(VoteSettings(weights="majority")),
        )
        places = {
            name: Place(
                "gpu",
                Model(name, 4, 8, memory_gb=6.0, load_s=30.0, unload_s=2.0, movable=True),
                engine,
            )
            for name, engine in self.engines.items()
        }
        servers = {name: Server(name, "fake", FakeSettings()) for name in self.engines}
        catalog = Catalog(1, "digest", servers, experts, {"auto": auto})
        generations = Generations(lambda _: None)
        self.ways = {"auto": way}
        generations.swap(Generation(catalog, self.ways, lambda _: way, self.engines, places))
        self.outcomes: list[Outcome] = []
        self.pipeline = Pipeline(generations, self.scheduler, self.outcomes.append)
        self.scheduler.configure(places, {"gpu": 10.0})

    async def ask(self) -> str:
        async with await self.pipeline.answer(request()) as answer:
            return "".join([chunk.text async for chunk in answer])

    @property
    def device(self) -> dict[str, object]:
        return self.scheduler.snapshot()["devices"]["gpu"]

    def check_replay(self) -> None:
        steps = self.scheduler.events.last()
        assert replay(map(encode, steps), self.make_policy) == []


async def test_a_vote_settled_by_the_loaded_servers_members_swaps_nothing() -> None:
    on = OneDevice(odd="B")
    await on.clock.advance(30)
    assert on.device["residents"] == ["large"]  # loaded before anybody asked
    for number in range(1, 4):
        asked = asyncio.create_task(on.ask())
        await on.clock.advance(5)
        assert await asked == "A"
        assert on.engines["large"].asked == ["upper", "reverse"] * number
        await on.clock.advance(300)
    assert on.engines["small"].asked == []
    device = on.device
    assert (device["swaps"], device["residents"], device["moving"]) == (1, ["large"], [])
    assert device["policy"]["plan"] == []  # type: ignore[index]
    on.check_replay()
    await on.scheduler.close()


async def test_a_vote_that_needs_both_servers_swaps_once() -> None:
    on = OneDevice(odd="B")
    on.engines["large"].answers["reverse"] = "C"
    await on.clock.advance(30)
    asked = asyncio.create_task(on.ask())
    await on.clock.advance(60)
    assert await asked == "A"
    assert on.engines["large"].asked == ["upper", "reverse"]
    assert on.engines["small"].asked == ["small"]
    device = on.device
    assert (device["swaps"], device["residents"], device["moving"]) == (2, ["small"], [])
    [outcome] = on.outcomes
    assert outcome.timings.total_ms >= 0
    on.check_replay()
    await on.scheduler.close()


async def test_a_caller_that_leaves_while_the_device_swaps_for_it_leaves_no_empty_device() -> None:
    on = OneDevice(odd="B")
    on.engines["large"].answers["reverse"] = "C"
    await on.clock.advance(30)
    asked = asyncio.create_task(on.ask())
    await on.clock.advance(2)  # large is being unloaded
    assert [move["state"] for move in on.device["moving"]] == ["unloading"]  # type: ignore[attr-defined]
    asked.cancel()
    await on.clock.advance(60)
    device = on.device
    assert (device["swaps"], device["residents"], device["moving"]) == (2, ["large"], [])
    on.check_replay()
    await on.scheduler.close()


async def test_what_a_strategy_will_ask_next_is_told_ahead() -> None:
    """Two steps, the second of which reads the first one's answer: a vote's members come at once,
    and name nobody."""
    on = OneDevice(odd="B")
    await on.clock.advance(30)
    vote = on.ways["auto"].strategy

    class Steps:
        def check(self, request: Request) -> None: ...

        def calls(self, experts: int) -> tuple[int, int]:
            return experts, experts

        async def run(self, request: Request, plan: Plan, ask: Ask) -> AsyncGenerator[Chunk, None]:
            async for _ in ask("upper", later=("small",)):
                pass
            async for chunk in ask("small"):
                yield chunk

    for strategy in (Steps(), vote):
        on.ways["auto"] = replace(on.ways["auto"], strategy=strategy)  # type: ignore[arg-type]
        asked = asyncio.create_task(on.ask())
        await on.clock.advance(120)
        await asked
    told = [s.event.call for s in on.scheduler.events.last() if isinstance(s.event, Arrived)]
    assert [(one.model, one.later) for one in told] == [
        ("large", ("small",)),
        ("small", ()),
        *(("large", ()), ("small", ()), ("large", ())),
    ]
    on.check_replay()
    await on.scheduler.close()


async def test_a_lease_for_a_resident_does_not_wait_for_the_moments_end() -> None:
    on = OneDevice(odd="B")
    await on.clock.advance(30)
    lease = await asyncio.wait_for(on.scheduler.acquire(call("large", max_wait_s=1.0)), 1)
    assert lease == Lease(lease.id, "large", "e", 0.0)
    on.scheduler.release(lease)
    await on.scheduler.close()


def test_finished_calls_are_heard_before_those_that_they_make_needless() -> None:
    """The policy alone, told what an owner tells of a settled vote."""
    policy = SwapPolicy(EAGER)
    policy.on(Configured((model("a"), model("b")), 10.0, ("a",)), 0.0)
    policy.on(Ticked(), 0.0)
    for number, name in enumerate("aba"):
        policy.on(Arrived(waiting(number, name)), 0.0)
    policy.on(Ticked(), 0.0)
    told = [policy.on(event, 1.0) for event in (Finished(0), Finished(2), Left(1), Ticked())]
    assert told == [[], [Wake(1.0)], [], []] or told == [[Wake(1.0)], [], [], []]
