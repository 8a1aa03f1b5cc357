"""The swap policy: the rules it is to follow, one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from composer.scheduling.events import (
    Arrived,
    Configured,
    Finished,
    Grant,
    Left,
    Loaded,
    LoadFailed,
    Lost,
    Model,
    Refuse,
    Ticked,
    Unloaded,
    Waiting,
)
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.state import PolicySettings
from tests.scheduling.device import (
    EXACT,
    arrive,
    call,
    device,
    job,
    model,
    moves,
)


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
