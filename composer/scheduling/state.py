"""What a swap policy knows of one model: where it is, who waits, who runs, what is learnt.
Decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from composer.scheduling.estimates import Duration, Rate
from composer.scheduling.events import Model, Waiting
from composer.scheduling.queues import Queue, Running, Service, end_of, free_slots, serve


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """The knobs of `SwapPolicy`. Times are in seconds.

    `patience`: the share of a call's bound that may pass before models that nobody uses leave for
    its sake; models that still run calls leave at the geometric mean of that time and the bound.
    1: as late as is safe, fewest swaps; towards 0: less waiting, more swaps.
    `lazy_share`: a swap is no longer put off, unless it is for others' sake, once the calls that
    wait for it need more than this share of their bound on all its slots: idling now would make
    calls be refused later.
    `drain_s`: a leaving model's calls may run on for so long, and longer while nobody is late for
    it, before they are cut.
    `margin`: durations are planned with at their mean plus so many spreads.
    `learn`: False keeps the models' own figures, taken as upper bounds; under them no admitted
    call is ever late.
    `unbounded_wait_s`: what a call without a bound is taken to be content with.
    `adapter_patience`: the share of its bound for which a call may be overtaken by calls whose
    adapter is in use.
    `preload`: what is likely to be asked for next is loaded into free memory while nothing else
    is to be done (preload.py).
    `rate_horizon_s`: how far back arrivals tell how often a model is asked for.
    `retry_s`, `retry_most_s`: wait after a first failed load, doubled with each further one.
    """

    patience: float = 1.0
    lazy_share: float = 0.1
    drain_s: float = 30.0
    margin: float = 2.0
    learn: bool = True
    unbounded_wait_s: float = 60.0
    adapter_patience: float = 0.5
    preload: bool = False
    rate_horizon_s: float = 600.0
    retry_s: float = 1.0
    retry_most_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.patience <= 1:
            raise ValueError("patience must be in (0, 1]")
        if not 0 <= self.adapter_patience <= 1:
            raise ValueError("adapter_patience must be in [0, 1]")


MOVE_DOUBT, RUN_DOUBT = 0.1, 1.0
"""Spreads of a configured duration, as shares of it: swaps last much the same each time, and calls
are about as unlike as if their ends came at random."""

RUN_MEMORY = 32
"""Calls that the mean running time stands for."""


class Phase(Enum):
    OFF = "off"
    LOADING = "loading"
    RESIDENT = "resident"
    CLOSING = "closing"  # serves the calls of its visit, and is unloaded then
    DRAINING = "draining"  # lets its running calls end, for a while
    UNLOADING = "unloading"


@dataclass(eq=False, slots=True)
class Granted:
    """A running call."""

    call: Waiting
    since: float


@dataclass(eq=False, slots=True)
class ModelState:
    """One model. `moved` is when its present load or unload began; `leave_by` when a leaving
    one had better be gone, and `drain_by` when it is unloaded though calls run; `retry_at` when a
    failed load may be tried again. `claimed`: a load of it is decided on. `gone`: it is no longer
    configured, and forgotten when it is off and idle. `wanted_by` counts the calls, waiting or
    running, whose requests will call this model later. `bound_s` is the mean bound of its
    calls, `last_asked` when the last interactive one came."""

    model: Model
    settings: PolicySettings
    load: Duration
    unload: Duration
    run: Duration
    rate: Rate
    phase: Phase = Phase.OFF
    queue: Queue = field(default_factory=Queue)
    running: dict[int, Granted] = field(default_factory=dict)
    adapters: Counter[str] = field(default_factory=Counter)
    moved: float = 0.0
    leave_by: float = math.inf
    drain_by: float = math.inf
    retry_at: float = -math.inf
    failures: int = 0
    claimed: bool = False
    gone: bool = False
    lost: bool = False
    wanted_by: int = 0
    bound_s: float = 0.0
    last_asked: float = -math.inf
    _promise: float | None = None
    _granted: int = 0

    @classmethod
    def of(cls, model: Model, settings: PolicySettings, now: float) -> ModelState:
        state = cls(
            model,
            settings,
            Duration(0.0),
            Duration(0.0),
            Duration(0.0),
            Rate(now, settings.rate_horizon_s),
        )
        state._believe(model, None)
        return state

    def _believe(self, model: Model, before: Model | None) -> None:
        """Takes the configured figures, where they are new, in place of what was learnt."""
        move, run = (MOVE_DOUBT, RUN_DOUBT) if self.settings.learn else (0.0, 0.0)
        if before is None or model.load_s != before.load_s:
            self.load = Duration(model.load_s, move)
        if before is None or model.unload_s != before.unload_s:
            self.unload = Duration(model.unload_s, move)
        if before is None or model.run_s != before.run_s:
            self.run = Duration(model.run_s, run, RUN_MEMORY)

    @property
    def id(self) -> str:
        return self.model.id

    @property
    def memory_gb(self) -> float:
        return self.model.memory_gb if self.model.movable else 0.0

    @property
    def grouped(self) -> bool:
        """Whether its calls have to be grouped by adapter."""
        return self.model.adapters is not None

    @property
    def away(self) -> bool:
        """Whether its present visit is one that is still to begin."""
        return self.phase in (Phase.OFF, Phase.DRAINING, Phase.UNLOADING)

    @property
    def run_s(self) -> float:
        """A running time that is seldom exceeded."""
        return self.run.high(self.settings.margin)

    @property
    def service(self) -> Service:
        mean = self.run.mean
        return Service(self.model.in_flight, self.model.adapters, mean, self.run_s - mean)

    @property
    def swap_s(self) -> float:
        """What it costs to have it leave and come back."""
        return self.load.mean + self.unload.mean

    def asked_for(self, now: float, bound: float) -> None:
        """An interactive call has come."""
        self.rate.observe(now)
        self.last_asked = now
        self.bound_s += (bound - self.bound_s) / (8 if self.bound_s else 1)

    def until(self, granted: Granted, now: float) -> float:
        """When a running call will have ended; one that is over time gets a little more."""
        due = granted.since + self.run_s
        return due if due > now else now + max(self.run.spread, self.run.mean / 8)

    def held(self, now: float) -> list[Running]:
        return [Running(self.until(g, now), g.call.adapter) for g in self.running.values()]

    def free_slots(self, now: float) -> list[float]:
        return free_slots(self.held(now), self.model.in_flight, now)

    def present(self, now: float) -> tuple[float, float]:
        """The slack of the present visit's calls, and when the last of them will have ended.

        The slack is worked out anew only now and then: it does not shrink while calls end no later
        than estimated, and estimates change slowly.
        """
        queue = self.queue
        if self.grouped:
            outlook = serve(queue.current, self.service, self.held(now), now)
            return outlook.slack, outlook.done
        service, free = self.service, self.free_slots(now)
        if not queue.now_on:
            return math.inf, free[-1]
        if self._promise is None or self._promise < 0 or 4 * self._granted > queue.now_on:
            self._promise, self._granted = (
                serve(queue.current, service, self.held(now), now).slack,
                0,
            )
        return self._promise, end_of(queue.now_on, free, service)

    def gone_at(self, now: float) -> float:
        """When a leaving model's memory will be free."""
        if self.phase is Phase.UNLOADING:
            return max(now, self.moved + self.unload.mean)
        if self.phase is Phase.CLOSING:
            return self.present(now)[1] + self.unload.mean
        ends = max([call.until for call in self.held(now)], default=now)
        return max(now, min(ends, self.drain_by)) + self.unload.mean

    def promise(self, slack: float) -> None:
        """A call with this slack has joined the end of the present visit."""
        if self._promise is not None:
            self._promise = min(self._promise, slack)

    def unsettle(self) -> None:
        """The order of the present visit has changed."""
        self._promise = None

    def reconfigure(self, model: Model) -> None:
        """Takes new figures; what was learnt stays where the configured figure is the same."""
        self._believe(model, self.model)
        self.model = model

    def usage(self, now: float) -> float:
        """The share of its slots that its arrivals keep busy."""
        return self.rate.at(now) * self.run.mean / self.model.in_flight

    def regret(self, now: float) -> float:
        """What its leaving is expected to cost, in swap seconds a second: its swap, over the time
        until the next call for it comes and has to be served."""
        if self.queue.order or len(self.queue.batch) or self.wanted_by:
            until = self.bound_s
        else:
            rate = self.rate.at(now)
            until = (1 / rate if rate > 0 else math.inf) + self.bound_s
        return self.swap_s / max(until, 1e-3)

    def has_room_for(self, adapter: str | None) -> bool:
        """Whether a call may be granted as far as its adapter is concerned."""
        limit = self.model.adapters
        return (
            adapter is None
            or limit is None
            or adapter in self.adapters
            or len(self.adapters) < limit
        )

    def grant(self, call: Waiting, now: float) -> None:
        self.running[call.id] = Granted(call, now)
        self._granted += 1
        if call.adapter is not None:
            self.adapters[call.adapter] += 1

    def end(self, number: int) -> Granted:
        granted = self.running.pop(number)
        adapter = granted.call.adapter
        if adapter is not None:
            self.adapters[adapter] -= 1
            if not self.adapters[adapter]:
                del self.adapters[adapter]
        return granted
