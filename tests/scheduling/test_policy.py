"""The swap policy: its guarantees under random traffic, and the rules it is to follow."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.scheduling.events import (
    Arrived,
    Configured,
    Finished,
    Grant,
    Left,
    Load,
    Loaded,
    LoadFailed,
    Lost,
    Model,
    Refuse,
    Ticked,
    Unload,
    Unloaded,
    Waiting,
)
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.state import PolicySettings
from tests.scheduling.device import Device

EXACT = PolicySettings(learn=False)
"""The models' figures are upper bounds."""


def model(name: str, **changes: object) -> Model:
    given = {
        "in_flight": 4,
        "queue": 100,
        "memory_gb": 10.0,
        "load_s": 10.0,
        "unload_s": 2.0,
        "run_s": 1.0,
        "movable": True,
    }
    return Model(name, **(given | changes))  # type: ignore[arg-type]


def estimated(models: dict[str, Model]) -> Callable[[str, str], float]:
    """Everything takes exactly as long as the models' figures say."""
    return lambda what, name: float(getattr(models[name], f"{what}_s"))


def device(*models: Model, memory_gb: float = 10.0, settings: PolicySettings = EXACT) -> Device:
    named = {m.id: m for m in models}
    return Device(SwapPolicy(settings), named, memory_gb, estimated(named)).start()


def call(
    number: int, name: str, arrived: float = 0.0, wait: float | None = 60.0, **more
) -> Waiting:
    deadline = None if wait is None else arrived + wait
    return Waiting(number, name, arrived, deadline=deadline, **more)


def arrive(on: Device, *calls: Waiting) -> list[Waiting]:
    for each in calls:
        on.at(each.arrived, Arrived(each))
    return list(calls)


# --- under random traffic --------------------------------------------------------------


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Model], float]:
    """Models and a memory, which holds any one of them."""
    n = draw(st.integers(1, 5))
    models = [
        Model(
            f"m{i}",
            in_flight=draw(st.integers(1, 4)),
            queue=draw(st.sampled_from([2, 5, 50])),
            adapters=draw(st.sampled_from([None, None, 1, 2])),
            memory_gb=draw(st.sampled_from([4.0, 8.0, 10.0, 16.0])),
            load_s=draw(st.sampled_from([0.5, 3.0, 10.0])),
            unload_s=draw(st.sampled_from([0.0, 0.5, 2.0])),
            run_s=draw(st.sampled_from([0.2, 1.0, 4.0])),
            movable=i == 0 or draw(st.integers(0, 5)) > 0,
        )
        for i in range(n)
    ]
    return models, draw(st.sampled_from([16.0, 20.0, 26.0]))


@st.composite
def traffic(draw: st.DrawFn, models: list[Model], most: int = 40) -> list[Waiting]:
    """Calls in order of arrival; a few of them for batches, some of them without a bound."""
    calls, at = [], 0.0
    for number in range(draw(st.integers(1, most))):
        at += draw(st.sampled_from([0.0, 0.0, 0.1, 1.0, 5.0, 20.0]))
        name = draw(st.sampled_from([m.id for m in models]))
        batch = draw(st.integers(0, 4)) == 0
        wait = None if batch else draw(st.sampled_from([None, 2.0, 15.0, 15.0, 30.0, 60.0, 120.0]))
        calls.append(
            Waiting(
                number,
                name,
                at,
                adapter=draw(st.sampled_from([None, "a", "b", "c", "d"])),
                deadline=None if wait is None else at + wait,
                batch=batch,
                later=tuple(draw(st.lists(st.sampled_from([m.id for m in models]), max_size=2))),
            )
        )
    return calls


def shorter(seed: int, models: list[Model]) -> Callable[[str, str], float]:
    """Durations of at most the models' figures, often just those."""
    rng = random.Random(seed)
    named = {m.id: m for m in models}
    return lambda what, name: (
        float(getattr(named[name], f"{what}_s")) * rng.choice([1.0, 1.0, 0.7, 0.3, 0.01])
    )


