"""A device in a few lines, for the tests of swap policies: it breaks where a policy breaks a rule.

Durations come from the test, which also may let loads fail, servers die and callers leave.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    DevicePolicy,
    Event,
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
    Wake,
)
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.state import PolicySettings

Duration = Callable[[str, str], float]
"""Of ("run" | "load" | "unload", model), in seconds."""


@dataclass
class Device:
    """`log` has (time, event, actions). Ends of calls: `granted` at which time, `refused` why,
    `left`. `cut` calls come back as the service's do: a new call with the old deadline."""

    policy: DevicePolicy
    models: dict[str, Model]
    memory_gb: float
    lasts: Duration
    fails: Callable[[str], bool] = lambda model: False
    come_back: bool = True
    now: float = 0.0
    state: dict[str, str] = field(default_factory=dict)
    waiting: dict[int, Waiting] = field(default_factory=dict)
    running: dict[str, dict[int, Waiting]] = field(default_factory=dict)
    granted: dict[int, float] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    cut: set[int] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)
    log: list[tuple[float, Event, list[Action]]] = field(default_factory=list)
    future: list[tuple[float, int, Event]] = field(default_factory=list)
    alarm: float | None = None
    number: int = 0
    idle_ticks: int = 0

    def start(self, resident: Iterable[str] = ()) -> Device:
        """With what is not movable, and `resident`, loaded."""
        self.state = {m.id: "loaded" for m in self.models.values() if not m.movable}
        self.state.update(dict.fromkeys(resident, "loaded"))
        self.send(Configured(tuple(self.models.values()), self.memory_gb))
        return self

    def at(self, time: float, event: Event) -> None:
        self.number += 1
        heapq.heappush(self.future, (time, self.number, event))

    def run(self, until: float = float("inf"), most: int = 50_000) -> Device:
        for _ in range(most):
            time = self.future[0][0] if self.future else float("inf")
            if self.alarm is not None and self.alarm < time:
                if self.alarm > until:
                    break
                self.now, self.alarm = max(self.now, self.alarm), None
                self.idle_ticks += 1
                assert self.idle_ticks < 1000, "woken for ever while nothing happens"
                self.send(Ticked())
                continue
            if time > until or time == float("inf"):
                break
            self.now, _, event = heapq.heappop(self.future)
            self.idle_ticks = 0
            self.happens(event)
        else:
            raise AssertionError("it never ends")
        self.now = max(self.now, until) if until < float("inf") else self.now
        return self

    def happens(self, event: Event) -> None:
        match event:
            case Arrived(call):
                self.waiting[call.id] = call
            case Left(call):
                if call not in self.waiting:
                    return
                del self.waiting[call]
                self.left.add(call)
            case Finished(number):
                home = next((m for m, calls in self.running.items() if number in calls), None)
                if home is None:
                    return
                del self.running[home][number]
            case Loaded(model):
                if self.fails(model):
                    event = LoadFailed(model)
                    del self.state[model]
                else:
                    self.state[model] = "loaded"
            case Unloaded(model):
                del self.state[model]
            case Lost(model):
                if self.state.get(model) != "loaded":
                    return
                self.state[model] = "lost"
        self.send(event)
        if isinstance(event, Lost):
            self.end_calls(event.model)

    def end_calls(self, model: str) -> None:
        for number, call in sorted(self.running.get(model, {}).items()):
            self.cut.add(number)
            self.at(self.now, Finished(number))
            if self.come_back:
                self.at(self.now, Arrived(_again(call)))

    def send(self, event: Event) -> None:
        if isinstance(event, Configured):
            self.models.update({m.id: m for m in event.models})
            self.memory_gb = event.memory_gb
            loaded = tuple(m.id for m in event.models if self.state.get(m.id) == "loaded")
            event = replace(event, resident=loaded)
        actions = self.policy.on(event, self.now)
        self.log.append((self.now, event, actions))
        for action in actions:
            match action:
                case Grant(number):
                    self.grant(number)
                case Refuse(number, reason, retry_after):
                    assert retry_after > 0
                    call = self.waiting.pop(number)
                    if reason == "late" and call.deadline is not None:
                        came = isinstance(event, Arrived) and event.call.id == number
                        assert self.now <= call.deadline or came, f"{call} waited too long"
                    self.refused[number] = reason
                case Load(model):
                    assert self.state.get(model) in (None, "lost"), f"loads {model} twice"
                    self.state[model] = "loading"
                    self.loads.append(model)
                    self.check_memory()
                    self.at(self.now + self.lasts("load", model), Loaded(model))
                case Unload(model):
                    assert self.state.get(model) in ("loaded", "lost"), f"unloads {model}"
                    assert self.models[model].movable
                    self.state[model] = "unloading"
                    self.end_calls(model)
                    self.at(self.now + self.lasts("unload", model), Unloaded(model))
                case Wake(at):
                    assert at >= self.now, "asks to be woken in the past"
                    assert at > self.now or not isinstance(event, Ticked), "is never content"
                    self.alarm = at

    def grant(self, number: int) -> None:
        call = self.waiting.pop(number)
        assert self.state.get(call.model) == "loaded", f"{call} is granted on nothing"
        assert call.deadline is None or self.now <= call.deadline, f"{call} is granted late"
        model, running = self.models[call.model], self.running.setdefault(call.model, {})
        running[number] = call
        assert len(running) <= model.in_flight
        if model.adapters is not None:
            distinct = {other.adapter for other in running.values()} - {None}
            assert len(distinct) <= model.adapters
        self.granted[number] = self.now
        self.at(self.now + self.lasts("run", call.model), Finished(number))

    def check_memory(self) -> None:
        taken = sum(m.memory_gb for m in self.models.values() if m.movable and m.id in self.state)
        assert taken <= self.memory_gb + 1e-6, f"{taken} of {self.memory_gb} GB"

    def check_all_ended(self, calls: Iterable[Waiting]) -> None:
        """Every call ended in exactly one way, and nobody waits."""
        assert not self.waiting
        for call in calls:
            ends = (call.id in self.granted) + (call.id in self.refused) + (call.id in self.left)
            assert ends == 1, call
        assert not any(self.running.values())


def _again(call: Waiting) -> Waiting:
    return Waiting(
        call.id + 1_000_000,
        call.model,
        call.arrived,
        call.adapter,
        call.deadline,
        call.batch,
        call.later,
    )


# --- what the tests of policies say in a word -------------------------------------------

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


def job(number: int, name: str, arrived: float = 0.0, **more: object) -> Waiting:
    return call(number, name, arrived, wait=None, batch=True, **more)
