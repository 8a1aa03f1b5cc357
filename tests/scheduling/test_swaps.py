"""The benchmark's own arithmetic: workloads as promised, and what counts as below a curve."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("ortools")

from benchmarks.common import SHARED
from benchmarks.swapping.batches import arrival_order, batch, grouped
from benchmarks.swapping.points import Point, below, dominated, least_swaps
from benchmarks.swapping.rules import OURS
from benchmarks.swapping.workload import IN_FLIGHT, Cell, arrive, grid, make, popularity, window
from composer.scheduling.batch_order import completes, load_seconds, order

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared routing data")


def test_the_grid_is_the_issues():
    assert len(grid()) == len(set(grid())) == 54


@needs_data
def test_a_cell_offers_its_load():
    work = make(Cell(16, 2, 0.6, "poisson"), min_calls=20_000)
    span = work.jobs[-1].call.arrived
    offered = sum(job.run_s for job in work.jobs) / span
    assert offered / IN_FLIGHT == pytest.approx(0.6, rel=0.05)
    waits = [job.call.deadline - job.call.arrived for job in work.jobs]
    assert waits == pytest.approx([work.max_wait_s] * len(waits))
    assert make(Cell(16, 2, 0.6, "poisson"), min_calls=20_000) == work


@pytest.mark.parametrize("kind", ["poisson", "bursty"])
def test_arrivals_have_their_rate_and_popularity(kind):
    rng = np.random.default_rng(0)
    shares = popularity(4, rng)
    assert shares.max() == pytest.approx(12 / 25)
    when, who = arrive(kind, 40_000, 5.0, shares, rng)
    assert (np.diff(when) >= 0).all()
    assert 40_000 / when[-1] == pytest.approx(5.0, rel=0.05)
    assert np.bincount(who) / 40_000 == pytest.approx(shares, abs=0.03)
    same = float((who[1:] == who[:-1]).mean())
    alone = float((shares**2).sum())
    assert same == pytest.approx(alone, abs=0.02) if kind == "poisson" else same > 1.5 * alone


@needs_data
@pytest.mark.parametrize("seed", range(5))
def test_windows_lie_on_the_optimums_time_grid(seed):
    work = window(seed)
    times = [job.call.arrived for job in work.jobs] + [job.run_s for job in work.jobs]
    times += [job.call.deadline for job in work.jobs]
    times += [seconds for model in work.models for seconds in (model.load_s, model.unload_s)]
    assert [round(t, 2) for t in times] == times
    assert len(work.jobs) == 40
    sizes = {model.id: model.memory_gb for model in work.models}
    assert sum(sizes[name] for name in work.resident) <= work.memory_gb


def point(swap_s: float, p95: float, misses: float = 0.0, rule: str = OURS, knob: float = 0):
    return Point("c", 0.6, rule, knob, swap_s, 1.0, misses, 0.0, p95, 0.0, 100.0, 5.0, 1000)


def test_a_curve_is_the_line_between_its_points():
    curve = [point(100, 10), point(20, 90)]
    assert not below(point(60, 50), curve)
    assert not below(point(58.5, 49), curve)  # within the tolerance
    assert below(point(50, 40), curve)
    assert below(point(300, 5), curve)  # quicker than ours ever is
    assert not below(point(300, 95), curve)


def test_misses_count_too():
    curve = [point(100, 10, 0.02), point(20, 90, 0.02)]
    assert below(point(60, 50), curve)
    assert not below(point(60, 50, 0.0195), curve)


def test_tables():
    points = [point(100, 10), point(20, 90, knob=1), point(60, 50, rule="LRU")]
    points.append(point(30, 40, rule="LRU", knob=2))
    points.append(point(30, 40, 0.5, rule="LoRAX"))
    others = [replace(p, rule=rule) for rule in ("arrival order", "llama-swap") for p in points[:1]]
    [row] = least_swaps(points + others)
    assert (row[OURS], row["LRU"], row["LoRAX"]) == ("20 (90)", "30 (40)", "misses 50.0%")
    shares, exceptions = dominated(points + others)
    assert {row["rule"]: row["ρ 0.6"] for row in shares} == {
        "arrival order": "1/1",
        "LRU": "1/2",
        "LoRAX": "0/1",
        "llama-swap": "1/1",
    }
    assert [row["knob"] for row in exceptions] == [2, 0]


@pytest.mark.parametrize("seed", range(8))
def test_batches_are_done_by_ours_and_never_cheaper_by_others(seed):
    work = batch(seed)
    steps = order(work.chains, work.models, work.memory_gb, work.resident, exact_states=None)
    assert completes(steps, work.chains, work.models, work.memory_gb, work.resident)
    best = load_seconds(steps, work.models)
    assert best <= grouped(work) + 1e-9
    assert best <= arrival_order(work) + 1e-9
