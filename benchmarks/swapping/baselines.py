"""The rules that others use, as policies of one device: four of them; their bookkeeping is
`baseline.py`.

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

from collections import deque

from benchmarks.swapping.baseline import Baseline
from composer.scheduling.events import Waiting


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
