"""Discrete-event simulation of one device under any policy. Knows no policy and no workload.

The policy gets the events of `composer.scheduling.events` at exact times and its actions are
carried out at once; whatever breaks the device's rules raises `Violation`. The model of the
device:

- A loaded model runs up to `in_flight` calls, each as long as was drawn for it beforehand,
  whatever else runs (continuous batching within the window costs nothing; beyond it calls wait).
- A model takes its memory from the beginning of its load to the end of its unload.
- Loads and unloads may overlap each other and running calls; each lasts its `load_s` or
  `unload_s`, times the noise drawn beforehand for the model's n-th one, so that all policies meet
  the same.
- Unloading cuts the calls that still run there.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    DevicePolicy,
    Event,
    Finished,
    Grant,
    Load,
    Loaded,
    Model,
    Refuse,
    Ticked,
    Unload,
    Unloaded,
    Waiting,
    Wake,
)

MEMORY_SLACK_GB = 1e-6
IDLE_TICKS = 10_000
"""A policy that wakes this often while nothing happens would never let the simulation end."""


class Violation(Exception):
    """The policy asked for what the device cannot do, or left callers waiting for ever."""


@dataclass(frozen=True, slots=True)
class Job:
    """A call, and how long it will run once granted, in seconds."""

    call: Waiting
    run_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """All that a policy is confronted with. `jobs` are in order of arrival. `resident` are the
    models loaded at the start. `noise` holds factors on a model's n-th load and unload (taken
    in a circle); a model without an entry has none."""

    name: str
    models: tuple[Model, ...]
    memory_gb: float
    jobs: tuple[Job, ...]
    max_wait_s: float | None = None
    resident: tuple[str, ...] = ()
    noise: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Move:
    """One load or unload, from `began` to `ended`, in seconds."""

    model: str
    kind: Literal["load", "unload"]
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run; all times in seconds.

    `swap_s` sums all loads and unloads begun, `swaps` counts the loads. A miss is a call refused
    (`refused`, by reason), granted after its deadline (`late`), or cut while running (`cut`).
    `waits` are the calls' waits in order of arrival, a refused one's being its bound (or, without
    one, the time until it was refused), so that refusing never looks like speed. `log` is
    empty unless asked for.
    """

    swap_s: float
    swaps: int
    calls: int
    misses: int
    refused: Mapping[str, int]
    late: int
    cut: int
    waits: np.ndarray
    ended: float
    timeline: tuple[Move, ...]
    log: tuple[tuple[float, Event, tuple[Action, ...]], ...] = ()

    def wait(self, percentile: float) -> float:
        """Percentile of the waits in seconds, 0 where there were no calls."""
        return float(np.percentile(self.waits, percentile)) if len(self.waits) else 0.0

    @property
    def p50(self) -> float:
        return self.wait(50)

    @property
    def p95(self) -> float:
        return self.wait(95)

    @property
    def p99(self) -> float:
        return self.wait(99)

    @property
    def miss_share(self) -> float:
        return self.misses / self.calls if self.calls else 0.0


Decide = Callable[[Job, Callable[[str], bool]], Job]
"""Asked as a call arrives, with who is resident then; returns the call to the model that it is
given to, with how long it runs there."""


def simulate(
    policy: DevicePolicy, workload: Workload, *, log: bool = False, decide: Decide | None = None
) -> Result:
    """Runs the policy over the workload until nothing can happen any more. Raises Violation."""
    return _Device(policy, workload, log, decide).run()


# Order of what happens at one moment: room is made before it is asked for.
_FINISHED, _MOVED, _ARRIVED, _TICKED = range(4)


