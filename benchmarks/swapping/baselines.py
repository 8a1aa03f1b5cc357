"""The rules that others use, as policies of one device: the bookkeeping, and four of them.

Knows nothing of arrivals or costs to come. Written from the rules as documented or published, for
whole models in place of what they were made for; where that needs a choice, the kinder one is
taken and named. All of them

- refuse a call when its deadline comes and not before, and never cut a running call;
- evict, where memory is short, in their own order of preference until the new one fits, sparing
  those that turn out not to be needed;
- stop giving leases to a model from the moment in which its eviction is decided.

| policy | its knob |
|---|---|
| `ArrivalOrder` | calls that may run at once on a model |
| `LeastRecentlyUsed` | arrivals behind the oldest waiting call that are looked over |
| `ActiveSet` (LoRAX) | maximal active time, seconds |
| `MergedWaits` (llama-swap) | time for which a busy model may hold its place, seconds |
"""

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


class ArrivalOrder(Baseline):
    """Strictly in order of arrival: where the oldest waiting call needs another model, the one
    loaded longest ago makes room for it. `window` bounds the calls at once on a model."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def decide(self) -> None:
        while (call := self.oldest()) is not None:
            model = call.model
            if not self.serves(model):
                if model not in self.taking and model not in self.coming:
                    found = self.victims(model, self._candidates())
                    if found is not None:
                        self.swap(model, found)
                return
            if self.running[model] >= min(self.window, self.models[model].in_flight):
                return
            self.grant_all(model, self.place[call.id] + 1, self.models[model].in_flight)

    def _candidates(self) -> list[str]:
        return sorted((m for m in self.loaded if self.serves(m)), key=self.loaded.__getitem__)


class LeastRecentlyUsed(Baseline):
    """Arrival order, but the `lookahead` arrivals behind the oldest waiting call are looked over
    for calls of loaded models, which go first. The oldest call's model then takes the place of
    the least recently used one that has no call among them."""

    def __init__(self, lookahead: int) -> None:
        super().__init__()
        self.lookahead = lookahead

    def decide(self) -> None:
        while (call := self.oldest()) is not None:
            before = self.place[call.id] + 1 + self.lookahead
            for model in self.loaded:
                if self.serves(model):
                    self.grant_all(model, before)
            if self.oldest() is call:
                break
        else:
            return
        if call.model in self.taking or call.model in self.coming:
            return
        idle = []
        for model in self.loaded:
            front = self.front(model)
            if self.serves(model) and (front is None or self.place[front.id] >= before):
                idle.append(model)
        idle.sort(key=lambda m: self.used.get(m, self.loaded[m]))
        found = self.victims(call.model, idle)
        if found is not None:
            self.swap(call.model, found)


class ActiveSet(Baseline):
    """LoRAX's adapter scheduling (`router/src/queue.rs`, `AdapterQueuesState`), for models.

    A queue per model; models with waiting calls are active or pending. Pending ones become active
    in their order while memory allows. An active one without calls leaves only when a pending one
    needs its place; the one active longest leaves when it has been active for `max_active_s` and
    another one pends, and goes to the back of the pending. LoRAX lets it leave when none of its
    calls runs, which under load may be never; here it gets no more leases meanwhile.
    """

    def __init__(self, max_active_s: float) -> None:
        super().__init__()
        self.max_active_s = max_active_s
        self.pending: deque[str] = deque()
        self.active: deque[str] = deque()

    def on_loaded(self, model: str) -> None:
        if model not in self.active:
            self.active.append(model)

    def decide(self) -> None:
        for model in list(self.loaded):
            if self.serves(model):
                self.grant_all(model)
        known = {*self.active, *self.pending}
        self.pending.extend(model for model in self.waits if model not in known)
        if not self.waits.keys() >= set(self.pending):
            self.pending = deque(model for model in self.pending if model in self.waits)
        while self.pending and (found := self.victims(self.pending[0], self._idle())) is not None:
            self._exchange(found)
        if not self.pending or not self.active:
            return
        eldest = self.active[0]
        if not self.serves(eldest) or any(model in self.leaving for model in self.taking):
            return  # it is still loading, or one is on its way out
        due = self.loaded[eldest] + self.max_active_s
        if self.now < due:
            self.wake(due)
            return
        self.active.popleft()
        self.leaving.add(eldest)
        if self.front(eldest):
            self.pending.append(eldest)
        while self.pending and (found := self.victims(self.pending[0], ())) is not None:
            self._exchange(found)

    def _idle(self) -> list[str]:
        return [
            m for m in self.active if self.serves(m) and not self.running[m] and not self.front(m)
        ]

    def _exchange(self, victims: list[str]) -> None:
        target = self.pending.popleft()
        for model in victims:
            self.active.remove(model)
        self.active.append(target)
        self.swap(target, victims)


class MergedWaits(Baseline):
    """llama-swap's scheduling (`internal/router`, its `FIFO` scheduler and matrix swapper).

    A call of a loaded model runs at once. Another one waits; when what would have to leave is
    idle, the swap for the call that has waited longest begins, and all waiting calls of that
    model share it. What leaves is the cheapest to bring back (as its matrix solver weighs the
    evicted). `hold_s` infinite is that rule: busy models stay for as long as they are busy. With
    `hold_s` a busy model gets no more leases once a call that needs its place has waited so
    long; 0 is its older rule, which swaps for the first call of another model. Calls beyond a
    model's window wait here, where llama-swap answers 429.
    """

    def __init__(self, hold_s: float) -> None:
        super().__init__()
        self.hold_s = hold_s
        self.fronts: list[tuple[int, str, Waiting]] = []  # longest waits, of models not loaded

    def decide(self) -> None:
        for model in list(self.loaded):
            if self.serves(model):
                self.grant_all(model)
        if self.changed:
            self.fronts = sorted(
                (self.place[call.id], model, call)
                for model in self.waits
                if model not in self.taking
                and model not in self.coming
                and (call := self.front(model)) is not None
            )
            self.changed = False
        if not self.fronts:
            return
        staying = self._staying()
        room, idle = self.free(), any(map(self._idle, staying))
        for _, model, call in self.fronts:
            due = call.arrived + self.hold_s
            if self.now < due:
                self.wake(due)
                if not idle and room < self.models[model].memory_gb:
                    continue
            found = self.victims(model, staying)
            if found is not None and (self.now >= due or all(map(self._idle, found))):
                self.swap(model, found)
                staying = self._staying()
                room, idle = self.free(), any(map(self._idle, staying))

    def _staying(self) -> list[str]:
        """Loaded models, the cheapest to bring back first."""
        models = self.models
        return sorted(
            (m for m in self.loaded if self.serves(m)),
            key=lambda m: (models[m].load_s + models[m].unload_s, m),
        )

    def _idle(self, model: str) -> bool:
        return self.running[model] == 0 and self.front(model) is None