def any_length(seed: int, models: list[Model]) -> Callable[[str, str], float]:
    """Durations that the models' figures say little about."""
    rng = random.Random(seed)
    named = {m.id: m for m in models}
    return lambda what, name: float(getattr(named[name], f"{what}_s")) * rng.lognormvariate(0, 1)


KNOBS = st.builds(
    PolicySettings,
    patience=st.sampled_from([0.01, 0.5, 1.0]),
    learn=st.just(False),
    drain_s=st.sampled_from([5.0, 30.0]),
    adapter_patience=st.sampled_from([0.0, 0.5, 1.0]),
    preload=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), fleet=fleets(), knobs=KNOBS, seed=st.integers(0, 10**6))
def test_under_sound_estimates_no_admitted_call_is_late(
    data: st.DataObject, fleet: tuple[list[Model], float], knobs: PolicySettings, seed: int
) -> None:
    models, memory = fleet
    calls = data.draw(traffic(models))
    on = Device(SwapPolicy(knobs), {m.id: m for m in models}, memory, shorter(seed, models)).start()
    arrive(on, *calls)
    rng = random.Random(seed)
    for one in rng.sample(calls, len(calls) // 5):  # who leaves makes nobody late
        on.at(one.arrived + rng.choice([0.0, 1.0, 10.0]), Left(one.id))
    on.run()
    on.check_all_ended(calls)
    arrivals = {c.id: c for c in calls}
    for now, event, actions in on.log:
        for action in actions:
            if isinstance(action, Refuse):
                arriving = isinstance(event, Arrived) and event.call.id == action.call
                assert arriving, f"{arrivals[action.call]} was admitted, and refused at {now}"
    assert not on.cut


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    fleet=fleets(),
    knobs=KNOBS,
    learn=st.booleans(),
    drain_s=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_whatever_happens_every_call_ends_once_and_in_time(
    data: st.DataObject,
    fleet: tuple[list[Model], float],
    knobs: PolicySettings,
    learn: bool,
    drain_s: float,
    seed: int,
) -> None:
    """Loads fail, servers die, callers leave, models come and go, and nothing lasts as expected."""
    models, memory = fleet
    calls = data.draw(traffic(models))
    rng = random.Random(seed)
    policy = SwapPolicy(replace(knobs, learn=learn, drain_s=drain_s))
    on = Device(
        policy,
        {m.id: m for m in models},
        memory,
        any_length(seed, models),
        fails=lambda name: rng.random() < 0.2,
    ).start()
    arrive(on, *calls)
    last = calls[-1].arrived
    for _ in range(data.draw(st.integers(0, 6))):
        at = rng.uniform(0, last + 30)
        on.at(at, rng.choice([Lost(rng.choice(models).id), Left(rng.choice(calls).id)]))
    if data.draw(st.booleans()):
        on.at(rng.uniform(0, last + 10), Configured(tuple(models[1:]), memory + 2))
        on.at(rng.uniform(last + 10, last + 20), Configured(tuple(models), memory))
    on.run()
    on.check_all_ended(calls)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), fleet=fleets(), seed=st.integers(0, 10**6))
def test_the_same_events_give_the_same_actions(
    data: st.DataObject, fleet: tuple[list[Model], float], seed: int
) -> None:
    models, memory = fleet
    calls = data.draw(traffic(models))
    on = Device(SwapPolicy(), {m.id: m for m in models}, memory, any_length(seed, models)).start()
    arrive(on, *calls)
    on.run()
    other = SwapPolicy()
    for now, event, actions in on.log:
        assert other.on(event, now) == actions


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_models_that_all_fit_are_loaded_once(data: st.DataObject, seed: int) -> None:
    models = [model(f"m{i}") for i in range(4)]
    calls = data.draw(traffic(models))
    on = Device(SwapPolicy(), {m.id: m for m in models}, 40.0, any_length(seed, models)).start()
    arrive(on, *calls)
    on.run()
    assert sorted(on.loads) == sorted(set(on.loads))
    assert not any(isinstance(a, Unload) for _, _, actions in on.log for a in actions)


