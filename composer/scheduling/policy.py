"""Which calls run now, and which models are on the device: the policy core. Knows no clock, no
server and no event loop; the service and the simulator run this same code.

**Objective**: the fewest swap seconds (time spent loading and unloading) subject to each call's
deadline. Waiting less than its bound is worth nothing by default (`PolicySettings.patience`).

**Rule**: residents serve their calls; a swap for calls that wait for another model is begun as
late as a plan still serves every waiting call in time (laziness: what waits longer is served
by one load together with what comes meanwhile), and what then leaves is what is expected to cost
least. A visit ends when somebody else's deadline forces it or, with less patience, when nobody
waits for it while others have waited long enough (`Planner.early`).

**Moments**: what happens at one time is heard, admitted and granted event by event; swaps are
decided once, when all of it has happened (`Wake` at once, then `Ticked`). The calls of one request
so count together, and what a finished call makes needless is gone before anything moves for it.

**Guarantees**. (1) No call is granted after its deadline and none waits past it: both ends of
`on` refuse what is due. (2) If no duration exceeds its estimate (`learn=False` makes the models'
figures such bounds), every admitted call is granted in time: a call is admitted only with a
plan under which it and all others are (`_admit`); the plan's times only move forward when things
end early (plan.py, queues.py); each step is begun before its latest time; and nothing that the plan
does not hold (a batch call, a call for another visit) is granted unless it has ended before
its model has to leave. A moment lasts no time on the policy's clock, so what is admitted in it is
admitted against what will be decided at its end.
"""

from __future__ import annotations

import math
from typing import Any

from composer.scheduling.batch_choice import BatchChoice
from composer.scheduling.events import (
    RETRY_AFTER_S,
    Action,
    Arrived,
    Configured,
    Event,
    Finished,
    Left,
    Loaded,
    LoadFailed,
    Lost,
    Ticked,
    Unloaded,
    Waiting,
    Wake,
)
from composer.scheduling.fleet import Fleet
from composer.scheduling.plan import choose_victims, evaluate
from composer.scheduling.planner import ADMIT_S, GUARD_S, Planner
from composer.scheduling.preload import next_to_load
from composer.scheduling.queues import Entry
from composer.scheduling.state import ModelState, Phase, PolicySettings

__all__ = ["PolicySettings", "SwapPolicy"]


