"""The fewest swap seconds that a device could have spent, all arrivals being known beforehand.

Exact (CP-SAT) for small windows in which no model's `in_flight` binds; knows no policy. It is the
simulator's device without noise, and why the program below loses nothing:

- A model's stay in memory is [load begins, unload ends). While loaded, and before its unload
  begins, it serves calls; serving a call at max(arrival, loaded) is best, since calls there do
  not hinder each other. So a stay serves any set of calls whose deadlines are not before it is
  loaded and which end before it begins to unload.
- Stays of one model do not overlap, and the memory of all stays fits at any time (a cumulative
  constraint). A stay that serves no call costs and helps nothing, except one that was there at
  the start; so a model has at most as many stays as calls.
- Its unload is spared to a stay that nobody needs gone.

Misses come first: only if no plan serves all calls are they minimised, and then swap seconds among
the plans with the fewest. Times are rounded to `STEP_S`: exact for workloads that lie on that grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ortools.sat.python import cp_model

from benchmarks.swapping.simulator import Job, Workload
from composer.scheduling.events import (
    Model,
)

STEP_S = 0.01
MEMORY_STEP_GB = 0.001


@dataclass(frozen=True, slots=True)
class Stay:
    """A model's stay in memory, in seconds: its load begins (None: it was there), its unload
    begins (None: it is there to the end), and the calls it serves."""

    model: str
    load: float | None
    unload: float | None
    calls: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Optimum:
    """`swap_s` of the best plan found and `bound_s`, which no plan with as few misses is below;
    equal where `proven`. `misses` are the fewest there can be where `misses_proven`."""

    swap_s: float
    bound_s: float
    misses: int
    proven: bool
    misses_proven: bool
    stays: tuple[Stay, ...]


def optimum(workload: Workload, *, limit: float = 60.0, workers: int = 1) -> Optimum:
    """`limit` bounds each of up to three solves, in CP-SAT's deterministic seconds, so that a busy
    machine changes nothing. Raises ValueError for a workload with noise, or
    with a model that could have more calls than its window, and RuntimeError where no plan was
    found in time."""
    if workload.noise:
        raise ValueError("the optimum is defined for exact durations; set noise={}")
    for model in workload.models:
        calls = sum(job.call.model == model.id for job in workload.jobs)
        if calls > model.in_flight:
            raise ValueError(
                f"{model.id} has {calls} calls for {model.in_flight} at once; raise in_flight"
            )
    program = _Program(workload, may_miss=False)
    status, solver = program.solve(program.cost, limit, workers)
    misses, misses_proven = 0, True
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        all_missed = status == cp_model.INFEASIBLE  # unless time ran out
        program = _Program(workload, may_miss=True)
        status, solver = program.solve(sum(program.missed), limit, workers)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            raise RuntimeError(f"no plan for {workload.name!r} within {limit} s")
        misses = round(solver.objective_value)
        misses_proven = status == cp_model.OPTIMAL and (all_missed or misses > 0)
        program.model.add(sum(program.missed) == misses)
        status, solver = program.solve(program.cost, limit, workers)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            raise RuntimeError(f"no plan for {workload.name!r} within {limit} s")
    return Optimum(
        swap_s=solver.objective_value * STEP_S,
        bound_s=solver.best_objective_bound * STEP_S,
        misses=misses,
        proven=status == cp_model.OPTIMAL and misses_proven,
        misses_proven=misses_proven,
        stays=program.stays(solver),
    )


@dataclass(slots=True)
class _Stay:
    """Variables of a possible stay; times in steps."""

    model: Model
    initial: bool
    used: Any
    begins: Any
    loaded: Any
    leaves: Any
    stays: Any
    calls: dict[int, Any]  # by the job's number in its workload


class _Program:
    def __init__(self, workload: Workload, *, may_miss: bool) -> None:
        self.workload = workload
        self.model = cp_model.CpModel()
        self.all: list[_Stay] = []
        self.cost: Any = 0
        self.missed: list[Any] = []
        moves = sum(2 * (m.load_s + m.unload_s) for m in workload.models)
        last = max((_latest(job) for job in workload.jobs), default=0.0)
        self.end = _steps(last + moves) + 1
        tasks: list[Any] = []
        memory: list[int] = []
        for model in workload.models:
            if not model.movable:
                continue
            jobs = [n for n, job in enumerate(workload.jobs) if job.call.model == model.id]
            self._stays_of(model, jobs, tasks, memory, may_miss)
        self.model.add_cumulative(tasks, memory, round(workload.memory_gb / MEMORY_STEP_GB))

    def _stays_of(
        self, model: Model, jobs: list[int], tasks: list[Any], memory: list[int], may_miss: bool
    ) -> None:
        program, end = self.model, self.end
        initial = model.id in self.workload.resident
        stays: list[_Stay] = []
        for number in range(len(jobs) + initial):
            first = initial and number == 0
            begins = 0 if first else program.new_int_var(0, end, "")
            stay = _Stay(
                model=model,
                initial=first,
                used=program.new_constant(1) if first else program.new_bool_var(""),
                begins=begins,
                loaded=begins + (0 if first else _steps(model.load_s)),
                leaves=program.new_int_var(0, end, ""),
                stays=program.new_bool_var(""),
                calls={job: program.new_bool_var("") for job in jobs},
            )
            gone = program.new_int_var(0, 2 * end, "")
            unload = _steps(model.unload_s)
            program.add(stay.leaves >= stay.loaded).only_enforce_if(stay.used)
            program.add(gone == stay.leaves + unload).only_enforce_if(~stay.stays)
            program.add(stay.leaves == end).only_enforce_if(stay.stays)
            program.add(gone == 2 * end).only_enforce_if(stay.stays)
            size = program.new_int_var(0, 2 * end, "")
            tasks.append(program.new_optional_interval_var(begins, size, gone, stay.used, ""))
            memory.append(round(model.memory_gb / MEMORY_STEP_GB))
            leaves = program.new_bool_var("")
            program.add_bool_or([leaves, stay.stays, ~stay.used])
            self.cost += unload * leaves
            if not first:
                self.cost += _steps(model.load_s) * stay.used
                program.add_bool_or([*stay.calls.values(), ~stay.used])
            if stays:
                program.add_implication(stay.used, stays[-1].used)
                program.add(begins >= stays[-1].leaves + unload).only_enforce_if(stay.used)
                program.add_implication(stay.used, ~stays[-1].stays)
            for job, serves in stay.calls.items():
                self._served(self.workload.jobs[job], stay, serves)
            stays.append(stay)
        for job in jobs:
            options = [stay.calls[job] for stay in stays]
            if may_miss:
                self.missed.append(program.new_bool_var(""))
                options.append(self.missed[-1])
            program.add_exactly_one(options)
        self.all += stays

    def _served(self, job: Job, stay: _Stay, serves: Any) -> None:
        run = _steps(job.run_s)
        self.model.add_implication(serves, stay.used)
        self.model.add(stay.leaves >= _steps(job.call.arrived) + run).only_enforce_if(serves)
        self.model.add(stay.leaves >= stay.loaded + run).only_enforce_if(serves)
        if job.call.deadline is not None:
            by = _steps(job.call.deadline)
            self.model.add(stay.loaded <= by).only_enforce_if(serves)

    def solve(self, objective: Any, limit: float, workers: int) -> tuple[Any, cp_model.CpSolver]:
        solver = cp_model.CpSolver()
        solver.parameters.max_deterministic_time = limit
        solver.parameters.num_workers = workers
        solver.parameters.random_seed = 0
        self.model.minimize(objective)
        return solver.solve(self.model), solver

    def stays(self, solver: cp_model.CpSolver) -> tuple[Stay, ...]:
        """The plan, in order of the loads."""
        found = []
        for stay in self.all:
            if not solver.boolean_value(stay.used):
                continue
            forever = solver.boolean_value(stay.stays)
            found.append(
                Stay(
                    model=stay.model.id,
                    load=None if stay.initial else solver.value(stay.begins) * STEP_S,
                    unload=None if forever else solver.value(stay.leaves) * STEP_S,
                    calls=tuple(
                        self.workload.jobs[job].call.id
                        for job, serves in stay.calls.items()
                        if solver.boolean_value(serves)
                    ),
                )
            )
        return tuple(sorted(found, key=lambda stay: -1.0 if stay.load is None else stay.load))


def _steps(seconds: float) -> int:
    return round(seconds / STEP_S)


def _latest(job: Job) -> float:
    return job.run_s + max(job.call.arrived, job.call.deadline or 0.0)