# --- rules ---------------------------------------------------------------------------


def moves(on: Device) -> list[tuple[float, str]]:
    """Loads and unloads, as (time, "+model" or "-model")."""
    found = []
    for now, _, actions in on.log:
        for action in actions:
            if isinstance(action, Load):
                found.append((round(now, 2), f"+{action.model}"))
            elif isinstance(action, Unload):
                found.append((round(now, 2), f"-{action.model}"))
    return found


def test_alternating_calls_with_wide_bounds_need_two_loads() -> None:
    on = device(model("a"), model("b"))
    calls = [call(n, "ab"[n % 2], 0.1 * n, wait=60.0) for n in range(40)]
    arrive(on, *calls)
    on.run()
    on.check_all_ended(calls)
    assert on.loads == ["a", "b"]
    assert not on.refused


def test_a_swap_is_begun_as_late_as_is_safe() -> None:
    """b's deadline is 60 s: less 10 s to load and 2 s to unload a, whose last call ends before."""
    on = device(model("a"), model("b"))
    arrive(on, call(1, "a", 0.0), call(2, "b", 0.0), call(3, "a", 40.0))
    on.run()
    assert [what for _, what in moves(on)] == ["+a", "-a", "+b"]
    assert moves(on)[1][0] == pytest.approx(48.0, abs=0.01)
    assert on.granted[3] == 40.0
    assert on.granted[2] == pytest.approx(60.0, abs=0.01)


def test_less_patience_begins_it_earlier() -> None:
    on = device(model("a"), model("b"), settings=replace(EXACT, patience=0.5))
    arrive(on, call(1, "a", 0.0), call(2, "b", 0.0))
    on.run()
    assert moves(on)[1][0] == pytest.approx(18.0, abs=0.01)


def test_one_call_that_may_run_long_is_no_reason_to_hurry() -> None:
    """It hardly uses its model's slots. What needs much of their time is begun with the next plan,
    which c's call asks for."""

    def begun(calls: int) -> float:
        on = device(
            model("a"), model("b", run_s=3.0), model("c", memory_gb=1.0), settings=PolicySettings()
        )
        arrive(on, call(1, "a"), *[call(10 + n, "b", 15.0) for n in range(calls)])
        arrive(on, call(2, "c", 16.0))
        on.run()
        return moves(on)[1][0]

    assert begun(1) > 35.0
    assert begun(20) == 16.0


@pytest.mark.parametrize(("used_until", "left"), [(0.0, (15.0, 15.0)), (88.0, (35.0, 50.0))])
def test_with_little_patience_unused_models_leave_at_once_and_used_ones_later(
    used_until: float, left: tuple[float, float]
) -> None:
    on = device(model("a", run_s=5.0), model("b"), settings=replace(EXACT, patience=0.05))
    calls = [call(1, "a"), call(2, "b", 0.1, wait=200.0)]
    at = 12.0
    while at <= used_until:
        calls.append(call(len(calls) + 1, "a", at, wait=100.0))
        at += 4.0
    arrive(on, *calls)
    on.run()
    at, what = moves(on)[1]
    assert what == "-a"
    assert left[0] <= at <= left[1]
    assert not on.refused


def test_who_would_be_refused_is_still_served_by_a_model_on_its_way_out() -> None:
    """a leaves early, for a call that could wait for much longer than a's own callers can."""
    on = device(model("a", run_s=5.0), model("b"), settings=replace(EXACT, patience=0.05))
    used = [call(10 + n, "a", 12.0 + 4 * n, wait=20.0) for n in range(6)]
    arrive(on, call(1, "a"), call(2, "b", 0.1, wait=200.0), *used)
    on.run(until=33.5)
    assert isinstance(on.policy, SwapPolicy)
    assert on.policy.snapshot()["models"]["a"]["state"] == "draining"
    arrive(on, call(30, "a", 33.6, wait=20.0))
    on.run()
    assert on.granted[30] == 33.6
    assert not on.refused
    assert moves(on)[1:3] == [(38.6, "-a"), (40.6, "+b")]


