"""The simulator: exact times, the device's rules, and the baselines' rules on top of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.swapping.baseline import Baseline
from benchmarks.swapping.baselines import (
    ActiveSet,
    ArrivalOrder,
    LeastRecentlyUsed,
    MergedWaits,
)
from benchmarks.swapping.simulator import Job, Violation, Workload, simulate
from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    Event,
    Grant,
    Load,
    Loaded,
    Model,
    Refuse,
    Ticked,
    Unload,
    Waiting,
    Wake,
)


def model(name: str, **values: object) -> Model:
    defaults: dict[str, object] = {
        "in_flight": 2,
        "queue": 100,
        "memory_gb": 10.0,
        "load_s": 5.0,
        "unload_s": 1.0,
        "movable": True,
    }
    return Model(name, **{**defaults, **values})  # type: ignore[arg-type]


def workload(calls: str, *, gap: float = 1.0, wait: float | None = 100.0, room: float = 10.0):
    """One call a letter, `gap` seconds apart, each running two seconds."""
    jobs = tuple(
        Job(
            Waiting(n, name, n * gap, deadline=None if wait is None else n * gap + wait),
            2.0,
        )
        for n, name in enumerate(calls)
    )
    return Workload("w", tuple(model(m) for m in sorted(set(calls))), room, jobs, wait)


class Script:
    """Answers each event by what a function of it says."""

    def __init__(self, answer: Callable[[Event, float], list[Action]]) -> None:
        self.on = answer


def test_times_are_exact():
    result = simulate(ArrivalOrder(8), workload("aba"), log=True)
    # a loads 0 to 5 and runs 5 to 7, unloads to 8; b loads to 13, runs to 15, unloads to 16;
    # a loads to 21.
    assert [(m.model, m.kind, m.began, m.ended) for m in result.timeline] == [
        ("a", "load", 0, 5),
        ("a", "unload", 7, 8),
        ("b", "load", 8, 13),
        ("b", "unload", 15, 16),
        ("a", "load", 16, 21),
    ]
    assert result.waits.tolist() == [5, 12, 19]
    assert (result.swap_s, result.swaps, result.misses, result.ended) == (17, 3, 0, 23)
    assert result.p50 == 12
    assert isinstance(result.log[0][1], Configured)


def test_a_refused_call_counts_as_waiting_to_its_bound():
    result = simulate(ArrivalOrder(8), workload("ab", wait=6.0))
    assert result.refused == {"late": 1}
    assert result.waits.tolist() == [5, 6]
    assert (result.misses, result.miss_share) == (1, 0.5)


def test_the_nth_load_of_a_model_meets_the_same_noise():
    noisy = replace(workload("aba"), noise={"a": (2.0, 3.0, 0.5, 1.0)})
    moves = simulate(ArrivalOrder(8), noisy).timeline
    assert [move.ended - move.began for move in moves] == [10, 3, 5, 1, 2.5]


def test_an_unload_cuts_what_runs():
    def answer(event: Event, now: float) -> list[Action]:
        match event:
            case Arrived(call) if call.id == 0:
                return [Load("a")]
            case Loaded("a"):
                return [Grant(0), Wake(now + 1)]
            case Ticked():
                return [Unload("a")]
        return []

    result = simulate(Script(answer), workload("a"))
    assert (result.cut, result.misses) == (1, 1)


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        ([Grant(0)], "a is not loaded"),
        ([Grant(7)], "does not wait"),
        ([Refuse(7, "late", 1)], "does not wait"),
        ([Unload("a")], "unload of a"),
        ([Load("a"), Load("a")], "load of a"),
        ([Load("a"), Load("b")], "takes 20.00 of 10.00 GB"),
        ([], "wait for ever"),
    ],
)
def test_the_devices_rules(actions: list[Action], words: str):
    def answer(event: Event, now: float) -> list[Action]:
        return actions if isinstance(event, Arrived) and event.call.id == 0 else []

    with pytest.raises(Violation, match=words):
        simulate(Script(answer), workload("ab"))


def test_more_calls_than_the_window_are_a_violation():
    def answer(event: Event, now: float) -> list[Action]:
        match event:
            case Arrived(call) if call.id == 2:
                return [Load("a")]
            case Loaded():
                return [Grant(0), Grant(1), Grant(2)]
        return []

    with pytest.raises(Violation, match="more than 2 calls"):
        simulate(Script(answer), workload("aaa"))


def test_more_adapters_than_fit_are_a_violation():
    def answer(event: Event, now: float) -> list[Action]:
        match event:
            case Arrived(call):
                return [Grant(call.id)]
        return []

    jobs = tuple(Job(Waiting(n, "a", 0.0, adapter=name), 1.0) for n, name in enumerate("xy"))
    fixed = Workload("w", (model("a", adapters=1, movable=False),), 0.0, jobs)
    with pytest.raises(Violation, match="2 adapters"):
        simulate(Script(answer), fixed)


def test_waking_for_ever_ends():
    def answer(event: Event, now: float) -> list[Action]:
        return [Wake(now + 1)]

    with pytest.raises(Violation, match="wake-ups"):
        simulate(Script(answer), workload("a"))


# --- the baselines -------------------------------------------------------------------


def loads(result) -> str:
    return "".join(move.model for move in result.timeline if move.kind == "load")


def test_arrival_order_swaps_for_every_change():
    assert loads(simulate(ArrivalOrder(8), workload("abab", gap=0.1))) == "abab"


def test_lookahead_merges_what_is_within_it():
    assert loads(simulate(LeastRecentlyUsed(0), workload("abab", gap=0.1))) == "abab"
    assert loads(simulate(LeastRecentlyUsed(3), workload("abab", gap=0.1))) == "ab"


def test_the_least_recently_used_one_leaves():
    calls = workload("abacb", gap=20.0, room=20.0)
    assert loads(simulate(LeastRecentlyUsed(0), calls)) == "abcb"


def test_an_active_model_gives_way_after_its_time():
    stream = workload("ab" + "a" * 40, gap=1.0)
    assert loads(simulate(ActiveSet(10.0), stream)).startswith("aba")
    assert simulate(ActiveSet(10.0), stream).waits[1] < simulate(ActiveSet(30.0), stream).waits[1]


def test_an_idle_active_model_gives_way_at_once():
    assert loads(simulate(ActiveSet(1000.0), workload("aab", gap=0.1))) == "ab"


def test_waits_for_one_model_are_merged():
    assert loads(simulate(MergedWaits(inf), workload("abcabc", gap=0.1))) == "abc"


def test_a_busy_model_holds_its_place_for_as_long_as_it_may():
    stream = workload("ab" + "a" * 40, gap=1.0)
    patient, hasty = simulate(MergedWaits(inf), stream), simulate(MergedWaits(8.0), stream)
    assert loads(patient) == "ab"
    assert loads(hasty) == "aba"
    assert hasty.waits[1] < patient.waits[1]


RULES: list[Callable[[], Baseline]] = [
    lambda: ArrivalOrder(1),
    lambda: ArrivalOrder(8),
    lambda: LeastRecentlyUsed(0),
    lambda: LeastRecentlyUsed(5),
    lambda: ActiveSet(3.0),
    lambda: ActiveSet(30.0),
    lambda: MergedWaits(0.0),
    lambda: MergedWaits(10.0),
    lambda: MergedWaits(inf),
]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    names = "abcd"[: draw(st.integers(1, 4))]
    models = tuple(
        model(
            name,
            in_flight=draw(st.integers(1, 3)),
            memory_gb=draw(st.sampled_from([2.5, 5.0, 10.0])),
            load_s=draw(st.sampled_from([1.0, 4.0])),
        )
        for name in names
    )
    at, jobs = 0.0, []
    for number in range(draw(st.integers(0, 25))):
        at += draw(st.sampled_from([0.0, 0.25, 1.0, 7.5]))
        wait = draw(st.sampled_from([None, 5.0, 20.0, 60.0]))
        call = Waiting(
            number, draw(st.sampled_from(names)), at, deadline=None if wait is None else at + wait
        )
        jobs.append(Job(call, draw(st.sampled_from([0.5, 2.0, 6.0]))))
    return Workload("w", models, draw(st.sampled_from([10.0, 12.5, 20.0])), tuple(jobs))


@pytest.mark.parametrize("rule", range(len(RULES)))
@given(work=workloads())
@settings(max_examples=40, deadline=None)
def test_no_rule_breaks_the_device_or_lets_a_call_wait_past_its_bound(rule: int, work: Workload):
    result = simulate(RULES[rule](), work, log=True)
    assert result.late == result.cut == 0
    assert len(result.waits) == len(work.jobs)
    again = simulate(RULES[rule](), work, log=True)
    assert again.log == result.log