class SwapPolicy:
    """The policy of one device. See the module's docstring."""

    def __init__(self, settings: PolicySettings | None = None) -> None:
        self.settings = settings or PolicySettings()
        self._fleet = Fleet(self.settings)
        self._planner = Planner(self._fleet)
        self._batches = BatchChoice(self._fleet)
        self._wake_at = math.inf
        self._open = False  # something happened since swaps were last decided

    def on(self, event: Event, now: float) -> list[Action]:
        fleet = self._fleet
        if isinstance(event, Left):
            # Before those who are late are told: its caller is told nothing any more.
            fleet.forget_later(fleet.remove(event.call))
        fleet.expire(now, strictly=True)
        match event:
            case Arrived(call):
                self._arrived(call, now)
            case Finished(call):
                fleet.finished(call, now)
            case Loaded(model):
                fleet.loaded(model, now)
            case LoadFailed(model):
                fleet.load_failed(model, now)
            case Unloaded(model):
                fleet.unloaded(model, now)
            case Lost(model):
                fleet.lost(model, now)
            case Ticked():
                self._wake_at = math.inf
            case Configured():
                fleet.configure(event, now)
        self._grant(now)
        fleet.expire(now, strictly=False)
        self._open = self._open or fleet.changed
        if isinstance(event, Ticked):
            self._decide(now)
        elif not self._planner.outdated(now):
            self._grant_batches(now)
        self._sleep(now, decided=isinstance(event, Ticked))
        # What was decided before an event that cannot be stands, and is told with the next one.
        actions, fleet.actions = fleet.actions, []
        return actions

    def _decide(self, now: float) -> None:
        """What is loaded and unloaded, after all that happened at this moment."""
        fleet = self._fleet
        fleet.drop_claims()
        self._swap(now)
        if fleet.reopen(now):
            self._swap(now)
        self._grant(now)
        self._grant_batches(now)
        fleet.move(now)
        if self.settings.preload and (state := next_to_load(fleet, now)) is not None:
            fleet.load(state, now)
        self._open = False

    def _undecided(self, now: float) -> bool:
        """Whether deciding now may begin anything."""
        return (
            self._open
            or self._planner.outdated(now)
            or self._due_steps(now) > 0
            or self._is_early(now)
            or self._fleet.leaving
            or bool(self._batches.wanting)
        )

    # --- arrivals --------------------------------------------------------------------

    def _arrived(self, call: Waiting, now: float) -> None:
        fleet = self._fleet
        if call.id in fleet.waiting or call.id in fleet.running:
            raise ValueError(f"call {call.id} is here already")
        state = fleet.models.get(call.model)
        if state is None or state.gone:
            fleet.say_no(call, "gone", RETRY_AFTER_S[0])
            return
        if call.batch:
            fleet.enter(state, call, None)
            return
        bound = (
            self.settings.unbounded_wait_s
            if call.deadline is None
            else call.deadline - call.arrived
        )
        state.asked_for(now, bound)
        if call.deadline is not None and call.deadline < now:
            fleet.say_no(call, "late", RETRY_AFTER_S[0])
            return
        idle = state.phase is Phase.RESIDENT and not state.queue.order
        if idle and self._planner.outdated(now):
            self._planner.renew(now)  # when it has to leave, after what happened just now
        at_once = idle and self._may_run(state, call, now)
        if not at_once and len(state.queue.order) >= state.model.queue:
            pace = state.run.mean / state.model.in_flight
            fleet.say_no(call, "full", pace * (len(state.queue.order) + 1))
            return
        entry = Entry(
            call,
            math.inf if call.deadline is None else call.deadline,
            call.arrived + self.settings.patience * bound,
            call.arrived + self.settings.adapter_patience * bound,
        )
        fleet.enter(state, call, entry)
        if at_once:
            state.queue.insert(0, entry)
        elif not self._planner.admit(state, entry, now):
            if state.phase is Phase.OFF and entry.deadline - now < 2 * state.swap_s:
                fleet.wished[state.id] = state
            fleet.turn_away(state, entry, self._planner.expected(state, now) - now)

    # --- grants ----------------------------------------------------------------------

    def _may_run(self, state: ModelState, call: Waiting, now: float) -> bool:
        """Whether a call that the plan does not hold may run: there is room, and it has ended
        before its model has to leave."""
        return (
            len(state.running) < state.model.in_flight
            and state.has_room_for(call.adapter)
            and now + state.run_s <= self._planner.leave_by(state)
        )

    def _grant(self, now: float) -> None:
        for state in self._fleet.there.values():
            queue = state.queue
            if not queue.order or state.phase not in (Phase.RESIDENT, Phase.CLOSING):
                continue
            while queue.now_on and len(state.running) < state.model.in_flight:
                call = queue.order[0].call
                if not state.has_room_for(call.adapter):
                    break
                self._fleet.grant(state, call, now)
            if not queue.now_on and queue.order and state.phase is Phase.RESIDENT:
                self._fleet.changed = True  # kept for a later visit, perhaps needlessly by now

    def _grant_batches(self, now: float) -> None:
        for state in self._fleet.there.values():
            queue = state.queue
            while state.phase is Phase.RESIDENT and queue.batch and not queue.order:
                call = queue.batch.first(state.adapters, state.model.adapters)
                if call is None or not self._may_run(state, call, now):
                    break
                self._fleet.grant(state, call, now)

    # --- swaps -----------------------------------------------------------------------

    def _swap(self, now: float) -> None:
        """Begins the steps of the plan whose time has come."""
        fleet, planner = self._fleet, self._planner
        while planner.outdated(now) or self._due_steps(now) or self._is_early(now):
            planner.renew(now)
            due = self._due_steps(now)
            if due:
                for step in planner.plan.steps[:due]:
                    for name in step.victims:
                        fleet.close(fleet.models[name], step.leave_by)
                    fleet.claim(fleet.models[step.visit[0]])
            elif not self._swap_early(now):
                break
        if not planner.plan.steps and self._batches.begin(now):
            planner.renew(now)

    def _due_steps(self, now: float) -> int:
        """How many steps to begin now: up to the last one that is due."""
        due = 0
        for index, step in enumerate(self._planner.plan.steps):
            victims = [self._fleet.models[name] for name in step.victims]
            if any([victim.phase is not Phase.RESIDENT for victim in victims]):
                break  # it has yet to come itself
            # Idle, with calls kept from running by the coming swap: waiting serves nobody.
            blocked = (
                any([victim.queue.order for victim in victims])
                and not any([victim.queue.now_on for victim in victims])
                and not any([victim.running for victim in victims])
            )
            if now >= self._planner.due[index] - GUARD_S or not victims or blocked:
                due = index + 1
        return due

    def _idle(self) -> list[ModelState]:
        """Residents that nobody waits for; calls may still run there."""
        return [
            s
            for s in self._fleet.there.values()
            if s.phase is Phase.RESIDENT and s.model.movable and not s.queue.order
        ]

    def _is_early(self, now: float) -> bool:
        late = [early for early in self._planner.early if early.at <= now]
        idle = self._idle() if late else []
        if any([not state.running for state in idle]):
            return True
        return bool(idle) and any([early.at_most <= now for early in late])

    def _swap_early(self, now: float) -> bool:
        """For calls that have waited as long as they should, though they could longer: a load in
        the place of models that nobody waits for, if all others are still served in time. Only
        for those that have waited longer still do models leave that run calls."""
        fleet, planner, view = self._fleet, self._planner, self._planner.view
        idle = [s for s in self._idle() if s.id in view.holders]
        unused = [view.holders[s.id] for s in idle if not s.running]
        unwaited = [view.holders[s.id] for s in idle]
        promised = sum([claim.memory_gb for claim in view.claims])
        free = view.free_gb + sum([gb for _, gb in view.leaving]) - promised
        if not idle and free <= 0:
            return False
        for early in planner.early:
            if early.at > now:
                return False
            visit, model = early.visit, early.visit[0]
            short = view.demands[visit].memory_gb - free
            victims = choose_victims(unused, short)
            if victims is None and now >= early.at_most:
                victims = choose_victims(unwaited, short)
            names = tuple(victim.model for victim in victims or ())
            if victims is None or model in names:
                continue
            order = [visit, *(other for other in planner.plan.order if other != visit)]
            plan = evaluate(view, order, {visit: names}, fast=True)
            if plan is None or plan.slack < min(planner.plan.slack, ADMIT_S):
                continue
            if plan.victims.get(visit) != names:
                continue  # its turn comes after a load of it that is decided on already
            for name in names:
                fleet.close(fleet.models[name], plan.leave_by[name])
            fleet.claim(fleet.models[model])
            return True
        return False

    def _sleep(self, now: float, *, decided: bool) -> None:
        """Asks to be woken when this moment is over, or the next thing is due that no event will
        announce."""
        if self._wake_at <= now:
            return  # it is on its way
        if not decided and self._undecided(now):
            self._wake_at = now
            self._fleet.actions.append(Wake(now))
            return
        at = min(self._fleet.next_time(now), self._planner.look_at, self._batches.next_time(now))
        if at < math.inf and at != self._wake_at:
            self._wake_at = at
            self._fleet.actions.append(Wake(at))

    # --- for people ------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """What is where, who waits and what is planned, as plain values for JSON."""
        return {
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
                for state in self._fleet.models.values()
            },
            "next": [state.id for state in self._fleet.claims],
            "plan": [
                {
                    "model": step.visit[0],
                    "instead_of": list(step.victims),
                    "at_the_latest": step.leave_by if math.isfinite(step.leave_by) else None,
                }
                for step in self._planner.plan.steps
            ],
        }