def test_who_is_late_longest_goes_first_however_many_wait() -> None:
    on = device(
        model("a", run_s=10.0), model("b"), model("c"), settings=replace(EXACT, patience=0.01)
    )
    many = [call(10 + n, "c", 1.0, wait=300.0) for n in range(90)]
    arrive(on, call(1, "a", wait=300.0), *many, call(2, "b", 2.0, wait=300.0))
    on.run()
    assert on.loads == ["a", "c", "b"]


def test_nothing_is_granted_to_who_leaves_beyond_what_it_ends_in_time() -> None:
    """a runs calls of 5 s. One at 44 s would end at 49 s, a second after a has to be gone: it
    waits for a's next visit instead, and a leaves at once, since it serves nobody else."""
    on = device(model("a", run_s=5.0), model("b"))
    arrive(on, call(1, "a"), call(3, "a", 42.9), call(4, "a", 44.0))
    on.at(0.1, Arrived(call(2, "b")))
    on.run()
    assert on.granted[3] == 42.9
    assert moves(on)[1:] == [
        (pytest.approx(47.9, abs=0.01), "-a"),
        (pytest.approx(49.9, abs=0.01), "+b"),
        (pytest.approx(90.0, abs=2.1), "-b"),
        (pytest.approx(92.0, abs=2.1), "+a"),
    ]
    assert on.granted[4] <= 104.0


def test_what_cannot_be_in_time_is_refused_at_arrival_with_advice() -> None:
    on = device(model("a"), model("b"))
    arrive(on, call(1, "a", wait=30.0), call(2, "b", 20.0, wait=11.0))
    on.run(until=20.0)
    assert on.refused == {2: "late"}
    assert on.log[-2][2][0] == Refuse(2, "late", pytest.approx(10.0))


def test_a_model_that_no_caller_can_wait_for_is_loaded_for_who_comes_again() -> None:
    """Else it never would be, and a first estimate that is too long would never be put right."""
    on = device(model("a", load_s=50.0))
    arrive(on, call(1, "a", 0.0, wait=30.0), call(2, "a", 60.0, wait=30.0))
    on.run()
    assert on.refused == {1: "late"}
    assert on.granted == {2: 60.0}


def test_a_full_queue_refuses_interactive_calls_only() -> None:
    on = device(model("a", queue=2, in_flight=1))
    arrive(
        on,
        *[call(n, "a") for n in range(3)],
        *[call(n, "a", wait=None, batch=True) for n in (7, 8)],
    )
    on.run(until=0.0)
    assert on.refused == {2: "full"}
    on.run()
    assert sorted(on.granted) == [0, 1, 7, 8]


def test_the_cheapest_to_bring_back_leaves() -> None:
    """Both are asked for alike; b's load is five times a's."""
    on = device(model("a"), model("b", load_s=50.0), model("c"), memory_gb=20.0)
    arrive(on, *[call(n, "ab"[n % 2], 5.0 * n, wait=200.0) for n in range(20)])
    arrive(on, call(30, "c", 100.0, wait=100.0))
    on.run()
    assert on.loads == ["a", "b", "c"]
    assert on.state == {"b": "loaded", "c": "loaded"}


def test_who_is_asked_for_least_leaves() -> None:
    on = device(model("a"), model("b"), model("c"), memory_gb=20.0)
    calls = [call(n, "b" if n % 10 == 5 else "a", float(n), wait=300.0) for n in range(100)]
    arrive(on, *calls, call(200, "c", 100.0))
    on.run()
    assert on.loads == ["a", "b", "c"]
    assert on.state == {"a": "loaded", "c": "loaded"}


def test_one_large_model_makes_several_leave_and_no_more_than_needed() -> None:
    small = [model(f"s{i}", memory_gb=5.0) for i in range(4)]
    on = device(*small, model("large", memory_gb=10.0), memory_gb=20.0)
    arrive(on, *[call(i, f"s{i}", 0.0) for i in range(4)], call(9, "large", 30.0))
    on.run()
    assert on.loads[-1] == "large"
    assert list(on.state.values()).count("loaded") == 3


