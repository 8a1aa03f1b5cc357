"""One device's books: which models are where, who waits and runs, and what has been decided.

Keeps the rules that any policy has to keep (memory, slots, adapters, each call ending once) and
says what is to be done; decides nothing about who goes first or what is loaded.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter

from composer.scheduling.events import (
    RETRY_AFTER_S,
    Action,
    Configured,
    Grant,
    Load,
    Refuse,
    Unload,
    Waiting,
)
from composer.scheduling.plan import ROUNDING_GB
from composer.scheduling.queues import Entry
from composer.scheduling.state import ModelState, Phase, PolicySettings

LEAVING = (Phase.CLOSING, Phase.DRAINING, Phase.UNLOADING)
SERVING = (Phase.RESIDENT, Phase.CLOSING, Phase.DRAINING)


class Fleet:
    """All dicts are in the order in which their entries came, so that equal events give equal
    decisions. `there` are the models that hold memory or are not movable and run; `asked` those
    that interactive calls wait for, `batched` those that batch calls wait for. `claims` are loads
    decided on, first to last: memory is handed out in that order. `failed` are models to be loaded
    (again) when their time has come; `wished` those whose callers were refused because the load
    takes longer than they may wait. `chains` counts batch calls, waiting or running, by the models
    that they and what is to follow them still need. `changed` is set when something
    happened that plans have to take into account."""

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings
        self.memory_gb = 0.0
        self.models: dict[str, ModelState] = {}
        self.there: dict[str, ModelState] = {}
        self.asked: dict[str, ModelState] = {}
        self.batched: dict[str, ModelState] = {}
        self.waiting: dict[int, tuple[ModelState, Entry | None]] = {}
        self.running: dict[int, ModelState] = {}
        self.claims: list[ModelState] = []
        self.failed: dict[str, ModelState] = {}
        self.wished: dict[str, ModelState] = {}
        self.chains: Counter[tuple[str, ...]] = Counter()
        self.actions: list[Action] = []
        self.changed = False
        self._deadlines: list[tuple[float, int]] = []

    # --- models ----------------------------------------------------------------------

    def configure(self, event: Configured, now: float) -> None:
        """Raises ValueError, before anything is changed, for models that can't be."""
        known = {model.id for model in event.models}
        if len(known) != len(event.models):
            raise ValueError("two models have the same id; give each its own")
        for model in event.models:
            if model.movable and model.memory_gb > event.memory_gb:
                raise ValueError(
                    f"model {model.id!r} needs {model.memory_gb} GB and the device has "
                    f"{event.memory_gb}; give it a larger device or a smaller memory_gb"
                )
        self.memory_gb = event.memory_gb
        for claimed in list(self.claims):  # decided on for another memory
            self.unclaim(claimed)
        for model in event.models:
            state = self.models.get(model.id)
            if state is None:
                state = self.models[model.id] = ModelState.of(model, self.settings, now)
                if model.id in event.resident:
                    self._enter(state, Phase.RESIDENT)
            else:
                state.reconfigure(model)
                if state.phase in (Phase.CLOSING, Phase.DRAINING) and (
                    state.gone or not model.movable
                ):
                    state.phase = Phase.RESIDENT
                state.gone = False
            if state.phase is Phase.OFF and not model.movable:
                self.failed[state.id] = state  # to be loaded at once
        for state in [s for s in self.models.values() if s.id not in known]:
            state.gone = True
            for call in [*(e.call for e in state.queue.order), *state.queue.batch]:
                self.refuse(call.id, "gone", RETRY_AFTER_S[0])
            if state.phase in (Phase.RESIDENT, Phase.CLOSING):
                state.phase, state.drain_by = Phase.DRAINING, math.inf
        self.make_fit(now)

    def known(self, name: str, phase: Phase) -> ModelState:
        """Raises ValueError where it is elsewhere."""
        state = self.models.get(name)
        if state is None or state.phase is not phase:
            where = "not configured" if state is None else state.phase.value
            raise ValueError(f"model {name!r} is {where}, not {phase.value}")
        return state

    def loaded(self, name: str, now: float) -> None:
        state = self.known(name, Phase.LOADING)
        if self.settings.learn:
            state.load.observe(now - state.moved)
        state.failures, state.lost = 0, False
        self.failed.pop(name, None)
        self.wished.pop(name, None)
        self._enter(state, Phase.RESIDENT)
        if state.gone:
            state.phase, state.drain_by = Phase.DRAINING, math.inf
        self.make_fit(now)

    def load_failed(self, name: str, now: float) -> None:
        state = self.known(name, Phase.LOADING)
        wait = min(self.settings.retry_s * 2**state.failures, self.settings.retry_most_s)
        state.failures += 1
        state.retry_at = now + wait
        self.failed[name] = state
        self._off(state)

    def unloaded(self, name: str, now: float) -> None:
        state = self.known(name, Phase.UNLOADING)
        if self.settings.learn and not state.lost:
            state.unload.observe(now - state.moved)
        state.lost = False
        self._off(state)

    def lost(self, name: str, now: float) -> None:
        state = self.models.get(name)
        if state is None:
            raise ValueError(f"model {name!r} is not configured")
        # In any other phase the news is old: it is being brought back, or on its way out.
        if state.phase is Phase.RESIDENT:
            state.lost = self.changed = True
            self.load(state, now)
        elif state.phase is Phase.CLOSING:
            state.lost = self.changed = True
            self._drain(state, now)

    def close(self, state: ModelState, leave_by: float) -> None:
        """It is to leave, for somebody who would be late if it left after `leave_by`."""
        state.phase, state.leave_by = Phase.CLOSING, leave_by
        self.changed = True

    def claim(self, state: ModelState) -> None:
        """It is to be loaded, after all that are claimed already."""
        state.claimed = self.changed = True
        self.claims.append(state)

    def unclaim(self, state: ModelState) -> None:
        state.claimed, self.changed = False, True
        self.claims.remove(state)

    def drop_claims(self) -> None:
        """A load that nobody waits for any more is not begun."""
        for state in list(self.claims):
            if not state.queue.order and not state.queue.batch and state.id not in self.wished:
                self.unclaim(state)

    def reopen(self, now: float) -> bool:
        """Who was to leave for a load that is not to be begun any more stays; so does who was only
        to come back. Returns whether anybody does.

        Those gone soonest are left to leave until the claims have their memory, so that no claim
        gets it later than planned.
        """
        leaving = [s for s in self.there.values() if s.phase in LEAVING]
        leaving.sort(key=lambda s: s.gone_at(now))
        back = [s for s in self.claims if s in leaving]
        while True:
            staying = self._needless(leaving, [s for s in self.claims if s not in back])
            if all([s in staying for s in back]):
                break
            back = [s for s in back if s in staying]
        for state in staying:
            if state.claimed:
                self.unclaim(state)
            if state.phase is Phase.DRAINING:
                # Its calls were put off to its next visit, and others' plans count on that.
                state.queue.cut(0)
            self._enter(state, Phase.RESIDENT)
            state.leave_by = state.drain_by = math.inf
        return bool(staying)

    def _needless(self, leaving: list[ModelState], claims: list[ModelState]) -> list[ModelState]:
        """Of those that leave, first to last, who may stay when only these loads are to be."""
        needed = sum([s.memory_gb for s in claims]) - self.free_gb()
        staying = []
        for state in leaving:
            if needed > ROUNDING_GB:
                needed -= state.memory_gb
            elif state.phase is not Phase.UNLOADING and not state.gone and not state.lost:
                staying.append(state)
        return staying

    @property
    def leaving(self) -> bool:
        """Whether an event may let somebody leave, or make that needless."""
        return any([s.phase in (Phase.CLOSING, Phase.DRAINING) for s in self.there.values()])

    def free_gb(self) -> float:
        return self.memory_gb - sum([s.memory_gb for s in self.there.values()])

    def make_fit(self, now: float) -> None:
        """Lets models leave while there are more than fit: the memory, or a model, has changed."""
        self.changed = True
        staying = [s for s in self.there.values() if s.phase in (Phase.RESIDENT, Phase.LOADING)]
        over = sum([s.memory_gb for s in staying]) - self.memory_gb
        if over > ROUNDING_GB:
            for state in sorted(staying, key=lambda s: s.regret(now)):
                if over > ROUNDING_GB and state.phase is Phase.RESIDENT and state.model.movable:
                    over -= state.memory_gb
                    self.close(state, now)

    def move(self, now: float) -> None:
        """Begins the unloads and loads whose time has come."""
        for state in list(self.there.values()):
            if state.phase is Phase.CLOSING and not state.queue.now_on:
                self._drain(state, now)
            if state.phase is Phase.DRAINING and (not state.running or now >= state.drain_by):
                if state.model.movable:
                    state.phase, state.moved = Phase.UNLOADING, now
                    self.actions.append(Unload(state.id))
                elif not state.running:
                    self._off(state)
        for state in list(self.failed.values()):
            if state.model.movable:
                if state.retry_at <= now:
                    del self.failed[state.id]
                    self.changed = True
            elif state.phase is Phase.OFF and not state.gone and state.retry_at <= now:
                self.load(state, now)
        while self.claims:
            state = self.claims[0]
            if (
                state.phase is not Phase.OFF
                or now < state.retry_at
                or self.free_gb() < state.memory_gb - ROUNDING_GB
            ):
                return
            self.unclaim(state)
            self.load(state, now)

    def load(self, state: ModelState, now: float) -> None:
        self._enter(state, Phase.LOADING)
        state.moved = now
        self.actions.append(Load(state.id))

    def _drain(self, state: ModelState, now: float) -> None:
        state.phase = Phase.DRAINING
        state.drain_by = max(now + self.settings.drain_s, state.leave_by)
        state.queue.merge(grouped=state.grouped)
        self.changed = True

    def _enter(self, state: ModelState, phase: Phase) -> None:
        state.phase = phase
        self.there[state.id] = state
        self.changed = True

    def _off(self, state: ModelState) -> None:
        state.phase = Phase.OFF
        del self.there[state.id]
        self.changed = True
        self._forget(state)

    def _forget(self, state: ModelState) -> None:
        if state.gone and state.phase is Phase.OFF and not state.running:
            self.models.pop(state.id, None)
            self.failed.pop(state.id, None)
            self.wished.pop(state.id, None)

    # --- calls -----------------------------------------------------------------------

    def enter(self, state: ModelState, call: Waiting, entry: Entry | None) -> None:
        """A call that waits from now on; where `entry` is None, for a batch. An interactive one's
        place in its queue is the caller's affair."""
        self.waiting[call.id] = (state, entry)
        if entry is None:
            state.queue.batch.add(call)
            self.batched[state.id] = state
            self._chain((call.model, *call.later), 1)
        else:
            self.asked[state.id] = state
        if call.deadline is not None:
            heapq.heappush(self._deadlines, (call.deadline, call.id))
        for name in call.later:
            if name in self.models:
                self.models[name].wanted_by += 1

    def remove(self, number: int) -> Waiting:
        """Takes a waiting call out of its queue. Raises ValueError for one that does not wait."""
        if number not in self.waiting:
            raise ValueError(f"call {number} does not wait")
        state, entry = self.waiting.pop(number)
        if entry is None:
            call = state.queue.batch.pop(number)
            if not state.queue.batch:
                del self.batched[state.id]
            self._chain((call.model, *call.later), -1)
            return call
        state.queue.remove(entry)
        if not state.queue.order:
            del self.asked[state.id]
            self.changed = True
        return entry.call

    def turn_away(self, state: ModelState, entry: Entry, retry_after: float) -> None:
        """Refuses a call that has entered and was not queued."""
        del self.waiting[entry.call.id]
        if not state.queue.order:
            self.asked.pop(state.id, None)
        self.forget_later(entry.call)
        self.say_no(entry.call, "late", retry_after)

    def say_no(self, call: Waiting, reason: str, retry_after: float) -> None:
        low, high = RETRY_AFTER_S
        self.actions.append(Refuse(call.id, reason, min(max(retry_after, low), high)))

    def refuse(self, number: int, reason: str, retry_after: float) -> None:
        call = self.remove(number)
        self.forget_later(call)
        self.say_no(call, reason, retry_after)

    def expire(self, now: float, *, strictly: bool) -> None:
        """Refuses who has waited until the deadline, or (`strictly`) past it."""
        heap = self._deadlines
        while heap and (heap[0][0] < now or (heap[0][0] == now and not strictly)):
            deadline, number = heapq.heappop(heap)
            waiting = self.waiting.get(number)
            if waiting is None:
                continue
            state, entry = waiting
            call = entry.call if entry is not None else state.queue.batch[number]
            if call.deadline == deadline:
                self.refuse(number, "late", state.load.mean)

    def grant(self, state: ModelState, call: Waiting, now: float) -> None:
        self.remove(call.id)
        state.grant(call, now)
        self.running[call.id] = state
        if call.batch:
            self._chain(call.later, 1)
        self.actions.append(Grant(call.id))

    def finished(self, number: int, now: float) -> None:
        state = self.running.pop(number, None)
        if state is None:
            raise ValueError(f"call {number} does not run")
        granted = state.end(number)
        if self.settings.learn and state.phase in SERVING and not state.lost:
            state.run.observe(now - granted.since)
        self.forget_later(granted.call)
        if granted.call.batch:
            self._chain(granted.call.later, -1)
        self._forget(state)

    def _chain(self, chain: tuple[str, ...], calls: int) -> None:
        if chain:
            self.chains[chain] += calls
            if not self.chains[chain]:
                del self.chains[chain]

    def forget_later(self, call: Waiting) -> None:
        for name in call.later:
            state = self.models.get(name)
            if state is not None and state.wanted_by:
                state.wanted_by -= 1

    def next_time(self, now: float) -> float:
        """When something of this is due that no event will announce."""
        while self._deadlines and self._deadlines[0][1] not in self.waiting:
            heapq.heappop(self._deadlines)
        at = self._deadlines[0][0] if self._deadlines else math.inf
        for state in self.there.values():
            if state.phase is Phase.DRAINING and state.running and state.drain_by > now:
                at = min(at, state.drain_by)
        for state in self.failed.values():
            if state.phase is Phase.OFF and state.retry_at > now:
                at = min(at, state.retry_at)
        return at
