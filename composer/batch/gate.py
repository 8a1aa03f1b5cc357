"""A scheduler before the scheduler, for the calls of batches. Knows no lines and no plans.

A batch has far more calls than a server's queue has places, and interactive callers need those.
So few calls at a time are handed on to be queued, the next when one has its lease; calls of one
adapter are handed on together. What is refused for want of room is asked again: a batch has time.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from composer.engines.base import Capacity
from composer.errors import Overloaded
from composer.scheduling.base import Lease, Place, Scheduler
from composer.types import Call

RETRY_S = (0.05, 60.0)
"""Bounds of the pause before a call that was refused is handed on again, in seconds."""


@dataclass(eq=False, slots=True)
class _Server:
    """Calls of one server. `asking` are handed on and have no lease yet; `ended` is set, and
    replaced, when a lease was given back."""

    asking: int = 0
    waiting: dict[str, deque[asyncio.Future[None]]] = field(default_factory=dict)
    adapter: str = ""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def pop(self) -> asyncio.Future[None] | None:
        """Whose turn it is: the adapter of the one before, while it has calls."""
        while self.waiting:
            if self.adapter not in self.waiting:
                self.adapter = next(iter(self.waiting))
            queue = self.waiting[self.adapter]
            while queue:
                turn = queue.popleft()
                if not turn.done():
                    return turn
            del self.waiting[self.adapter]
        return None


class Gate:
    """`capacity` tells a server's; `came` is called with each call before it waits, and may raise;
    `ended` with each that gave its lease back. A lease's `queue_s` counts from when the call came.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        capacity: Callable[[str], Capacity],
        ended: Callable[[Call], None] = lambda call: None,
        came: Callable[[Call], None] = lambda call: None,
    ) -> None:
        self._scheduler = scheduler
        self._capacity = capacity
        self._ended = ended
        self._came = came
        self._servers: dict[str, _Server] = {}
        self._out: dict[int, tuple[Lease, Call]] = {}
        self._in: dict[int, Call] = {}  # those that wait, by `id`

    @property
    def waiting(self) -> list[Call]:
        """Calls that have come and have no lease yet."""
        return list(self._in.values())

    @property
    def running(self) -> list[Call]:
        """Calls whose lease is out."""
        return [call for _, call in self._out.values()]

    async def acquire(self, call: Call) -> Lease:
        """As the scheduler's, but where there is no room it waits until there is."""
        arrived = self.now()
        server = self._servers.setdefault(call.server, _Server())
        self._came(call)
        self._in[id(call)] = call
        try:
            await self._turn(server, call)
            try:
                lease = await self._lease(server, call)
            finally:
                server.asking -= 1
                self._hand_on(call.server, server)
        finally:
            del self._in[id(call)]
        self._out[lease.id] = lease, call
        return dataclasses.replace(lease, queue_s=self.now() - arrived)

    def release(self, lease: Lease, *, lost: bool = False) -> None:
        if lease.id not in self._out:
            raise ValueError(f"lease {lease.id} is not out: unknown, or released before")
        granted, call = self._out.pop(lease.id)
        self._scheduler.release(granted, lost=lost)
        server = self._servers[call.server]
        server.ended.set()
        server.ended = asyncio.Event()
        self._ended(call)

    async def _turn(self, server: _Server, call: Call) -> None:
        """Returns with the call counted as `asking`."""
        adapter = "" if call.adapter is None else call.adapter.digest
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        server.waiting.setdefault(adapter, deque()).append(turn)
        self._hand_on(call.server, server)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn came in that very step
                server.asking -= 1
                self._hand_on(call.server, server)
            raise

    def _hand_on(self, name: str, server: _Server) -> None:
        while server.asking < self._most_asking(name):
            turn = server.pop()
            if turn is None:
                return
            server.asking += 1
            turn.set_result(None)

    def _most_asking(self, name: str) -> int:
        """Enough that some still wait there when as many as it runs have been granted at once: a
        server without waiting calls may be unloaded. At most half of the queue."""
        capacity = self._capacity(name)
        return max(1, min(2 * capacity.in_flight, capacity.queue // 2))

    async def _lease(self, server: _Server, call: Call) -> Lease:
        while True:
            try:
                return await self._scheduler.acquire(call)
            except Overloaded as error:
                ended = server.ended  # taken before the pause, so that no end is missed
                least, most = RETRY_S
                await asyncio.sleep(least)
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(error.retry_after, most)):
                        await ended.wait()

    # --- the scheduler's own -------------------------------------------------------------

    def configure(self, places: Mapping[str, Place], memory_gb: Mapping[str, float]) -> None:
        self._scheduler.configure(places, memory_gb)

    def resident(self, server: str) -> bool:
        return self._scheduler.resident(server)

    def now(self) -> float:
        return self._scheduler.now()

    def stats(self) -> Mapping[str, Any]:
        return self._scheduler.stats()

    def snapshot(self, *, events: int = 0) -> Mapping[str, Any]:
        return self._scheduler.snapshot(events=events)

    async def close(self) -> None:
        """Closes nothing: the scheduler is somebody else's."""