def test_it_loads_beside_residents_where_memory_allows() -> None:
    on = device(model("a"), model("b"), memory_gb=20.0)
    arrive(on, call(1, "a"), call(2, "b", 0.5))
    on.run()
    assert moves(on) == [(0.0, "+a"), (0.5, "+b")]


def test_callers_that_left_cause_no_swap() -> None:
    on = device(model("a"), model("b"))
    arrive(on, call(1, "a"), call(2, "b"))
    on.at(30.0, Left(2))
    on.run()
    assert on.loads == ["a"]


def test_a_swap_whose_caller_leaves_while_others_drain_is_given_up() -> None:
    on = device(model("a", run_s=20.0), model("b"), settings=PolicySettings())
    arrive(on, call(1, "a"), call(3, "a", 25.0, wait=30.0))
    on.at(0.1, Arrived(call(2, "b", 0.0, wait=40.0)))
    on.at(29.0, Left(2))
    on.run()
    assert on.loads == ["a"]
    assert on.granted[3] <= 30.0


# --- servers that fail ---------------------------------------------------------------


def test_a_lost_server_is_brought_back_and_its_calls_wait() -> None:
    on = device(model("a"))
    arrive(on, call(1, "a"), call(2, "a", 30.0, wait=30.0))
    on.at(20.0, Lost("a"))
    on.run()
    assert moves(on) == [(0.0, "+a"), (20.0, "+a")]
    assert on.granted[2] == 30.0


def test_a_failed_load_is_tried_again_with_growing_pauses() -> None:
    failures = iter([True, True, True, False])
    on = device(model("a"))
    on.fails = lambda name: next(failures)
    arrive(on, call(1, "a", wait=100.0))
    on.run()
    times = [time for time, _ in moves(on)]
    assert [b - a - 10.0 for a, b in pairwise(times)] == [1.0, 2.0, 4.0]
    assert on.granted == {1: 47.0}


def test_a_server_of_its_own_is_brought_back_without_being_asked_for() -> None:
    on = device(model("a", movable=False, load_s=3.0))
    on.at(5.0, Lost("a"))
    failures = iter([True, False])
    on.fails = lambda name: next(failures)
    on.run()
    assert moves(on) == [(5.0, "+a"), (9.0, "+a")]


def test_calls_that_outlast_the_drain_are_cut_only_for_who_would_be_late() -> None:
    def outcome(wait: float | None) -> tuple[set[int], float]:
        on = device(model("a"), model("b"), settings=replace(EXACT, drain_s=5.0))
        on.lasts = lambda what, name: 500.0 if (what, name) == ("run", "a") else 10.0
        on.come_back = False
        arrive(on, call(1, "a"), call(2, "b", 0.0, wait=wait))
        on.run()
        return on.cut, moves(on)[1][0]

    assert outcome(60.0) == ({1}, pytest.approx(53.0, abs=0.1))
    assert outcome(None) == (set(), 510.0)


# --- adapters ------------------------------------------------------------------------


def adapter_loads(order: list[str | None], slots: int) -> int:
    """Loads of an LRU of adapters, as vLLM keeps one."""
    kept: list[str | None] = []
    loads = 0
    for adapter in order:
        if adapter in kept:
            kept.remove(adapter)
        else:
            loads += 1
            del kept[: len(kept) - slots + 1]
        kept.append(adapter)
    return loads


def closed_loop(adapters: list[str], wait: float, concurrency: int) -> Device:
    """So many callers at once, each asking again as soon as it has its answer."""
    rng = random.Random(0)
    on = device(model("a", in_flight=8, adapters=2, movable=False), settings=PolicySettings())
    on.lasts = lambda what, name: rng.lognormvariate(0, 0.5)
    coming = iter(enumerate(adapters))
    happens = on.happens

    def next_call() -> None:
        number, adapter = next(coming, (None, None))
        if number is not None:
            on.at(on.now, Arrived(call(number, "a", on.now, wait, adapter=adapter)))

    def and_again(event: object) -> None:
        happens(event)  # type: ignore[arg-type]
        if isinstance(event, Finished):
            next_call()

    on.happens = and_again  # type: ignore[method-assign]
    for _ in range(concurrency):
        next_call()
    return on.run()