class _Device:
    def __init__(
        self, policy: DevicePolicy, workload: Workload, log: bool, decide: Decide | None = None
    ) -> None:
        self.policy = policy
        self.decide = decide
        self.workload = workload
        self.models = {model.id: model for model in workload.models}
        self.state: dict[str, Literal["loading", "loaded", "unloading"]] = {}
        self.waiting: dict[int, Job] = {}
        self.running: dict[str, dict[int, Job]] = {model.id: {} for model in workload.models}
        self.where: dict[int, str] = {}  # of the running calls
        self.future: list[tuple[float, int, int, Event]] = []
        self.sequence = 0
        self.alarm: float | None = None
        self.ticks = 0  # since anything else happened
        self.loads: Counter[str] = Counter()
        self.unloads: Counter[str] = Counter()
        self.waits: dict[int, float] = {}
        self.refused: Counter[str] = Counter()
        self.late = self.cut = 0
        self.timeline: list[Move] = []
        self.log: list[tuple[float, Event, tuple[Action, ...]]] | None = [] if log else None
        for name in workload.resident:
            self.state[name] = "loaded"
        for model in workload.models:
            if not model.movable:
                self.state[model.id] = "loaded"
        self._check_memory("the models resident at the start")

    def run(self) -> Result:
        workload = self.workload
        first = workload.jobs[0].call.arrived if workload.jobs else 0.0
        now = min(first, 0.0)
        self._send(Configured(workload.models, workload.memory_gb, workload.resident), now)
        jobs = workload.jobs
        next_job = 0
        future = self.future
        while True:
            # The earliest of: something that ends, an arrival, the alarm; in this order.
            at, rank = float("inf"), _TICKED + 1
            if future:
                at, rank = future[0][0], future[0][1]
            if next_job < len(jobs):
                arrived = jobs[next_job].call.arrived
                if (arrived, _ARRIVED) < (at, rank):
                    at, rank = arrived, _ARRIVED
            if self.alarm is not None and (self.alarm, _TICKED) < (at, rank):
                at, rank = self.alarm, _TICKED
            if rank > _TICKED or (rank == _TICKED and not self._anything_left(next_job)):
                break
            now = max(now, at)
            self.ticks = self.ticks + 1 if rank == _TICKED else 0
            if rank == _ARRIVED:
                job = jobs[next_job]
                next_job += 1
                if self.decide is not None:
                    job = self.decide(job, lambda model: self.state.get(model) == "loaded")
                if job.call.id in self.waiting or job.call.id in self.waits:
                    raise ValueError(f"call {job.call.id} arrives twice")
                self.waiting[job.call.id] = job
                self._send(Arrived(job.call), now)
            elif rank == _TICKED:
                self.alarm = None
                if self.ticks > IDLE_TICKS:
                    raise Violation(f"{now:.3f} s: {self.ticks} wake-ups while nothing happens")
                self._send(Ticked(), now)
            else:
                event = heapq.heappop(future)[3]
                if isinstance(event, Finished):
                    model = self.where.pop(event.call, None)
                    if model is None:  # it was cut before
                        continue
                    del self.running[model][event.call]
                elif isinstance(event, Loaded):
                    self.state[event.model] = "loaded"
                else:
                    assert isinstance(event, Unloaded)
                    del self.state[event.model]
                self._send(event, now)
        if self.waiting:
            raise Violation(f"{len(self.waiting)} calls wait for ever: {list(self.waiting)[:5]}")
        return Result(
            swap_s=sum(move.ended - move.began for move in self.timeline),
            swaps=sum(self.loads.values()),
            calls=len(jobs),
            misses=sum(self.refused.values()) + self.late + self.cut,
            refused=dict(self.refused),
            late=self.late,
            cut=self.cut,
            waits=np.array([self.waits[job.call.id] for job in jobs]),
            ended=now,
            timeline=tuple(self.timeline),
            log=tuple(self.log or ()),
        )

    def _anything_left(self, next_job: int) -> bool:
        return bool(self.waiting or self.future or next_job < len(self.workload.jobs))

    def _send(self, event: Event, now: float) -> None:
        actions = self.policy.on(event, now)
        if self.log is not None:
            self.log.append((now, event, tuple(actions)))
        for action in actions:
            match action:
                case Grant(call):
                    self._grant(call, now)
                case Refuse(call, reason):
                    self._refuse(call, reason, now)
                case Load(model):
                    self._load(model, now)
                case Unload(model):
                    self._unload(model, now)
                case Wake(at):
                    self.alarm = max(at, now)

    def _later(self, at: float, rank: int, event: Event) -> None:
        self.sequence += 1
        heapq.heappush(self.future, (at, rank, self.sequence, event))

    def _grant(self, number: int, now: float) -> None:
        job = self.waiting.pop(number, None)
        if job is None:
            raise Violation(f"{now:.3f} s: call {number} is granted but does not wait")
        call = job.call
        if self.state.get(call.model) != "loaded":
            state = self.state.get(call.model, "not loaded")
            raise Violation(f"{now:.3f} s: call {number} is granted, {call.model} is {state}")
        running, model = self.running[call.model], self.models[call.model]
        if len(running) >= model.in_flight:
            raise Violation(f"{now:.3f} s: more than {model.in_flight} calls on {call.model}")
        running[number] = job
        if model.adapters is not None:
            distinct = {other.call.adapter for other in running.values()} - {None}
            if len(distinct) > model.adapters:
                raise Violation(f"{now:.3f} s: {len(distinct)} adapters on {call.model}")
        self.where[number] = call.model
        self.waits[number] = now - call.arrived
        if call.deadline is not None and now > call.deadline + 1e-9:
            self.late += 1
        self._later(now + job.run_s, _FINISHED, Finished(number))

    def _refuse(self, number: int, reason: str, now: float) -> None:
        job = self.waiting.pop(number, None)
        if job is None:
            raise Violation(f"{now:.3f} s: call {number} is refused but does not wait")
        bound = now if job.call.deadline is None else max(job.call.deadline, now)
        self.waits[number] = bound - job.call.arrived
        self.refused[reason] += 1

    def _movable(self, name: str) -> bool:
        return self.models[name].movable

    def _load(self, name: str, now: float) -> None:
        if not self._movable(name) or name in self.state:
            raise Violation(f"{now:.3f} s: load of {name}, which is {self.state.get(name)}")
        self.state[name] = "loading"
        self._check_memory(f"{now:.3f} s: load of {name}")
        ended = now + self.models[name].load_s * self._noise(name, self.loads[name], 0)
        self.loads[name] += 1
        self.timeline.append(Move(name, "load", now, ended))
        self._later(ended, _MOVED, Loaded(name))

    def _unload(self, name: str, now: float) -> None:
        if not self._movable(name) or self.state.get(name) != "loaded":
            raise Violation(f"{now:.3f} s: unload of {name}, which is {self.state.get(name)}")
        self.state[name] = "unloading"
        for number in self.running[name]:  # their callers see it at once, but after these actions
            self.cut += 1
            self._later(now, _FINISHED, Finished(number))
        ended = now + self.models[name].unload_s * self._noise(name, self.unloads[name], 1)
        self.unloads[name] += 1
        self.timeline.append(Move(name, "unload", now, ended))
        self._later(ended, _MOVED, Unloaded(name))

    def _noise(self, name: str, n: int, half: int) -> float:
        factors = self.workload.noise.get(name)
        return factors[(2 * n + half) % len(factors)] if factors else 1.0

    def _check_memory(self, what: str) -> None:
        taken = sum(self.models[name].memory_gb for name in self.state if self._movable(name))
        if taken > self.workload.memory_gb + MEMORY_SLACK_GB:
            raise Violation(f"{what} takes {taken:.2f} of {self.workload.memory_gb:.2f} GB")
