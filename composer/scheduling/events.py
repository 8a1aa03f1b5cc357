"""What can happen on a device, and what its policy may answer. Knows no policy, clock or server.

Times are seconds on one clock that never goes back; `now` comes with each event. A *model* is
what is loaded and unloaded as a whole: a server. Adapters within it are cheap to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Model:
    """A server as its device's policy sees it.

    `in_flight` calls run at once, using at most `adapters` distinct adapters (None: no limit);
    `queue` calls may wait before new ones are refused. `load_s` and `unload_s` are first
    estimates of a swap's two halves in seconds, `run_s` of one call: what is observed replaces
    them. A model that is not `movable` takes no memory and is never unloaded; where it is not
    resident (its server was not there, or has gone) it is loaded at once.
    """

    id: str
    in_flight: int
    queue: int
    adapters: int | None = None
    memory_gb: float = 0.0
    load_s: float = 0.0
    unload_s: float = 0.0
    run_s: float = 1.0
    movable: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """A call that wants a lease. `deadline` is when it must have one, None: whenever; `batch`
    calls give way to all others. `later` are models that the same request calls after this
    one. `adapter` is its digest, None the base model alone."""

    id: int
    model: str
    arrived: float
    adapter: str | None = None
    deadline: float | None = None
    batch: bool = False
    later: tuple[str, ...] = ()


# --- events --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Configured:
    """The device's models from now on, and its memory. Models that stay keep their state and
    queue; calls of those that left are refused (reason "gone"), and they are unloaded when
    their last call ends. `resident` are those of the models not known so far that are loaded
    already."""

    models: tuple[Model, ...]
    memory_gb: float
    resident: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrived:
    call: Waiting


@dataclass(frozen=True, slots=True)
class Left:
    """The caller of a waiting call is gone."""

    call: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A running call gave its lease back."""

    call: int


@dataclass(frozen=True, slots=True)
class Loaded:
    model: str


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """It holds no memory and may be tried again; until then its calls wait, up to their bounds."""

    model: str


@dataclass(frozen=True, slots=True)
class Unloaded:
    model: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A resident model's server stopped answering. Its running calls end by themselves."""

    model: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """The time that a `Wake` asked for has come (or is past)."""


Event = Configured | Arrived | Left | Finished | Loaded | LoadFailed | Unloaded | Lost | Ticked


# --- actions -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grant:
    """The call has its lease now."""

    call: int


RETRY_AFTER_S = (1.0, 600.0)
"""Bounds of the advice to a refused caller: below a second it would come back into the same
queue; above ten minutes the estimate says nothing any more."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The call gets none. `reason` is "full", "late" (its bound cannot or could not be met) or
    "gone" (its model left); `retry_after_s` is an estimate."""

    call: int
    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """Begin to load; answered by `Loaded` or `LoadFailed`."""

    model: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Begin to unload, calls still running there being cut; answered by `Unloaded`."""

    model: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Send `Ticked` at this time; now: when all that happens at this moment has been told, so that
    what belongs together is decided on together. The newest one replaces those before."""

    at: float


Action = Grant | Refuse | Load | Unload | Wake


class DevicePolicy(Protocol):
    """A pure function of state, event and time, the state being the object: it reads no clock,
    draws no random number and starts nothing, so the same events give the same actions, in the
    service and in simulation alike. `now` never goes back.
    """

    def on(self, event: Event, now: float) -> list[Action]:
        """What is to be done at once. Raises ValueError for an event that cannot be."""
        ...