def test_calls_are_grouped_by_adapter() -> None:
    rng = random.Random(1)
    adapters = [f"adapter-{rng.randrange(12)}" for _ in range(300)]
    on = closed_loop(adapters, 60.0, 32)
    assert len(on.granted) == 300
    granted = [adapters[number] for number in on.granted]
    assert adapter_loads(granted, 2) <= adapter_loads(list(adapters), 2) / 2


def test_an_adapter_in_use_overtakes_only_who_has_patience() -> None:
    """x's calls come faster than they end, for ever; y's waits for half its bound at most, and
    then until those ahead of it have ended."""
    on = device(model("a", in_flight=1, adapters=1, movable=False))
    arrive(on, call(1, "a", 0.5, wait=20.0, adapter="y"))
    arrive(on, *[call(10 + n, "a", 0.9 * n, wait=20.0, adapter="x") for n in range(60)])
    on.run()
    assert 8.0 <= on.granted[1] <= 13.0


def test_the_base_model_needs_no_adapter_slot() -> None:
    on = device(model("a", adapters=1, movable=False))
    arrive(on, call(1, "a", adapter="x"), call(2, "a"), call(3, "a", adapter="y"))
    on.run()
    assert on.granted == {1: 0.0, 2: 0.0, 3: 1.0}


# --- batches -------------------------------------------------------------------------


def job(number: int, name: str, arrived: float = 0.0, **more: object) -> Waiting:
    return call(number, name, arrived, wait=None, batch=True, **more)


def test_batch_calls_give_way() -> None:
    on = device(model("a", in_flight=1, movable=False))
    arrive(on, job(1, "a"), job(2, "a"), call(3, "a", 0.5))
    on.run()
    assert on.granted == {1: 0.0, 3: 1.0, 2: 2.0}


def test_batch_calls_use_free_slots_while_a_swap_is_to_come() -> None:
    """a leaves at 48 s. Its batch calls of 10 s are granted up to 38 s, and then a leaves early,
    since nobody else asks for it: it would be idle."""
    on = device(model("a", in_flight=1, run_s=10.0), model("b"))
    arrive(on, call(1, "a"), *[job(10 + n, "a") for n in range(10)])
    on.at(0.1, Arrived(call(2, "b")))
    on.run()
    assert sum(at <= 38.0 for number, at in on.granted.items() if number >= 10) == 2
    assert on.granted[2] <= 60.0
    assert len(on.granted) == 12
    assert on.loads == ["a", "b", "a"]


def test_a_batch_is_done_in_the_fewest_loads() -> None:
    """Two stages each: all of a and b first, then c, which both feed."""
    on = device(model("a"), model("b"), model("c"))
    jobs = [job(n, "ab"[n % 2], later=("c",)) for n in range(20)]
    arrive(on, *jobs)
    happens = on.happens

    def then_c(event: object) -> None:
        happens(event)  # type: ignore[arg-type]
        if isinstance(event, Finished) and event.call < 100:
            on.at(on.now, Arrived(job(event.call + 100, "c", on.now)))

    on.happens = then_c  # type: ignore[method-assign]
    on.run()
    assert sorted(on.loads) == ["a", "b", "c"]
    assert on.loads[-1] == "c"
    assert len(on.granted) == 40


def test_a_batch_waits_until_an_interactive_model_has_been_quiet() -> None:
    on = device(model("a"), model("b"))
    arrive(on, *[call(n, "a", 5.0 * n) for n in range(10)], job(50, "b", 1.0))
    on.run()
    assert moves(on)[1] == (pytest.approx(45.0 + 2 * 12.0), "-a")
    assert on.granted[50] > 69.0


