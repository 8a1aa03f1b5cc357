"""The lease interface: the only thing between a strategy's `ask` and an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from composer.scheduling.events import Model
from composer.types import Call


@dataclass(frozen=True, slots=True)
class Lease:
    """Permission to run one call now. `queue_s` is how long it waited, in seconds."""

    id: int
    server: str
    expert: str
    queue_s: float


class Mover(Protocol):
    """Brings one server's weights onto its device and off it again. An engine is one."""

    async def start(self) -> None:
        """Ready to run calls when it returns; also brings back a server that has died. Raises
        EngineUnavailable."""
        ...

    async def stop(self) -> None:
        """Frees the device's memory; running calls end with EngineUnavailable."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """One server as the scheduler sees it. A server that stands alone is its own device.
    `there`: where it takes no turns on a device, whether it is ready now; else it is started."""

    device: str
    model: Model
    mover: Mover
    there: bool = True


class Scheduler(Protocol):
    """One owner of every device. Cancelling `acquire` leaves the queue at once."""

    async def acquire(self, call: Call) -> Lease:
        """Waits for room, at most until the call's bound. Raises Overloaded (with `retry_after`)
        when the queue is full or the bound cannot be met, and EngineUnavailable when the call's
        server is not known (any more)."""
        ...

    def release(self, lease: Lease, *, lost: bool = False) -> None:
        """Exactly once per lease, from any exit; `lost` where the call found its server gone.
        Raises ValueError for an unknown lease."""
        ...

    def configure(self, places: Mapping[str, Place], memory_gb: Mapping[str, float]) -> None:
        """Sets the servers, by id, and the memory of the devices. Running leases and queued
        calls are kept for servers that stay; queued calls of servers that left fail with
        EngineUnavailable."""
        ...

    def resident(self, server: str) -> bool:
        """Whether a call there would need no load first."""
        ...

    def now(self) -> float:
        """The clock of `Call.arrived`, in seconds."""
        ...

    def stats(self) -> Mapping[str, Any]:
        """Per server "running", "waiting", "in_flight" and "queue", for /health."""
        ...

    def snapshot(self, *, events: int = 0) -> Mapping[str, Any]:
        """Everything there is to see, as plain data, with so many of the newest events."""
        ...

    async def close(self) -> None:
        """Starts nothing any more, and waits for what moves. Safe to call twice."""
        ...
