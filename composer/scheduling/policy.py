"""Which calls run now, and which models are on the device: the policy core. Knows no clock, no
server and no event loop; the service and the simulator run this same code.

**Objective**: the fewest swap seconds (time spent loading and unloading) subject to each call's
deadline. Waiting less than its bound is worth nothing by default (`PolicySettings.patience`).

**Rule**: residents serve their calls; a swap for calls that wait for another model is begun as
late as a plan still serves every waiting call in time (laziness: what waits longer is served
by one load together with what comes meanwhile), and what then leaves is what is expected to cost
least. A visit ends only when somebody else's deadline forces it.

**Guarantees**. (1) No call is granted after its deadline and none waits past it: both ends of
`on` refuse what is due. (2) If no duration exceeds its estimate (`learn=False` makes the models'
figures such bounds), every admitted call is granted in time: a call is admitted only with a
plan under which it and all others are (`_admit`); the plan's times only move forward when things
end early (plan.py, queues.py); each step is begun before its latest time; and nothing that the plan
does not hold (a batch call, a call for another visit) is granted unless it has ended before
its model has to leave.
"""

from __future__ import annotations

import heapq
import math
from typing import Any

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
    LoadFailed,
    Lost,
    Refuse,
    Ticked,
    Unload,
    Unloaded,
    Waiting,
    Wake,
)
from composer.scheduling.plan import ROUNDING_GB, Plan, View, best_plan, choose_victims, evaluate
from composer.scheduling.planning import demand_of, view_of
from composer.scheduling.queues import Entry, Outlook, end_of, start_of
from composer.scheduling.state import ModelState, Phase, PolicySettings

GUARD_S = 1e-3
"""Swaps are begun this much before their latest time, far above the rounding of any clock."""

ADMIT_S = 1e-4
"""Slack that a plan must have left for a new call to be admitted, above rounding errors."""

QUIET_SWAPS = 2.0
"""A model may leave for a batch when nobody has asked for it for so many times its swap."""

SERVING = (Phase.RESIDENT, Phase.CLOSING, Phase.DRAINING)

RETRY_AFTER_S = (1.0, 600.0)
"""Bounds of the advice to a refused caller."""