def test_ten_thousand_batch_calls_are_quick() -> None:
    """Each event costs far less than it would if all that wait were looked at."""
    on = device(*[model(f"m{i}", in_flight=16, adapters=2) for i in range(8)], memory_gb=20.0)
    arrive(on, *[job(n, f"m{n % 8}", adapter=f"x{n % 5}") for n in range(10_000)])
    began = time.process_time()
    on.run()
    assert len(on.granted) == 10_000
    assert len(on.loads) == 8
    assert (time.process_time() - began) / len(on.log) < 1e-3


# --- configuration -------------------------------------------------------------------


def test_calls_of_a_model_that_left_are_refused_and_it_is_unloaded_when_idle() -> None:
    on = device(model("a", in_flight=1), model("b"))
    arrive(on, call(1, "a"), call(2, "a"), call(3, "b"))
    on.at(10.5, Configured((model("b"),), 10.0))
    on.run()
    assert on.refused == {2: "gone"}
    assert moves(on)[1:3] == [(11.0, "-a"), (13.0, "+b")]


def test_less_memory_makes_models_leave() -> None:
    on = device(model("a"), model("b"), memory_gb=20.0)
    arrive(on, call(1, "a"), call(2, "b"))
    on.at(30.0, Configured((model("a"), model("b")), 10.0))
    on.run()
    assert list(on.state.values()) == ["loaded"]


def test_new_models_and_figures_are_taken_over() -> None:
    on = device(model("a", in_flight=1))
    arrive(on, *[call(n, "a") for n in range(3)])
    on.at(10.0, Configured((model("a", in_flight=3), model("b", movable=False, load_s=3.0)), 10.0))
    arrive(on, call(9, "b", 11.0))
    on.run()
    assert on.granted == {0: 10.0, 1: 10.0, 2: 10.0, 9: 13.0}


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (Configured((model("a", memory_gb=30.0),), 20.0), "larger device"),
        (Configured((model("a"), model("a")), 20.0), "the same id"),
        (Finished(7), "call 7 does not run"),
        (Left(7), "call 7 does not wait"),
        (Loaded("a"), "'a' is off, not loading"),
        (LoadFailed("b"), "'b' is not configured"),
        (Unloaded("a"), "'a' is off, not unloading"),
        (Lost("b"), "'b' is not configured"),
    ],
)
def test_events_that_cannot_be_are_errors(event: Configured, says: str) -> None:
    policy = SwapPolicy()
    policy.on(Configured((model("a"),), 10.0), 0.0)
    with pytest.raises(ValueError, match=says):
        policy.on(event, 1.0)
    assert policy.on(Ticked(), 2.0) == []


def test_a_call_cannot_wait_twice() -> None:
    policy = SwapPolicy()
    policy.on(Configured((model("a"),), 10.0), 0.0)
    policy.on(Arrived(call(1, "a")), 0.0)
    with pytest.raises(ValueError, match="call 1 is here already"):
        policy.on(Arrived(call(1, "a")), 1.0)


def test_the_snapshot_is_plain_data() -> None:
    on = device(model("a"), model("b"))
    arrive(on, call(1, "a"), call(2, "b"), job(3, "b"))
    on.run(until=10.5)
    assert isinstance(on.policy, SwapPolicy)
    shown = json.loads(json.dumps(on.policy.snapshot()))
    assert shown["models"]["a"]["state"] == "resident"
    assert shown["models"]["a"]["running"] == 1
    assert (shown["models"]["b"]["waiting"], shown["models"]["b"]["waiting_batch"]) == (1, 1)
    assert shown["plan"] == [
        {"model": "b", "instead_of": ["a"], "at_the_latest": pytest.approx(48.0, abs=0.01)}
    ]


def test_without_a_queue_a_free_place_is_given_at_once() -> None:
    policy = SwapPolicy()
    policy.on(Configured((Model("a", in_flight=1, queue=0),), 0.0, ("a",)), 0.0)
    assert Grant(1) in policy.on(Arrived(Waiting(1, "a", 0.0, deadline=9.0)), 0.0)
    refused = policy.on(Arrived(Waiting(2, "a", 0.0, deadline=9.0)), 0.0)
    assert [(a.call, a.reason) for a in refused if isinstance(a, Refuse)] == [(2, "full")]
