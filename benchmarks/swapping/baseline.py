"""What the rules of `baselines.py` have in common: one device's books, and how a swap is carried
out. Knows no rule."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from math import inf

from composer.scheduling.events import (
    Action,
    Arrived,
    Configured,
    Event,
    Finished,
    Grant,
    Left,
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

EPSILON = 1e-9


class Baseline:
    """State and mechanics; a rule is `decide`, called after every event."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.memory_gb = 0.0
        self.queues: dict[str, deque[Waiting]] = {}
        self.calls: dict[int, Waiting] = {}  # waiting, in order of arrival
        self.waits: dict[str, int] = {}  # models with waiting calls, and how many
        self.place: dict[int, int] = {}  # of a waiting call: how many arrived before it
        self.arrivals = 0
        self.deadlines: list[tuple[float, int]] = []
        self.running: dict[str, int] = {}
        self.where: dict[int, str] = {}
        self.loaded: dict[str, float] = {}  # since when
        self.taking: dict[str, float] = {}  # memory of all that is loaded, loading or unloading
        self.leaving: set[str] = set()  # no new leases; unloaded when idle
        self.coming: list[str] = []  # to be loaded, in this order, when there is room
        self.used: dict[str, float] = {}  # last grant
        self.changed = True  # which models wait for what since when, or which are loaded
        self.alarm = inf
        self.actions: list[Action] = []
        self.now = 0.0

    def on(self, event: Event, now: float) -> list[Action]:
        self.now, self.actions, alarm = now, [], self.alarm
        match event:
            case Arrived(call):
                self.calls[call.id] = call
                self.place[call.id] = self.arrivals
                self.arrivals += 1
                self.queues[call.model].append(call)
                self.waits[call.model] = self.waits.get(call.model, 0) + 1
                self.changed |= self.waits[call.model] == 1
                if call.deadline is not None:
                    heapq.heappush(self.deadlines, (call.deadline, call.id))
            case Finished(number):
                self.running[self.where.pop(number)] -= 1
            case Loaded(name):
                self.changed = True
                self.loaded[name] = now
                self.on_loaded(name)
            case Unloaded(name):
                self.changed = True
                del self.taking[name]
            case Configured(models, memory_gb, resident):
                self._configure(models, memory_gb, resident)
            case Left(number):
                self._forget(number)
            case Ticked():
                alarm = inf
            case _:
                raise ValueError(f"{event} does not happen to a baseline")
        self.alarm = inf
        self._move()
        self.decide()
        self._move()
        while self.deadlines and (
            self.deadlines[0][0] <= now or self.deadlines[0][1] not in self.calls
        ):
            number = heapq.heappop(self.deadlines)[1]
            if number in self.calls:
                self._forget(number)
                self.actions.append(Refuse(number, "late", 1.0))
        if self.deadlines:
            self.alarm = min(self.alarm, self.deadlines[0][0])
        if self.alarm not in (inf, alarm):
            self.actions.append(Wake(self.alarm))
        return self.actions

    # --- what a rule says -----------------------------------------------------------

    def decide(self) -> None:
        raise NotImplementedError

    def on_loaded(self, model: str) -> None:
        """A rule may note it."""

    # --- what a rule may use --------------------------------------------------------

    def serves(self, model: str) -> bool:
        return model in self.loaded and model not in self.leaving

    def oldest(self) -> Waiting | None:
        return next(iter(self.calls.values()), None)

    def front(self, model: str) -> Waiting | None:
        """The call that has waited longest for this model."""
        if model not in self.waits:
            return None
        queue = self.queues[model]
        while queue[0].id not in self.calls:
            queue.popleft()
        return queue[0]

    def grant_all(self, model: str, before: float = inf, window: int | None = None) -> None:
        """Leases for its waiting calls, as many as it may run; only calls with fewer than
        `before` arrivals before them."""
        most = self.models[model].in_flight if window is None else window
        while (
            self.running[model] < most
            and (call := self.front(model)) is not None
            and self.place[call.id] < before
        ):
            self._forget(call.id)
            self.running[model] += 1
            self.where[call.id] = model
            self.used[model] = self.now
            self.actions.append(Grant(call.id))

    def victims(self, target: str, candidates: Iterable[str]) -> list[str] | None:
        """The first candidates that make room, without those not needed; None: not enough."""
        free = self.free() - self.models[target].memory_gb
        chosen: list[str] = []
        for model in candidates:
            if free >= 0:
                break
            chosen.append(model)
            free += self.taking[model]
        if free < 0:
            return None
        for model in chosen[-2::-1]:  # the last one was needed
            if free >= self.taking[model]:
                chosen.remove(model)
                free -= self.taking[model]
        return chosen

    def free(self) -> float:
        """Memory in GB that is not taken when what leaves has left and what comes has come."""
        taken = sum(self.taking[m] for m in self.taking if m not in self.leaving)
        return self.memory_gb + EPSILON - taken - sum(self.models[m].memory_gb for m in self.coming)

    def swap(self, target: str, victims: Iterable[str]) -> None:
        self.changed = True
        self.leaving.update(victims)
        self.coming.append(target)
        self._move()

    def wake(self, at: float) -> None:
        self.alarm = min(self.alarm, max(at, self.now))

    # --- mechanics ------------------------------------------------------------------

    def _move(self) -> None:
        for model in [m for m in self.leaving if m in self.loaded and self.running[m] == 0]:
            del self.loaded[model]
            self.actions.append(Unload(model))
        self.leaving = {m for m in self.leaving if m in self.taking}
        while self.coming:
            size = self.models[self.coming[0]].memory_gb
            if self.coming[0] in self.taking:  # called back while on its way out
                break
            if sum(self.taking.values()) + size > self.memory_gb + EPSILON:
                break
            model = self.coming.pop(0)
            self.taking[model] = size
            self.actions.append(Load(model))

    def _forget(self, number: int) -> None:
        call = self.calls.pop(number, None)
        if call is None:
            return
        del self.place[number]
        self.changed |= call.model not in self.loaded
        self.waits[call.model] -= 1
        if not self.waits[call.model]:
            del self.waits[call.model]

    def _configure(
        self, models: tuple[Model, ...], memory_gb: float, resident: tuple[str, ...]
    ) -> None:
        if self.models:
            raise ValueError("a baseline is configured once")
        self.models = {model.id: model for model in models}
        self.memory_gb = memory_gb
        self.queues = {model.id: deque() for model in models}
        self.running = dict.fromkeys(self.models, 0)
        for name in resident:
            self.loaded[name] = self.now
            self.taking[name] = self.models[name].memory_gb
            self.on_loaded(name)
