"""Prometheus metrics: what is counted for requests, and that labels stay few."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any

import pytest

from composer.errors import Overloaded
from composer.metrics import EXPERT, NONE, Metrics
from composer.outcome import Outcome
from composer.scheduling.scheduler import DeviceScheduler
from composer.types import Choice, Plan, Usage
from tests.fakes import request
from tests.scheduling.fakes import Fifo, call, fifo, settle
from tests.scheduling.workload import Day


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def outcome(
    policy: str | None,
    error: BaseException | None = None,
    first_ms: float | None = 20.0,
    **fields: Any,
) -> Outcome:
    plan = None if policy is None else Plan(policy, "single", (Choice("e", 1.0),), ("e",))
    made = Outcome(request(**fields), perf_counter() - 2.0, plan=plan)
    made.usage = Usage(3, 4)
    made.timings.first_token_ms = first_ms
    made.end(error)
    return made


def test_requests_are_counted_by_policy_and_status() -> None:
    metrics = Metrics(DeviceScheduler(Fifo), lambda: ("auto", "panel"))
    metrics.answered(outcome("auto"))
    metrics.answered(outcome("auto"))
    metrics.answered(outcome("auto", Overloaded("full", retry_after=1), first_ms=None))
    metrics.answered(outcome("panel", asyncio.CancelledError()))
    total = "composer_requests_total"
    assert value(metrics, total, policy="auto", status="ok") == 2
    assert value(metrics, total, policy="auto", status="error") == 1
    assert value(metrics, total, policy="panel", status="cancelled") == 1
    assert value(metrics, "composer_request_seconds_count", policy="auto") == 2
    assert value(metrics, "composer_request_seconds_bucket", policy="auto", le="1.0") == 0
    assert value(metrics, "composer_first_token_seconds_count", policy="auto") == 2
    assert value(metrics, "composer_first_token_seconds_bucket", policy="auto", le="0.025") == 2
    assert value(metrics, "composer_tokens_total", policy="auto", kind="completion") == 12


def test_ten_thousand_experts_are_one_label() -> None:
    metrics = Metrics(DeviceScheduler(Fifo), lambda: ("auto",))
    for number in range(10_000):
        metrics.answered(outcome(f"expert-{number}", model=f"expert-{number}"))
    metrics.answered(outcome(None, model="no-such-model"))
    metrics.answered(outcome(None, model="auto"))
    assert value(metrics, "composer_requests_total", policy=EXPERT, status="ok") == 10_000
    assert value(metrics, "composer_requests_total", policy=NONE, status="ok") == 1
    assert value(metrics, "composer_requests_total", policy="auto", status="ok") == 1
    assert len(metrics.render().splitlines()) < 200


async def test_experts_are_named_only_while_calls_wait_for_them() -> None:
    scheduler = fifo()
    metrics = Metrics(scheduler)
    held = await scheduler.acquire(call(expert="one"))
    waiting = asyncio.create_task(scheduler.acquire(call(expert="two", priority="batch")))
    await settle()
    labels = {"server": "s", "expert": "two"}
    assert value(metrics, "composer_queue", **labels, priority="batch") == 1
    assert value(metrics, "composer_queue", **labels, priority="interactive") == 0
    assert value(metrics, "composer_queue", server="s", expert="one", priority="batch") is None
    scheduler.release(held)
    await waiting
    assert value(metrics, "composer_queue", **labels, priority="batch") is None
    assert b'"two"' not in metrics.render()


async def test_swaps_and_their_seconds_are_those_of_the_day() -> None:
    day = Day(3, Fifo)
    metrics = Metrics(day.scheduler)
    await day.run()
    loads = {name: day.log.count(f"up {name}") for name in "abc"}
    unloads = {name: day.log.count(f"down {name}") for name in "abc"}
    assert sum(loads.values()) > 3
    for name in "abc":
        labels = {"device": "gpu", "model": name}
        for move, count, each_s in (
            ("load", loads[name], day.movers[name].start_s),
            ("unload", unloads[name], day.movers[name].stop_s),
        ):
            assert (value(metrics, "composer_swaps_total", **labels, move=move) or 0) == count
            seconds = value(metrics, "composer_swap_seconds_total", **labels, move=move) or 0
            assert seconds == pytest.approx(count * each_s)
    failed = sum(
        value(metrics, "composer_swaps_total", device="gpu", model=name, move="failed_load") or 0
        for name in "abc"
    )
    starts = sum(day.log.count(f"start {name}") for name in "abc")
    assert failed == starts - sum(loads.values())
    assert value(metrics, "composer_device_memory_gb", device="gpu") == 10.0
    resident = {
        name: value(metrics, "composer_resident", device="gpu", server=name) for name in "abc"
    }
    assert resident == {name: float(day.scheduler.resident(name)) for name in "abc"}
    refused = sum(one.how == "Overloaded" for one in day.told)
    said = sum(
        value(metrics, "composer_refused_total", device=device, reason=reason) or 0
        for device in ("gpu", "server:s")
        for reason in ("full", "late")
    )
    assert said == refused > 0


def test_two_services_have_a_registry_each() -> None:
    one, two = (Metrics(DeviceScheduler(Fifo), lambda: ("auto",)) for _ in range(2))
    one.answered(outcome("auto"))
    assert value(one, "composer_requests_total", policy="auto", status="ok") == 1
    assert value(two, "composer_requests_total", policy="auto", status="ok") is None
