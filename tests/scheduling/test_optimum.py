"""The exact optimum: its plans can be carried out, and none is better."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import inf

import pytest

pytest.importorskip("ortools")

from benchmarks.common import SHARED
from benchmarks.swapping.baselines import ActiveSet, LeastRecentlyUsed, MergedWaits
from benchmarks.swapping.optimum import Optimum, Stay, optimum
from benchmarks.swapping.simulator import Job, Workload, simulate
from benchmarks.swapping.workload import recorded_lengths, window
from composer.scheduling.events import (
    Action,
    Arrived,
    Event,
    Finished,
    Grant,
    Load,
    Loaded,
    Model,
    Refuse,
    Unload,
    Unloaded,
    Waiting,
    Wake,
)


class Follow:
    """Carries out a plan, as a policy: each move as soon as the moves before it allow, each call
    in the stay that it is planned for."""

    def __init__(self, workload: Workload, plan: Optimum) -> None:
        self.size = {m.id: m.memory_gb for m in workload.models}
        self.memory_gb = workload.memory_gb
        self.stays: dict[str, list[Stay]] = {m.id: [] for m in workload.models}
        for stay in plan.stays:
            self.stays[stay.model].append(stay)
        self.loads = [stay for stay in plan.stays if stay.load is not None]
        self.planned = {call for stay in plan.stays for call in stay.calls}
        self.taking = {name: self.size[name] for name in workload.resident}
        self.loaded = set(workload.resident)
        self.waiting: dict[int, Waiting] = {}
        self.running: dict[int, str] = {}
        self.served: set[int] = set()

    def on(self, event: Event, now: float) -> list[Action]:
        actions: list[Action] = []
        match event:
            case Arrived(call) if call.id in self.planned:
                self.waiting[call.id] = call
            case Arrived(call):
                actions.append(Refuse(call.id, "late", 1.0))
            case Finished(call):
                self.served.add(call)
                del self.running[call]
            case Loaded(model):
                self.loaded.add(model)
            case Unloaded(model):
                del self.taking[model]
        for model in sorted(self.loaded):
            stay = self.stays[model][0]
            for call in stay.calls:
                if call in self.waiting:
                    del self.waiting[call]
                    self.running[call] = model
                    actions.append(Grant(call))
            done = self.served.issuperset(stay.calls)
            if stay.unload is not None and done and now >= stay.unload - 1e-6:
                self.loaded.remove(model)
                self.stays[model].pop(0)
                actions.append(Unload(model))
            elif stay.unload is not None and done:
                actions.append(Wake(stay.unload))
        while self.loads:
            stay = self.loads[0]
            taken = sum(self.taking.values()) + self.size[stay.model]
            if stay.model in self.taking or taken > self.memory_gb + 1e-9:
                break
            assert stay.load is not None
            if now < stay.load - 1e-6:
                actions.append(Wake(stay.load))
                break
            self.loads.pop(0)
            self.taking[stay.model] = self.size[stay.model]
            actions.append(Load(stay.model))
        wakes = [action for action in actions if isinstance(action, Wake)]
        if wakes:
            first = min(wakes, key=lambda wake: wake.at)
            actions = [a for a in actions if not isinstance(a, Wake)] + [first]
        return actions


def check(workload: Workload, found: Optimum) -> None:
    result = simulate(Follow(workload, found), workload)
    assert result.late == result.cut == 0
    assert result.misses == found.misses
    assert result.swap_s == pytest.approx(found.swap_s)


def small(seed: int, *, calls: int = 5) -> Workload:
    """Whole seconds, so that a search over seconds is exact."""
    import numpy as np

    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 4))
    models = tuple(
        Model(
            f"m{i}",
            in_flight=calls,
            queue=99,
            memory_gb=float(rng.integers(1, 4)),
            load_s=float(rng.integers(1, 4)),
            unload_s=float(rng.integers(0, 2)),
            movable=True,
        )
        for i in range(n)
    )
    memory = max(float(rng.integers(2, 6)), *(m.memory_gb for m in models))
    times = np.sort(rng.integers(0, 9, calls))
    jobs = tuple(
        Job(
            Waiting(
                k,
                f"m{rng.integers(n)}",
                float(t),
                deadline=float(t + rng.integers(1, 9)),
            ),
            float(rng.integers(1, 5)),
        )
        for k, t in enumerate(times)
    )
    resident = ("m0",) if rng.random() < 0.5 else ()
    return Workload(f"small {seed}", models, memory, jobs, None, resident)


def brute(workload: Workload) -> tuple[int, float]:
    """(misses, swap seconds) by trying every action at every second; knows no stays."""
    jobs, models = workload.jobs, {m.id: m for m in workload.models}
    end = int(max(job.call.deadline or 0 for job in jobs)) + 1

    # A model's state: absent (None), or (phase, when it ends); a loaded one ends when its calls do.
    @cache
    def best(t: int, states: tuple, left: frozenset) -> tuple[int, float]:
        late = {j for j in left if (jobs[j].call.deadline or 0) < t}
        if t > end or left == late:
            return len(left), 0.0
        settled = []
        for name, state in states:
            if state and state[0] == "loading" and state[1] <= t:
                state = ("loaded", t)
            elif state and state[0] == "leaving" and state[1] <= t:
                state = None
            settled.append((name, state))
        return choose(t, tuple(settled), left, 0)

    @cache
    def choose(t: int, states: tuple, left: frozenset, at: int) -> tuple[int, float]:
        """Decides for the models from number `at` on, then lets a second pass."""
        if at == len(states):
            taken = sum(models[name].memory_gb for name, state in states if state)
            if taken > workload.memory_gb:
                return 10**6, 0.0
            return best(t + 1, states, left)
        name, state = states[at]
        found = [choose(t, states, left, at + 1)]

        def put(new: object) -> tuple:
            return (*states[:at], (name, new), *states[at + 1 :])

        if state is None:
            if models[name].load_s:
                misses, cost = choose(t, put(("loading", t + models[name].load_s)), left, at + 1)
                found.append((misses, cost + models[name].load_s))
        elif state[0] == "loaded":
            for j in left:
                call = jobs[j].call
                if call.model == name and call.arrived <= t <= (call.deadline or 0):
                    until = max(state[1], t + jobs[j].run_s)
                    found.append(choose(t, put(("loaded", until)), left - {j}, at))
            if state[1] <= t:
                gone = t + models[name].unload_s
                new = ("leaving", gone) if gone > t else None
                misses, cost = choose(t, put(new), left, at + 1)
                found.append((misses, cost + models[name].unload_s))
        return min(found)

    start = tuple(
        (m.id, ("loaded", 0) if m.id in workload.resident else None) for m in workload.models
    )
    return best(0, start, frozenset(range(len(jobs))))


SLOW = [pytest.param(5, seed, marks=pytest.mark.slow) for seed in range(60)]


@pytest.mark.parametrize(("calls", "seed"), [*((3, seed) for seed in range(12)), *SLOW])
def test_it_equals_a_search_over_every_action_at_every_second(calls: int, seed: int):
    workload = small(seed, calls=calls)
    found = optimum(workload)
    assert found.proven
    assert (found.misses, found.swap_s) == pytest.approx(brute(workload))
    check(workload, found)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared routing data")
@pytest.mark.parametrize("seed", range(4))
def test_a_windows_plan_can_be_carried_out_and_no_rule_does_better(seed: int):
    assert len(recorded_lengths()) > 10
    workload = window(seed)
    found = optimum(workload)
    assert found.proven
    check(workload, found)
    rules = (LeastRecentlyUsed(40), ActiveSet(workload.max_wait_s or 0.0), MergedWaits(inf))
    for rule in rules:
        result = simulate(rule, workload)
        assert (found.misses, found.swap_s) <= (result.misses, result.swap_s + 1e-6)


def test_windows_that_bind_and_noise_are_refused():
    workload = small(0)
    with pytest.raises(ValueError, match="noise"):
        optimum(replace(workload, noise={"m0": (1.0,)}))
    models = tuple(replace(model, in_flight=1) for model in workload.models)
    with pytest.raises(ValueError, match="raise in_flight"):
        optimum(replace(workload, models=models))
