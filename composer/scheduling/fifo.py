"""First come, first served, per server: the simplest scheduler that is right.

Knows nothing about adapters, swaps or priorities; every call of a server is alike to it.
Used from one event loop only, so plain fields need no lock.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from composer.errors import EngineUnavailable, Overloaded
from composer.scheduling.base import Lease, Limits, ServerLoad
from composer.types import Call

PACE = 0.1
"""Weight of the newest lease in the moving average of lease times."""

RETRY_AFTER_S = (1.0, 60.0)
"""Bounds of the advice to a refused caller: below a second it would come back into the same
queue, above a minute the estimate says nothing any more."""


@dataclass(eq=False, slots=True)
class _Waiter:
    call: Call
    arrived: float
    granted: asyncio.Future[Lease]


@dataclass(eq=False, slots=True)
class _Line:
    """One server's queue. `limits` None: the server left, and its last leases are still out.

    Invariant between any two steps of the event loop: where a place is free, nobody waits.
    """

    limits: Limits | None
    running: int = 0
    waiting: OrderedDict[int, _Waiter] = field(default_factory=OrderedDict)
    mean_lease_s: float | None = None

    def observe(self, lease_s: float) -> None:
        if self.mean_lease_s is None:
            self.mean_lease_s = lease_s
        else:
            self.mean_lease_s += PACE * (lease_s - self.mean_lease_s)

    def retry_after(self, in_flight: int) -> float:
        """Seconds until all who wait now have had a place, at the recent pace."""
        low, high = RETRY_AFTER_S
        mean = self.mean_lease_s if self.mean_lease_s is not None else low
        return min(max(mean * (len(self.waiting) + 1) / in_flight, low), high)

    def drop_cancelled(self) -> None:
        """A cancelled `acquire` runs its own clean-up one loop step later; this is for now."""
        for number in [n for n, w in self.waiting.items() if w.granted.done()]:
            del self.waiting[number]


class FifoScheduler:
    """A bounded queue per server. `clock` gives seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._leases: dict[int, tuple[Lease, float]] = {}
        self._numbers = itertools.count(1)

    async def acquire(self, call: Call) -> Lease:
        line = self._lines.get(call.server)
        if line is None or line.limits is None:
            raise EngineUnavailable(f"server {call.server!r} is not served (any more)")
        waiter = _Waiter(call, self._clock(), asyncio.get_running_loop().create_future())
        if line.running < line.limits.in_flight:
            return self._grant(line, waiter)
        if len(line.waiting) >= line.limits.queue:
            line.drop_cancelled()
        if len(line.waiting) >= line.limits.queue:
            raise Overloaded(
                f"server {call.server!r} is full: {line.running} calls run and "
                f"{len(line.waiting)} wait",
                retry_after=line.retry_after(line.limits.in_flight),
            )
        number = next(self._numbers)
        line.waiting[number] = waiter
        try:
            return await waiter.granted
        except BaseException:  # cancelled, its coroutine closed, or the server taken away
            line.waiting.pop(number, None)
            granted = waiter.granted
            # The lease may have been given in the very step in which the caller was cancelled.
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.release(granted.result())
            raise

    def release(self, lease: Lease) -> None:
        held = self._leases.get(lease.id)
        if held is None or held[0] != lease:
            raise ValueError(f"lease {lease.id} is not out: unknown, or released before")
        del self._leases[lease.id]
        line = self._lines[lease.server]
        line.running -= 1
        line.observe(self._clock() - held[1])
        self._wake(lease.server, line)

    def configure(self, servers: Mapping[str, Limits]) -> None:
        for server, limits in servers.items():
            line = self._lines.setdefault(server, _Line(limits))
            line.limits = limits
            self._wake(server, line)
        for server in [s for s in self._lines if s not in servers]:
            line = self._lines[server]
            line.limits = None
            while line.waiting:
                _, waiter = line.waiting.popitem(last=False)
                if not waiter.granted.done():
                    waiter.granted.set_exception(
                        EngineUnavailable(f"server {server!r} was taken out of service")
                    )
            self._wake(server, line)

    def stats(self) -> Mapping[str, ServerLoad]:
        return {
            server: ServerLoad(
                running=line.running,
                waiting=sum(not w.granted.done() for w in line.waiting.values()),
                in_flight=line.limits.in_flight,
                queue=line.limits.queue,
            )
            for server, line in self._lines.items()
            if line.limits is not None
        }

    def _grant(self, line: _Line, waiter: _Waiter) -> Lease:
        now = self._clock()
        call = waiter.call
        lease = Lease(next(self._numbers), call.server, call.expert, now - waiter.arrived)
        self._leases[lease.id] = (lease, now)
        line.running += 1
        return lease

    def _wake(self, server: str, line: _Line) -> None:
        """Gives free places to those who wait longest; forgets a server that left for good."""
        if line.limits is None:
            if line.running == 0:
                del self._lines[server]
            return
        while line.waiting and line.running < line.limits.in_flight:
            _, waiter = line.waiting.popitem(last=False)
            if not waiter.granted.done():
                waiter.granted.set_result(self._grant(line, waiter))
