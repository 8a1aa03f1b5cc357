"""Which models are on a device, since when, and what moving them has cost so far.

Follows the device's steps; decides nothing. Times are seconds on the scheduler's clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from composer.scheduling.events import (
    Action,
    Configured,
    Event,
    Load,
    Loaded,
    LoadFailed,
    Lost,
    Model,
    Unload,
    Unloaded,
)

KEPT_INTERVALS = 500
"""Of the timeline, the newest; at a swap a minute some two hours."""

State = Literal["loading", "resident", "unloading"]
Move = Literal["load", "failed_load", "unload"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A model in one state. `until` None: still."""

    model: str
    state: State
    since: float
    until: float | None = None


@dataclass(slots=True)
class Moved:
    """Moves of one kind of one model, and their seconds."""

    count: int = 0
    seconds: float = 0.0


class Residency:
    """What stands, moves and has moved on one device."""

    def __init__(self) -> None:
        self.memory_gb = 0.0
        self.losses: dict[str, int] = {}
        self.moved: dict[tuple[str, Move], Moved] = {}
        self._models: dict[str, Model] = {}
        self._now: dict[str, tuple[State, float]] = {}
        self._past: deque[Interval] = deque(maxlen=KEPT_INTERVALS)

    def state(self, model: str) -> State | None:
        """None: it is not on the device."""
        entry = self._now.get(model)
        return None if entry is None else entry[0]

    def capacity(self) -> int:
        """How many of the device's movable models fit on it at once, the smallest first."""
        sizes = sorted(model.memory_gb for model in self._models.values() if model.movable)
        return sum(total <= self.memory_gb for total in accumulate(sizes))

    def event(self, event: Event, now: float) -> None:
        match event:
            case Configured():
                self._configured(event, now)
            case Loaded(model):
                self._moved(model, "load", now)
                self._enter(model, "resident", now)
            case LoadFailed(model):
                self._moved(model, "failed_load", now)
                self._leave(model, now)
            case Unloaded(model):
                self._moved(model, "unload", now)
                self._leave(model, now)
            case Lost(model):
                self.losses[model] = self.losses.get(model, 0) + 1
                self._leave(model, now)
            case _:
                pass

    def action(self, action: Action, now: float) -> None:
        match action:
            case Load(model):
                self._enter(model, "loading", now)
            case Unload(model):
                self._enter(model, "unloading", now)
            case _:
                pass

    def intervals(self) -> Iterator[Interval]:
        """The timeline, oldest first; what still goes on comes last."""
        yield from self._past
        for model, (state, since) in sorted(self._now.items(), key=lambda item: item[1][1]):
            yield Interval(model, state, since)

    def used_gb(self) -> float:
        """Memory of what is on the device or moves, in GB."""
        return sum(self._models[model].memory_gb for model in self._now)

    def _configured(self, event: Configured, now: float) -> None:
        self.memory_gb = event.memory_gb
        ids = {model.id for model in event.models}
        for model in [m for m in self._now if m not in ids and not self._models[m].movable]:
            self._leave(model, now)
        gone = [m for m in self._models if m not in ids and m not in self._now]
        for model in gone:
            del self._models[model]
        for new in event.models:
            if new.id not in self._models and new.id in event.resident:
                self._enter(new.id, "resident", now)
            self._models[new.id] = new

    def _enter(self, model: str, state: State, now: float) -> None:
        self._leave(model, now)
        self._now[model] = (state, now)

    def _leave(self, model: str, now: float) -> None:
        entry = self._now.pop(model, None)
        if entry is not None:
            self._past.append(Interval(model, *entry, until=now))

    def _moved(self, model: str, move: Move, now: float) -> None:
        entry = self._now.get(model)
        if entry is None or entry[0] == "resident":
            return  # nobody began it: the policy will have refused the event
        moved = self.moved.setdefault((model, move), Moved())
        moved.count += 1
        moved.seconds += now - entry[1]
