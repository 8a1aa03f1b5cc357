"""What is told of a device adds up to what happened on it."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.scheduling.measures import segment_cache, segment_routing
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.snapshot import INTERVALS, SEGMENT
from composer.scheduling.stats import BUCKETS_S, WINDOW_CALLS, WINDOW_S, Waits
from tests.scheduling.fakes import Fifo, call, fifo, settle
from tests.scheduling.workload import Day


@pytest.mark.parametrize("policy", [Fifo, SwapPolicy])
async def test_a_days_snapshot_adds_up(policy: type[Fifo] | type[SwapPolicy]) -> None:
    day = Day(5, policy)
    await day.run()
    state = day.scheduler.snapshot()
    orjson.dumps(state, option=orjson.OPT_SERIALIZE_NUMPY)  # plain data
    assert set(state["servers"]) == {*"abcs"}
    gpu, alone = state["devices"]["gpu"], state["devices"]["server:s"]
    assert gpu["swaps"] == sum(line.startswith("up ") for line in day.log if line != "up s")
    assert gpu["used_gb"] == pytest.approx(sum(day.held[name] for name in day.held if name != "s"))
    assert set(gpu["residents"]) | {move["model"] for move in gpu["moving"]} == {*day.held} - {"s"}
    moved_s = sum(
        i["to"] - i["from"] for i in gpu["timeline"] if i["state"] != "resident" and i["to"]
    )
    assert len(gpu["timeline"]) < INTERVALS
    assert gpu["swap_s"] == pytest.approx(moved_s)
    waits = [told for device in (gpu, alone) for told in device["wait_s"].values()]
    assert sum(told["calls"] for told in waits) == day.granted > 0
    assert gpu["queue"] == alone["queue"] == []
    assert alone["consistency"] is None
    recent = list(day.scheduler.owners["gpu"].calls.recent)
    assert gpu["consistency"] == {
        "calls": len(recent),
        "capacity": 2,
        "segment": SEGMENT,
        "segment_routing": segment_routing(recent, 2, SEGMENT),
        "segment_cache": segment_cache(recent, 2, SEGMENT),
    }


async def test_the_timeline_of_one_model_has_no_gap_and_no_overlap() -> None:
    day = Day(7, SwapPolicy)
    await day.run()
    for name in "abc":
        spans = [
            (i["from"], i["to"])
            for i in day.scheduler.snapshot()["devices"]["gpu"]["timeline"]
            if i["model"] == name
        ]
        assert all(begin <= (end or np.inf) for begin, end in spans)
        assert all(end is not None and end <= begin for (_, end), (begin, _) in pairwise(spans))


async def test_the_queue_is_told_by_expert_and_priority() -> None:
    scheduler = fifo()
    await scheduler.acquire(call(expert="math"))
    asked = [("math", "batch"), ("law", "interactive"), ("math", "batch"), ("math", "interactive")]
    tasks = [
        asyncio.create_task(scheduler.acquire(call(expert=expert, priority=priority)))  # type: ignore[arg-type]
        for expert, priority in asked
    ]
    await settle()
    assert scheduler.snapshot()["devices"]["s"]["queue"] == [
        {"server": "s", "expert": "math", "interactive": 1, "batch": 2},
        {"server": "s", "expert": "law", "interactive": 1, "batch": 0},
    ]
    for task in tasks:
        task.cancel()
    await settle()
    assert scheduler.snapshot()["devices"]["s"]["queue"] == []
    assert scheduler.snapshot()["devices"]["s"]["left"] == 4


@given(st.lists(st.tuples(st.floats(0, 2000), st.floats(0, 1000)), max_size=50))
def test_percentiles_are_of_the_window_and_the_histogram_of_everything(
    added: list[tuple[float, float]],
) -> None:
    waits = Waits()
    for at, waited in sorted(added):
        waits.add(at, waited)
    now = 2000.0
    recent = [waited for at, waited in added if at >= now - WINDOW_S]
    told = waits.percentiles(now)
    assert told["calls"] == len(recent)
    if recent:
        assert told["p95"] == pytest.approx(np.percentile(recent, 95))
        assert told["max"] == max(recent)
    histogram = waits.histogram()
    assert [bound for bound, _ in histogram] == [*BUCKETS_S, None]
    assert histogram[-1][1] == len(added)
    for bound, count in histogram[:-1]:
        assert bound is not None
        assert count == sum(waited <= bound for _, waited in added)
    assert waits.total_s == pytest.approx(sum(waited for _, waited in added))


def test_the_window_is_bounded() -> None:
    waits = Waits()
    for number in range(WINDOW_CALLS + 10):
        waits.add(0.0, float(number))
    assert waits.percentiles(0.0)["calls"] == WINDOW_CALLS
    assert waits.histogram()[-1][1] == WINDOW_CALLS + 10
