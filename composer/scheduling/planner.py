"""The plan that a device follows, and which calls it admits. Begins nothing itself.

Most calls are admitted without a new plan: where they go to the end of their model's queue and
what the present plan has to spare covers them (`_fits`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from composer.scheduling.fleet import SERVING, Fleet
from composer.scheduling.plan import Demand, Plan, View, Visit, best_plan, evaluate
from composer.scheduling.planning import view_of
from composer.scheduling.queues import Entry, end_of, start_of
from composer.scheduling.state import ModelState, Phase

GUARD_S = 1e-3
"""Swaps are begun this much before their latest time, far above the rounding of any clock."""

ADMIT_S = 1e-4
"""Slack that a plan must have left for a new call to be admitted, above rounding errors."""


@dataclass(frozen=True, slots=True, order=True)
class Early:
    """A visit that may begin before it must: from `at` on in place of models that nobody uses, from
    `at_most` on also of those that still run calls, but have none waiting."""

    at: float
    visit: Visit
    at_most: float


class Planner:
    """`plan` was made from `view`. `due` is when each of its steps is to be begun, as queues grow
    meanwhile; `early` are the visits that may be begun before, first to last; `look_at` is when to
    make a new plan at the latest."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.plan = Plan()
        self.view = View(-math.inf, 0.0, [], {}, [], {})
        self.due: list[float] = []
        self.early: list[Early] = []
        self.look_at = math.inf
        self._spare = math.inf  # the plan's slack, less what was added to its visits since

    def outdated(self, now: float) -> bool:
        return self._fleet.changed or now >= self.look_at

    def leave_by(self, state: ModelState) -> float:
        """When a model's calls must have ended."""
        return self.plan.leave_by.get(state.id, math.inf)

    def expected(self, state: ModelState, now: float) -> float:
        """When a model will be loaded, for people."""
        return self.plan.ready.get((state.id, 0), now + state.load.mean)

    def renew(self, now: float) -> None:
        """A new plan; second visits become needless when things went better than planned."""
        for state in list(self._fleet.asked.values()):
            queue = state.queue
            if queue.now_on < len(queue.order) and state.phase is not Phase.CLOSING:
                self._merge(state, now)
        self._adopt(*self._make(now))

    def _merge(self, state: ModelState, now: float) -> None:
        apart, _ = self._make(now)
        queue = state.queue
        order, now_on = list(queue.order), queue.now_on
        queue.merge(grouped=state.grouped)
        state.unsettle()
        if state.away and not now_on:
            return  # there was but one visit
        plan, _ = self._make(now)
        if plan.slack < ADMIT_S or plan.spare < min(apart.spare, 0.0) - ADMIT_S:
            queue.restore(order, now_on)
            state.unsettle()

    def _make(self, now: float) -> tuple[Plan, View]:
        view = view_of(self._fleet, now)
        return best_plan(view, self.plan, ADMIT_S), view

    def _adopt(self, plan: Plan, view: View) -> None:
        self.plan, self.view, self._spare = plan, view, plan.slack
        self._fleet.changed = False
        self.due = []
        if plan.steps:
            growing = evaluate(view, plan.order, plan.victims, growing=True)
            assert growing is not None  # the same memory sufficed
            self.due = [
                min(step.leave_by, late.leave_by)
                for step, late in zip(plan.steps, growing.steps, strict=True)
            ]
        self.early = sorted(
            [
                self._early(visit, demand, view.now)
                for visit, demand in view.demands.items()
                if demand.model not in view.holders
            ]
        )
        times = [at - GUARD_S for at in self.due]
        times += [at for early in self.early for at in (early.at, early.at_most)]
        self.look_at = min((at for at in times if at > view.now), default=math.inf)

    def _early(self, visit: Visit, demand: Demand, now: float) -> Early:
        """Those that are late for their target go by how late, so that none starves."""
        settings, state = self._fleet.settings, self._fleet.models[demand.model]
        at = demand.target - demand.load_s - demand.unload_s
        # A model in use that leaves makes its calls' slots idle one by one, and comes back soon: it
        # stays for longer, to the geometric mean of `patience` × bound and bound.
        root = math.sqrt(settings.patience)
        longer = (demand.latest - demand.target) * root / (1 + root)
        at_most = at + (longer if math.isfinite(longer) else settings.unbounded_wait_s * root)
        work = len(state.queue.order) * state.run.mean / state.model.in_flight
        if work > settings.lazy_share * state.bound_s:
            at = min(at, now)
        return Early(at, visit, at_most)

    # --- admission -------------------------------------------------------------------

    def admit(self, state: ModelState, entry: Entry, now: float) -> bool:
        """Queues the call for the present visit, else for the one after, if all calls are then
        still served in time."""
        queue = state.queue
        open_now = state.phase is not Phase.CLOSING
        index = queue.now_on
        if open_now:
            in_use = entry.call.adapter in state.adapters
            index = queue.place(entry, grouped=state.grouped, in_use=in_use, now=now)
            if index == queue.now_on and not state.grouped and self._fits(state, entry, now):
                queue.insert(index, entry)
                return True
        there = state.phase in SERVING or state.phase is Phase.LOADING or state.claimed
        again = (there or queue.now_on > 0) and state.model.movable
        settings = self._fleet.settings
        # Rather in a later visit than at the cost of the margin; rather so than not at all.
        for lax in (False, True) if settings.margin and settings.learn else (True,):
            if open_now:
                before, now_on = list(queue.order), queue.now_on
                queue.insert(index, entry)
                state.unsettle()
                if self._holds(state, entry, now, lax):
                    return True
                if again and not state.grouped and index < now_on:
                    # Before calls that can wait for another visit.
                    queue.cut(index + 1)
                    if self._holds(state, entry, now, lax):
                        return True
                queue.restore(before, now_on)
                state.unsettle()
            if again:
                queue.append_later(entry)
                if self._holds(state, entry, now, lax):
                    return True
                queue.remove(entry)
            if self._stays_longer(state, entry, now, lax):
                return True
        return False

    def _stays_longer(self, state: ModelState, entry: Entry, now: float, lax: bool) -> bool:
        """A model on its way out serves a call that would be refused, if those that it leaves for
        are still served in time: many swaps are begun before they have to be."""
        if state.phase not in (Phase.CLOSING, Phase.DRAINING) or state.gone or state.lost:
            return False
        queue, phase = state.queue, state.phase
        before, now_on = list(queue.order), queue.now_on
        if phase is Phase.DRAINING:
            state.phase = Phase.CLOSING
            queue.cut(0)
        queue.insert(queue.now_on, entry)
        state.unsettle()
        if self._holds(state, entry, now, lax):
            return True
        state.phase = phase
        queue.restore(before, now_on)
        state.unsettle()
        return False

    def _fits(self, state: ModelState, entry: Entry, now: float) -> bool:
        """Whether the call can go to the end of its model's visit by what the present plan has
        to spare."""
        if self.outdated(now):
            return False
        n, service = state.queue.now_on, state.service
        if state.phase is Phase.RESIDENT:
            free = state.free_slots(now)
            slack = entry.deadline - start_of(n, free, service)
            if slack < ADMIT_S or end_of(n + 1, free, service) > self.leave_by(state):
                return False
            state.promise(slack)
            return True
        passed = now - self.view.now
        if state.phase is Phase.LOADING:
            ready = max(now, state.moved + state.load.mean)
        elif (state.id, 0) in self.plan.ready and n:
            ready = self.plan.ready[state.id, 0] + passed
        else:
            return False
        idle = [0.0] * service.slots
        longer = end_of(n + 1, idle, service) - end_of(n, idle, service)
        slack = entry.deadline - ready - start_of(n, idle, service)
        if min(self._spare - longer - passed, slack) < ADMIT_S:
            return False
        self._spare -= longer
        self.look_at -= longer
        return True

    def _holds(self, state: ModelState, entry: Entry, now: float, lax: bool) -> bool:
        """Whether a plan serves all in time with this call too, and then makes it the plan; unless
        `lax`, with a margin, if there was one. Where not even all others are served in time,
        whether it is itself and makes none later."""
        plan, view = self._make(now)
        passed = now - self.view.now
        if not lax and plan.spare < min(self.plan.spare - passed, 0.0) - ADMIT_S:
            return False
        if plan.slack < ADMIT_S:
            if not self._fleet.changed and self._spare - passed >= ADMIT_S:
                return False
            queue = state.queue
            order, now_on = list(queue.order), queue.now_on
            start = self._start(state, order.index(entry), plan, now)
            queue.remove(entry)
            state.unsettle()
            before, _ = self._make(now)
            queue.restore(order, now_on)
            state.unsettle()
            worse = plan.slack < before.slack - ADMIT_S
            if before.slack >= ADMIT_S or worse or start > entry.deadline:
                return False
        self._adopt(plan, view)
        return True

    def _start(self, state: ModelState, index: int, plan: Plan, now: float) -> float:
        """When the call at this place in its model's queue is expected to start."""
        now_on = state.queue.now_on
        visit = 0 if index < now_on else 1
        if visit == 0 and state.phase is Phase.RESIDENT:
            free = state.free_slots(now)
        else:
            ready = plan.ready.get((state.id, visit))
            if ready is None:
                ready = max(now, state.moved, state.retry_at) + state.load.mean
            free = [ready] * state.model.in_flight
        return start_of(index - visit * now_on, free, state.service)
