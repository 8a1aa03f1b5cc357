"""What an idle device loads before anybody asks. Evicts nothing; knows no plan.

Why no admitted call is ever late for it: the load is begun only while no model is waited for
that is not there, into memory that is promised to nobody. From then on it is a load under way like
any other, and plans made to admit a call count the rest of it and its leaving in full (a holder
that can leave once it is loaded, planning.py). The price is that of a wrong guess: who asks for
another model that does not fit beside it waits for both.
"""

from __future__ import annotations

from composer.scheduling.fleet import LEAVING, Fleet
from composer.scheduling.plan import ROUNDING_GB
from composer.scheduling.state import ModelState, Phase


def next_to_load(fleet: Fleet, now: float) -> ModelState | None:
    """The model most asked for lately, or else the one configured first, of those that fit into
    free memory; None while anything moves or is to be moved. One whose last load failed waits
    until it is asked for."""
    busy = (Phase.LOADING, *LEAVING)
    if fleet.claims or any([s.phase in busy and s.model.movable for s in fleet.there.values()]):
        return None
    waited_for = (*fleet.asked.values(), *fleet.batched.values(), *fleet.wished.values())
    if any([s.model.movable and s.phase is not Phase.RESIDENT for s in waited_for]):
        return None
    free = fleet.free_gb() + ROUNDING_GB
    away = [s for s in fleet.models.values() if s.model.movable and s.phase is Phase.OFF]
    able = [
        s
        for s in away
        if s.memory_gb <= free
        and not s.gone
        and not s.failures
        and not any([_shuts_out(s, other, free, now) for other in away])
    ]
    return max(able, key=lambda s: s.rate.at(now), default=None)


def _shuts_out(state: ModelState, other: ModelState, free: float, now: float) -> bool:
    """Whether a call for the other model, bounded as those of late, would be refused for it."""
    return (
        other is not state
        and other.rate.at(now) > 0
        and other.memory_gb > free - state.memory_gb
        and state.load.mean + state.unload.mean + other.load.mean > other.bound_s
    )
