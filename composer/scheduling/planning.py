"""From a device's books to a `View` for plans. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable

from composer.scheduling.fleet import Fleet
from composer.scheduling.plan import Demand, Holder, View
from composer.scheduling.queues import Outlook, serve
from composer.scheduling.state import ModelState, Phase

MOST_USAGE = 0.9
"""Share of its slots up to which a model's own arrivals are taken to prolong a visit."""


def view_of(
    fleet: Fleet, now: float, may_leave: Callable[[ModelState], bool] | None = None
) -> View:
    """The device as plans see it. `may_leave`: which of the residents may be told to."""
    view = View(now, fleet.free_gb(), [], {}, [], {}, margin=fleet.settings.margin)
    for state in fleet.there.values():
        match state.phase:
            case Phase.RESIDENT:
                slack, done = state.present(now)
                _held(view, state, slack, done, may_leave)
            case Phase.LOADING:
                ready = max(now, state.moved + state.load.mean)
                outlook = state.queue.fresh(state.service)
                _held(view, state, outlook.slack - ready, ready + outlook.done, may_leave)
            case _:
                if state.phase is Phase.CLOSING:
                    view.slack = min(view.slack, state.present(now)[0])
                view.leaving.append((state.gone_at(now), state.memory_gb))
    for state in fleet.asked.values():
        queue = state.queue
        if not state.model.movable:
            if state.phase is Phase.OFF:  # lost, and to be tried again
                ready = max(now, state.retry_at) + state.load.mean
                view.slack = min(view.slack, queue.fresh(state.service).slack - ready)
            continue
        if state.away and queue.now_on and not state.claimed:
            view.demands[state.id, 0] = demand_of(state, queue.fresh(state.service), now)
        if queue.now_on < len(queue.order) and (state.away or not state.claimed):
            view.demands[state.id, 1] = demand_of(state, serve(queue.later, state.service), now)
    for state in fleet.claims:
        # One that is still there is to come back for the calls of a later visit.
        queue, service = state.queue, state.service
        outlook = queue.fresh(service) if state.away else serve(queue.later, service)
        view.claims.append(demand_of(state, outlook, now))
    return view


def _held(
    view: View,
    state: ModelState,
    slack: float,
    done: float,
    may_leave: Callable[[ModelState], bool] | None,
) -> None:
    view.slack = min(view.slack, slack)
    if state.model.movable and (may_leave is None or may_leave(state)):
        variance = state.unload.spread**2 + (state.run.spread**2 if state.running else 0.0)
        view.holders[state.id] = Holder(
            state.id, state.memory_gb, state.unload.mean, done, state.regret(view.now), variance
        )


def demand_of(state: ModelState, outlook: Outlook, now: float) -> Demand:
    usage = min(state.usage(now), MOST_USAGE)
    return Demand(
        state.id,
        state.memory_gb,
        state.load.mean,
        state.unload.mean,
        outlook.slack,
        outlook.target_slack,
        outlook.done,
        state.regret(now),
        usage / (1 - usage),
        state.load.spread**2 + state.unload.spread**2 + state.run.spread**2,
        state.retry_at,
    )
