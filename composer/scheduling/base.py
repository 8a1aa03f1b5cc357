"""The lease interface: the only thing between a strategy's `ask` and an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypedDict

from composer.types import Call


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one server: calls running at once, and calls waiting before new ones are refused."""

    in_flight: int
    queue: int

    def __post_init__(self) -> None:
        if self.in_flight < 1 or self.queue < 0:
            raise ValueError(
                f"in_flight must be at least 1 and queue at least 0, not {self.in_flight} "
                f"and {self.queue}"
            )


@dataclass(frozen=True, slots=True)
class Lease:
    """Permission to run one call now. `queue_s` is how long it waited, in seconds."""

    id: int
    server: str
    expert: str
    queue_s: float


class ServerLoad(TypedDict):
    """Calls of one server at this moment, beside its limits."""

    running: int
    waiting: int
    in_flight: int
    queue: int


class Scheduler(Protocol):
    """One owner of every server's capacity. Cancelling `acquire` leaves the queue at once."""

    async def acquire(self, call: Call) -> Lease:
        """Waits for room. Raises Overloaded (with `retry_after`) when the queue is full and
        EngineUnavailable when the call's server is not known (any more)."""
        ...

    def release(self, lease: Lease) -> None:
        """Exactly once per lease, from any exit. Raises ValueError for an unknown lease."""
        ...

    def configure(self, servers: Mapping[str, Limits]) -> None:
        """Sets the servers and their limits; running leases and queued calls are kept for
        servers that stay, queued calls of servers that left fail with EngineUnavailable."""
        ...

    def stats(self) -> Mapping[str, ServerLoad]:
        """A snapshot per configured server, for /health and metrics."""
        ...
