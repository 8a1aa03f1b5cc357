"""Which model to load for batch calls when no interactive call waits for a load.

The order of loads is that of batch_order.py: the fewest load seconds for all chains of calls that
are known. Also loads what was refused because its load takes longer than its callers may wait:
they were told when to come again.
"""

from __future__ import annotations

import math
from collections import Counter

from composer.scheduling.batch_order import ModelCost, order
from composer.scheduling.fleet import LEAVING, Fleet
from composer.scheduling.plan import Demand, evaluate
from composer.scheduling.planning import view_of
from composer.scheduling.state import ModelState, Phase

QUIET_SWAPS = 2.0
"""A model may leave for a batch when nobody has asked for it for so many times its swap. Waiting
as long as a swap costs bounds the regret by a factor of two (ski rental)."""

EXACT_STATES, SEARCH_LOADS = 200, 2_000
"""Effort of one decision: some ten milliseconds, once a load."""

Chains = tuple[tuple[str, ...], ...]


class BatchChoice:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._known: tuple[Chains, tuple[str, ...], list[tuple[str, tuple[str, ...]]]] | None = None

    def begin(self, now: float) -> bool:
        """Decides on a load, if one is wanted and can be had now."""
        fleet = self._fleet
        wanting = [s for s in self.wanting if now >= s.retry_at]
        if not wanting or fleet.claims:
            return False
        if any(
            s.phase in LEAVING or s.phase is Phase.LOADING
            for s in fleet.there.values()
            if s.model.movable
        ):
            return False
        quiet = {s.id for s in fleet.there.values() if self._is_quiet(s, now)}
        room = fleet.free_gb() + sum([fleet.there[name].memory_gb for name in quiet])
        wanting = [s for s in wanting if s.memory_gb <= room]
        if not wanting:
            return False
        state, victims = self._choose(wanting)
        if any(fleet.models[v].running or len(fleet.models[v].queue.batch) for v in victims):
            return False  # its batch calls end first
        view = view_of(fleet, now, lambda other: other.id in quiet)
        visit = (state.id, 0)
        view.demands[visit] = Demand(
            state.id,
            state.memory_gb,
            state.load.mean,
            state.unload.mean,
            math.inf,
            math.inf,
            0.0,
            0.0,
        )
        plan = evaluate(view, [visit], {visit: tuple(v for v in victims if v in quiet)})
        if plan is None or not plan.steps:
            return False
        for name in plan.steps[0].victims:
            fleet.close(fleet.models[name], math.inf)
        fleet.claim(state)
        return True

    def next_time(self, now: float) -> float:
        """When a resident that nobody uses has been quiet for long enough."""
        if not self.wanting:
            return math.inf
        times = [self._quiet_at(s) for s in self._fleet.there.values() if s.model.movable]
        return min((at for at in times if at > now), default=math.inf)

    @property
    def wanting(self) -> list[ModelState]:
        """Models to be loaded for batch calls, or for who was refused."""
        fleet = self._fleet
        batched = [s for s in fleet.batched.values() if s.phase is Phase.OFF]
        wished = [
            s for s in fleet.wished.values() if s.phase is Phase.OFF and s.id not in fleet.batched
        ]
        return [s for s in batched + wished if s.model.movable and not s.gone]

    def _quiet_at(self, state: ModelState) -> float:
        return state.last_asked + QUIET_SWAPS * state.swap_s

    def _is_quiet(self, state: ModelState, now: float) -> bool:
        return (
            state.phase is Phase.RESIDENT
            and state.model.movable
            and not state.running
            and not state.queue.order
            and not len(state.queue.batch)
            and now >= self._quiet_at(state)
        )

    def _choose(self, wanting: list[ModelState]) -> tuple[ModelState, tuple[str, ...]]:
        """The model to load and those to leave for it."""
        fleet = self._fleet
        movable = {s.id: s for s in fleet.models.values() if s.model.movable}
        known: Counter[tuple[str, ...]] = Counter()
        for chain, jobs in fleet.chains.items():
            if names := tuple(name for name in chain if name in movable):
                known[names] += jobs
        residents = tuple(
            s.id for s in fleet.there.values() if s.model.movable and s.phase is Phase.RESIDENT
        )
        key = tuple(sorted(known)), residents
        if self._known is None or self._known[:2] != key:
            costs = {s.id: ModelCost(s.load.mean, s.memory_gb) for s in movable.values()}
            steps = order(
                known,
                costs,
                fleet.memory_gb,
                residents,
                exact_states=EXACT_STATES,
                search_loads=SEARCH_LOADS,
            )
            self._known = (*key, [(step.load, step.evict) for step in steps])
        able = {s.id: s for s in wanting}
        for load, evict in self._known[2][:1]:
            if load in able:
                return able[load], evict
        return wanting[0], ()