class SwapPolicy:
    """The policy of one device. See the module's docstring."""

    def __init__(self, settings: PolicySettings | None = None) -> None:
        self.settings = settings or PolicySettings()
        self._memory_gb = 0.0
        self._models: dict[str, ModelState] = {}
        self._waiting: dict[int, tuple[ModelState, Entry | None]] = {}
        self._running: dict[int, ModelState] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._claims: list[ModelState] = []  # loads decided on, first to last
        # The plan, when it was made and from what; its slack less what was added to it since;
        # when each of its steps is to be begun, and should; when to look at it again.
        self._plan = Plan()
        self._planned = -math.inf
        self._view: View | None = None
        self._spare = math.inf
        self._due: list[float] = []
        self._early: list[tuple[float, str, int]] = []
        self._look_at = math.inf
        self._stale = False
        self._wake_at = math.inf
        self._actions: list[Action] = []

    # --- events ----------------------------------------------------------------------

    def on(self, event: Event, now: float) -> list[Action]:
        actions: list[Action] = []
        self._actions = actions
        self._expire(now, strictly=True)
        match event:
            case Arrived(call):
                self._arrived(call, now)
            case Finished(call):
                self._finished(call, now)
            case Left(call):
                self._left(call)
            case Loaded(model):
                self._loaded(model, now)
            case LoadFailed(model):
                self._load_failed(model, now)
            case Unloaded(model):
                self._unloaded(model, now)
            case Lost(model):
                self._lost(model, now)
            case Ticked():
                self._wake_at = math.inf
            case Configured():
                self._configured(event, now)
        self._advance(now)
        return actions

    def _configured(self, event: Configured, now: float) -> None:
        known = {model.id for model in event.models}
        if len(known) != len(event.models):
            raise ValueError("two models have the same id; give each its own")
        for model in event.models:
            if model.movable and model.memory_gb > event.memory_gb:
                raise ValueError(
                    f"model {model.id!r} needs {model.memory_gb} GB and the device has "
                    f"{event.memory_gb}; give it a larger device or a smaller memory_gb"
                )
        self._memory_gb = event.memory_gb
        for model in event.models:
            state = self._models.get(model.id)
            if state is None:
                state = self._models[model.id] = ModelState.of(model, self.settings, now)
                if model.id in event.resident:
                    state.phase = Phase.RESIDENT
                continue
            state.reconfigure(model)
            if state.phase in (Phase.CLOSING, Phase.DRAINING) and (state.gone or not model.movable):
                state.phase = Phase.RESIDENT
            if state.claimed and not model.movable:
                self._unclaim(state)
            state.gone = False
        for state in [s for s in self._models.values() if s.id not in known]:
            state.gone = True
            for call in [*(e.call for e in state.queue.order), *state.queue.batch.values()]:
                self._refuse(call.id, "gone", RETRY_AFTER_S[0])
            if state.claimed:
                self._unclaim(state)
            if state.phase in (Phase.RESIDENT, Phase.CLOSING):
                state.phase, state.drain_by = Phase.DRAINING, math.inf
        for state in list(self._claims):  # what was decided for another memory
            self._unclaim(state)
        self._stale = True
        self._make_fit(now)

    def _arrived(self, call: Waiting, now: float) -> None:
        if call.id in self._waiting or call.id in self._running:
            raise ValueError(f"call {call.id} is here already")
        state = self._models.get(call.model)
        if state is None or state.gone:
            self._actions.append(Refuse(call.id, "gone", RETRY_AFTER_S[0]))
            return
        if call.batch:
            self._enter(state, call, None)
            state.queue.batch[call.id] = call
            return
        state.rate.observe(now)
        state.last_interactive = now
        if call.deadline is not None and call.deadline < now:
            self._actions.append(Refuse(call.id, "late", RETRY_AFTER_S[0]))
            return
        bound = (
            self.settings.unbounded_wait_s
            if call.deadline is None
            else call.deadline - call.arrived
        )
        state.bound_s += (bound - state.bound_s) / (8 if state.bound_s else 1)
        at_once = (
            state.phase is Phase.RESIDENT
            and not state.queue.order
            and self._may_run(state, call, now)
        )
        if not at_once and len(state.queue.order) >= state.model.queue:
            wait = state.run.mean * (len(state.queue.order) + 1) / state.model.in_flight
            self._actions.append(Refuse(call.id, "full", _advice(wait)))
            return
        entry = Entry(
            call,
            math.inf if call.deadline is None else call.deadline,
            call.arrived + self.settings.patience * bound,
            call.arrived + self.settings.adapter_patience * bound,
        )
        self._enter(state, call, entry)
        if at_once:
            state.queue.insert(0, entry)
            return
        self._admit(state, entry, now)

    def _finished(self, number: int, now: float) -> None:
        state = self._running.pop(number, None)
        if state is None:
            raise ValueError(f"call {number} does not run")
        granted = state.end(number)
        if self.settings.learn and state.phase in SERVING:
            state.run.observe(now - granted.since)
        self._forget_later(granted.call)

    def _left(self, number: int) -> None:
        if number not in self._waiting:
            raise ValueError(f"call {number} does not wait")
        self._forget_later(self._remove(number))

    def _loaded(self, name: str, now: float) -> None:
        state = self._known(name, Phase.LOADING)
        if self.settings.learn:
            state.load.observe(now - state.moved)
        state.phase, state.failures, state.lost = Phase.RESIDENT, 0, False
        state.wished = -math.inf
        if state.gone:
            state.phase, state.drain_by = Phase.DRAINING, math.inf
        self._stale = True
        self._make_fit(now)

    def _load_failed(self, name: str, now: float) -> None:
        state = self._known(name, Phase.LOADING)
        state.phase = Phase.OFF
        wait = min(self.settings.retry_s * 2**state.failures, self.settings.retry_most_s)
        state.failures += 1
        state.retry_at = now + wait
        self._stale = True

    def _unloaded(self, name: str, now: float) -> None:
        state = self._known(name, Phase.UNLOADING)
        if self.settings.learn:
            state.unload.observe(now - state.moved)
        state.phase, state.lost = Phase.OFF, False
        self._stale = True

    def _lost(self, name: str, now: float) -> None:
        state = self._models.get(name)
        if state is None:
            raise ValueError(f"model {name!r} is not configured")
        # In any other phase the news is old: it is being brought back, or on its way out.
        if state.phase is Phase.RESIDENT:
            state.lost = self._stale = True
            self._load(state, now)
        elif state.phase is Phase.CLOSING:
            state.lost = self._stale = True
            self._drain(state, now)

    def _known(self, name: str, phase: Phase) -> ModelState:
        state = self._models.get(name)
        if state is None or state.phase is not phase:
            where = "not configured" if state is None else state.phase.value
            raise ValueError(f"model {name!r} is {where}, not {phase.value}")
        return state

    # --- calls come and go -----------------------------------------------------------

    def _enter(self, state: ModelState, call: Waiting, entry: Entry | None) -> None:
        self._waiting[call.id] = (state, entry)
        if call.deadline is not None:
            heapq.heappush(self._deadlines, (call.deadline, call.id))
        for name in call.later:
            if name in self._models:
                self._models[name].wanted_by += 1

    def _remove(self, number: int) -> Waiting:
        state, entry = self._waiting.pop(number)
        if entry is None:
            return state.queue.batch.pop(number)
        state.queue.remove(entry)
        return entry.call

    def _forget_later(self, call: Waiting) -> None:
        for name in call.later:
            state = self._models.get(name)
            if state is not None and state.wanted_by:
                state.wanted_by -= 1

    def _refuse(self, number: int, reason: str, retry_after: float) -> None:
        call = self._remove(number)
        self._forget_later(call)
        self._actions.append(Refuse(number, reason, _advice(retry_after)))

    def _expire(self, now: float, *, strictly: bool) -> None:
        """Refuses who has waited until the deadline, or (`strictly`) past it."""
        heap = self._deadlines
        while heap and (heap[0][0] < now or (heap[0][0] == now and not strictly)):
            deadline, number = heapq.heappop(heap)
            waiting = self._waiting.get(number)
            if waiting is None:
                continue
            state, entry = waiting
            call = entry.call if entry is not None else state.queue.batch[number]
            if call.deadline == deadline:
                self._refuse(number, "late", state.load.mean)

    def _admit(self, state: ModelState, entry: Entry, now: float) -> None:
        """Queues the call for the present visit, else for the one after, if all calls are then
        still served in time; else refuses it."""
        queue = state.queue
        grouped = state.model.adapters is not None
        open_now = state.phase is not Phase.CLOSING
        there = state.phase in SERVING or state.phase is Phase.LOADING or state.claimed
        again = (there or queue.now_on > 0) and state.model.movable
        if open_now:
            index = queue.place(
                entry, grouped=grouped, in_use=entry.call.adapter in state.adapters, now=now
            )
            if index == queue.now_on and not grouped and self._fits(state, entry, now):
                queue.insert(index, entry)
                return
        # Rather in a later visit than at the cost of the margin; rather so than not at all.
        for lax in (False, True) if self.settings.margin and self.settings.learn else (True,):
            if open_now:
                queue.insert(index, entry)
                state.unsettle()
                if self._holds(state, entry, now, lax):
                    return
                queue.remove(entry)
                state.unsettle()
            if again:
                queue.append_later(entry)
                if self._holds(state, entry, now, lax):
                    return
                queue.remove(entry)
        del self._waiting[entry.call.id]
        self._forget_later(entry.call)
        if state.phase is Phase.OFF and entry.deadline - now < 2 * state.swap_s:
            state.wished = now
        ready = self._plan.ready.get((state.id, 0), now + state.load.mean)
        self._actions.append(Refuse(entry.call.id, "late", _advice(ready - now)))

    def _fits(self, state: ModelState, entry: Entry, now: float) -> bool:
        """Whether the call can go to the end of its model's visit by what the present plan has
        to spare, so that it need not be made anew: most calls are admitted so."""
        if self._stale or now >= self._look_at:
            return False
        n, service = state.queue.now_on, state.service
        if state.phase is Phase.RESIDENT:
            free = state.free_slots(now)
            slack = entry.deadline - start_of(n, free, service)
            leave_by = self._plan.leave_by.get(state.id, math.inf)
            if slack < ADMIT_S or end_of(n + 1, free, service) > leave_by:
                return False
            state.promise(slack)
            return True
        if state.phase is Phase.LOADING:
            ready = max(now, state.moved + state.load.mean)
        elif (state.id, 0) in self._plan.ready and n:
            ready = self._plan.ready[state.id, 0] + (now - self._planned)
        else:
            return False
        idle = [0.0] * service.slots
        longer = end_of(n + 1, idle, service) - end_of(n, idle, service)
        spare = self._spare - longer
        if min(spare - now + self._planned, entry.deadline - ready - start_of(n, idle, service)) < (
            ADMIT_S
        ):
            return False
        self._spare = spare
        self._look_at -= longer
        return True

    def _holds(self, state: ModelState, entry: Entry, now: float, lax: bool) -> bool:
        """Whether a plan serves all in time with this call too, and then makes it the plan; unless
        `lax`, with a margin, if there was one. Where not even all others are served in time,
        whether it is itself and makes none later."""
        plan, view = self._best_plan(now), self._view
        passed = now - self._planned
        if not lax and plan.spare < min(self._plan.spare - passed, 0.0) - ADMIT_S:
            return False
        if plan.slack < ADMIT_S:
            if not self._stale and self._spare - passed >= ADMIT_S:
                return False
            queue = state.queue
            index, now_on = queue.order.index(entry), queue.now_on
            queue.remove(entry)
            state.unsettle()
            before = self._best_plan(now).slack
            queue.put_back(index, now_on, entry)
            state.unsettle()
            self._view = view
            if before >= ADMIT_S or plan.slack < before - ADMIT_S:
                return False
            if self._start(state, index, plan, now) > entry.deadline:
                return False
        self._adopt(plan, now)
        return True

    def _start(self, state: ModelState, index: int, plan: Plan, now: float) -> float:
        """When the call at this place in its model's queue is expected to start."""
        visit = 0 if index < state.queue.now_on else 1
        if visit == 0 and state.phase is Phase.RESIDENT:
            free = state.free_slots(now)
        else:
            ready = plan.ready.get((state.id, visit))
            if ready is None:
                ready = max(now, state.moved, state.retry_at) + state.load.mean
            free = [ready] * state.model.in_flight
        return start_of(index if visit == 0 else index - state.queue.now_on, free, state.service)

    # --- grants ----------------------------------------------------------------------

    def _may_run(self, state: ModelState, call: Waiting, now: float) -> bool:
        """Whether a call that the plan does not hold may run: there is room, and it has ended
        before its model has to leave."""
        return (
            len(state.running) < state.model.in_flight
            and state.has_room_for(call.adapter)
            and now + state.run_s <= self._plan.leave_by.get(state.id, math.inf)
        )

    def _grant_all(self, now: float, *, batch: bool) -> None:
        for state in self._models.values():
            if state.phase in (Phase.RESIDENT, Phase.CLOSING):
                if state.queue.order:
                    self._grant_interactive(state, now)
                elif batch and state.queue.batch:
                    self._grant_batch(state, now)

    def _grant_interactive(self, state: ModelState, now: float) -> None:
        queue = state.queue
        while queue.now_on and len(state.running) < state.model.in_flight:
            call = queue.order[0].call
            if not state.has_room_for(call.adapter):
                return
            self._grant(state, call, now)
        if not queue.now_on and queue.order and state.phase is Phase.RESIDENT:
            self._stale = True  # kept for a later visit, perhaps needlessly by now

    def _grant_batch(self, state: ModelState, now: float) -> None:
        while state.queue.batch and state.phase is Phase.RESIDENT:
            call = next(
                (c for c in state.queue.batch.values() if self._may_run(state, c, now)), None
            )
            if call is None:
                return
            self._grant(state, call, now)

    def _grant(self, state: ModelState, call: Waiting, now: float) -> None:
        self._remove(call.id)
        state.grant(call, now)
        self._running[call.id] = state
        self._actions.append(Grant(call.id))

    # --- moves -----------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Everything that can be done now, and when to look again."""
        self._grant_all(now, batch=False)
        self._expire(now, strictly=False)
        self._drop_claims()
        self._swap(now)
        self._grant_all(now, batch=True)
        self._move(now)
        self._sleep(now)

    def _move(self, now: float) -> None:
        for state in list(self._models.values()):
            phase = state.phase
            if phase is Phase.CLOSING and not state.queue.now_on:
                self._drain(state, now)
            if (
                state.phase is Phase.DRAINING
                and state.model.movable
                and (not state.running or now >= state.drain_by)
            ):
                state.phase, state.moved = Phase.UNLOADING, now
                self._actions.append(Unload(state.id))
            elif state.gone:
                if not state.running and (phase is Phase.OFF or not state.model.movable):
                    del self._models[state.id]
            elif phase is Phase.OFF and not state.model.movable and now >= state.retry_at:
                self._load(state, now)
        while self._claims:
            state = self._claims[0]
            if (
                state.phase is not Phase.OFF
                or now < state.retry_at
                or self._free_gb() < state.memory_gb - ROUNDING_GB
            ):
                return
            self._unclaim(state)
            self._load(state, now)

    def _close(self, state: ModelState, leave_by: float) -> None:
        """It is to leave, for somebody who would be late if it left after `leave_by`."""
        state.phase, state.leave_by = Phase.CLOSING, leave_by

    def _drain(self, state: ModelState, now: float) -> None:
        state.phase = Phase.DRAINING
        state.drain_by = max(now + self.settings.drain_s, state.leave_by)
        state.queue.merge(grouped=state.model.adapters is not None)

    def _load(self, state: ModelState, now: float) -> None:
        state.phase, state.moved = Phase.LOADING, now
        self._actions.append(Load(state.id))

    def _claim(self, state: ModelState) -> None:
        state.claimed = True
        self._claims.append(state)

    def _unclaim(self, state: ModelState) -> None:
        state.claimed = False
        self._claims.remove(state)

    def _free_gb(self) -> float:
        taken = sum([s.memory_gb for s in self._models.values() if s.phase is not Phase.OFF])
        return self._memory_gb - taken

    def _make_fit(self, now: float) -> None:
        """Lets models leave while there are more than fit: the memory, or a model, has changed."""
        staying = [
            s
            for s in self._models.values()
            if s.phase in (Phase.RESIDENT, Phase.LOADING) and s.model.movable
        ]
        over = sum([s.memory_gb for s in staying]) - self._memory_gb
        for state in sorted(staying, key=lambda s: s.regret(now)):
            if over > ROUNDING_GB and state.phase is Phase.RESIDENT:
                over -= state.memory_gb
                self._close(state, now)

    def _drop_claims(self) -> None:
        """A load that nobody waits for any more is not begun; who was to leave for it may stay."""
        idle = [s for s in self._claims if not s.queue.order and not s.queue.batch]
        idle = [s for s in idle if s.wished == -math.inf]
        if not idle:
            return
        for state in idle:
            self._unclaim(state)
        self._stale = True
        needed = sum([s.memory_gb for s in self._claims])
        leaving = (Phase.CLOSING, Phase.DRAINING)
        coming = self._free_gb() + sum(
            [
                s.memory_gb
                for s in self._models.values()
                if s.phase in leaving or s.phase is Phase.UNLOADING
            ]
        )
        for state in self._models.values():
            if state.phase in leaving and not state.gone and coming - state.memory_gb >= needed:
                coming -= state.memory_gb
                state.phase = Phase.RESIDENT

    # --- plans -----------------------------------------------------------------------

    def _best_plan(self, now: float) -> Plan:
        self._view = view_of(
            self._models.values(), self._claims, self._free_gb(), now, self.settings.margin
        )
        return best_plan(self._view, self._plan, ADMIT_S)

    def _adopt(self, plan: Plan, now: float) -> None:
        """Makes it the plan; `_view` is what it was made from."""
        assert self._view is not None
        self._plan, self._planned, self._spare, self._stale = plan, now, plan.slack, False
        self._due = []
        if plan.steps:
            growing = evaluate(self._view, plan.order, plan.victims, growing=True)
            assert growing is not None
            self._due = [
                min(step.leave_by, late.leave_by)
                for step, late in zip(plan.steps, growing.steps, strict=True)
            ]
        self._early = sorted(
            (demand.target - demand.load_s - demand.unload_s, *visit)
            for visit, demand in self._view.demands.items()
        )
        self._look_again(now)

    def _look_again(self, now: float) -> None:
        times = [at - GUARD_S for at in self._due] + [at for at, *_ in self._early]
        self._look_at = min((at for at in times if at > now), default=math.inf)

    def _replan(self, now: float) -> None:
        """A new plan; second visits become needless when things went better than planned."""
        for state in self._models.values():
            queue = state.queue
            if queue.now_on == len(queue.order) or state.phase is Phase.CLOSING:
                continue
            apart = self._best_plan(now)
            order, now_on = list(queue.order), queue.now_on
            queue.merge(grouped=state.model.adapters is not None)
            state.unsettle()
            if state.phase is Phase.RESIDENT or now_on:
                plan = self._best_plan(now)
                if plan.slack < ADMIT_S or plan.spare < min(apart.spare, 0.0) - ADMIT_S:
                    queue.restore(order, now_on)
                    state.unsettle()
        self._adopt(self._best_plan(now), now)

    def _swap(self, now: float) -> None:
        """Begins the steps of the plan whose time has come."""
        while (
            self._stale
            or now >= self._look_at
            or self._due_steps(now)
            or (self._early and self._early[0][0] <= now and self._idle(now))
        ):
            self._replan(now)
            due = self._due_steps(now)
            if due:
                for step in self._plan.steps[:due]:
                    for name in step.victims:
                        self._close(self._models[name], step.leave_by)
                    self._claim(self._models[step.visit[0]])
                self._stale = True
            elif not self._swap_early(now):
                break
        if not self._plan.steps:
            self._swap_for_batch(now)

    def _due_steps(self, now: float) -> int:
        """How many steps to begin now: up to the last one that is due."""
        due = 0
        for index, step in enumerate(self._plan.steps):
            victims = [self._models[name] for name in step.victims]
            if any([victim.phase is not Phase.RESIDENT for victim in victims]):
                break  # it has yet to come itself
            # Idle, with calls kept from running by the coming swap: waiting serves nobody.
            blocked = (
                any([victim.queue.order for victim in victims])
                and not any([victim.queue.now_on for victim in victims])
                and not any([victim.running for victim in victims])
            )
            if now >= self._due[index] - GUARD_S or not victims or blocked:
                due = index + 1
        return due

    def _idle(self, now: float) -> list[ModelState]:
        """Residents that nobody waits for."""
        return [
            s
            for s in self._models.values()
            if s.phase is Phase.RESIDENT and s.model.movable and not s.queue.order
        ]

    def _swap_early(self, now: float) -> bool:
        """For calls that have waited as long as they should, though they could longer: a load in
        the place of models that nobody waits for, if all others are still served in time."""
        view = self._view
        assert view is not None
        idle = [view.holders[s.id] for s in self._idle(now) if s.id in view.holders]
        promised = sum([claim.memory_gb for claim in view.claims])
        free = view.free_gb + sum([gb for _, gb in view.leaving]) - promised
        if not idle and free <= 0:
            return False
        for at, model, again in self._early:
            if at > now:
                return False
            visit = (model, again)
            victims = choose_victims(idle, view.demands[visit].memory_gb - free)
            if victims is None:
                continue
            names = tuple(victim.model for victim in victims)
            if model in names:
                continue
            order = [visit, *(other for other in self._plan.order if other != visit)]
            plan = evaluate(view, order, {visit: names}, fast=True)
            if plan is None or plan.slack < min(self._plan.slack, ADMIT_S):
                continue
            for name in names:
                self._close(self._models[name], plan.leave_by[name])
            self._claim(self._models[model])
            self._stale = True
            return True
        return False

    def _swap_for_batch(self, now: float) -> None:
        """When no interactive call waits for a load: the model with the most batch calls for its
        load seconds, in the place of models that nobody has asked for lately."""
        wanting = [
            s
            for s in self._models.values()
            if s.phase is Phase.OFF
            and (s.queue.batch or s.wished > -math.inf)
            and now >= s.retry_at
            and s.model.movable
            and not s.gone
        ]
        moving = (Phase.LOADING, Phase.UNLOADING, Phase.DRAINING, Phase.CLOSING)
        if (
            not wanting
            or self._claims
            or any(s.phase in moving and s.model.movable for s in self._models.values())
        ):
            return
        wanting.sort(key=lambda s: -(len(s.queue.batch) + 1) / max(s.swap_s, 1e-3))
        for state in wanting:
            view = view_of(
                self._models.values(),
                [],
                self._free_gb(),
                now,
                self.settings.margin,
                lambda other: self._is_quiet(other, now),
            )
            view.demands[state.id, 0] = demand_of(state, Outlook(), now)
            plan = evaluate(view, [(state.id, 0)])
            if plan is not None:
                for name in plan.steps[0].victims:
                    self._close(self._models[name], math.inf)
                self._claim(state)
                self._stale = True
                return

    def _is_quiet(self, state: ModelState, now: float) -> bool:
        """Whether it may leave for a batch: no call for it, and, as an interactive one would bring
        it back at once, none lately. Waiting as long as a swap costs bounds the regret by a factor
        of two (ski rental)."""
        return (
            not state.running
            and not state.queue.order
            and not state.queue.batch
            and now >= state.last_interactive + QUIET_SWAPS * state.swap_s
        )

    def _sleep(self, now: float) -> None:
        """Asks to be woken when the next thing is due that no event will announce."""
        while self._deadlines and self._deadlines[0][1] not in self._waiting:
            heapq.heappop(self._deadlines)
        at = self._look_at
        if self._deadlines:
            at = min(at, self._deadlines[0][0])
        batch = False
        for state in self._models.values():
            if state.phase is Phase.DRAINING and state.running and state.drain_by > now:
                at = min(at, state.drain_by)
            if state.phase is Phase.OFF:
                if state.retry_at > now:
                    at = min(at, state.retry_at)
                batch = batch or bool(state.queue.batch) or state.wished > -math.inf
        if batch:
            for state in self._models.values():
                quiet = state.last_interactive + QUIET_SWAPS * state.swap_s
                if state.phase is Phase.RESIDENT and state.model.movable and quiet > now:
                    at = min(at, quiet)
        if at < math.inf and at != self._wake_at:
            self._wake_at = at
            self._actions.append(Wake(at))

    # --- for people ------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """What is where, who waits and what is planned, as plain values for JSON."""
        return {
            "memory_gb": self._memory_gb,
            "models": {
                state.id: {
                    "state": "lost" if state.lost else state.phase.value,
                    "running": len(state.running),
                    "waiting": len(state.queue.order),
                    "waiting_batch": len(state.queue.batch),
                    "load_s": state.load.mean,
                    "unload_s": state.unload.mean,
                    "run_s": state.run.mean,
                }
                for state in self._models.values()
            },
            "next": [state.id for state in self._claims],
            "plan": [
                {
                    "model": step.visit[0],
                    "instead_of": list(step.victims),
                    "at_the_latest": step.leave_by,
                }
                for step in self._plan.steps
            ],
        }


def _advice(seconds: float) -> float:
    low, high = RETRY_AFTER_S
    return min(max(seconds, low), high)
