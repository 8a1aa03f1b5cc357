"""The scheduler: one owner per device, and which server stands where.

Knows calls and leases; what is decided is the policies', what is done the owners'.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from composer.errors import EngineUnavailable
from composer.scheduling.base import Lease, Place
from composer.scheduling.clock import Clock, LoopClock
from composer.scheduling.device import DeviceOwner
from composer.scheduling.events import DevicePolicy, Waiting
from composer.scheduling.log import EventLog, plain
from composer.scheduling.snapshot import device_snapshot
from composer.types import Call, empty


class DeviceScheduler:
    """`Scheduler` over the devices of one process."""

    def __init__(
        self,
        make_policy: Callable[[], DevicePolicy],
        *,
        log: Path | None = None,
        header: Mapping[str, Any] = empty(),
        clock: Clock | None = None,
    ) -> None:
        """`make_policy` makes one for each device. `log` is the event log's file, `header` what
        goes into its first line (the policy's settings). Raises SettingsError for a file that
        cannot be opened."""
        self.events = EventLog(log, header)
        self._make_policy = make_policy
        self._clock: Clock = clock or LoopClock()
        self._owners: dict[str, DeviceOwner] = {}
        self._where: dict[str, DeviceOwner] = {}
        self._out: dict[int, tuple[Lease, DeviceOwner]] = {}
        self._call_numbers = count(1)
        self._owner_numbers = count(1)
        self._closed = False

    async def acquire(self, call: Call) -> Lease:
        now = self._clock.now()
        arrived = now if call.arrived is None else call.arrived
        while True:
            owner = self._where.get(call.server)
            if owner is None:
                raise EngineUnavailable(f"server {call.server!r} is not served (any more)")
            waiting = Waiting(
                id=next(self._call_numbers),
                model=call.server,
                arrived=arrived,
                adapter=None if call.adapter is None else call.adapter.digest,
                deadline=None if call.max_wait_s is None else arrived + call.max_wait_s,
                batch=call.priority == "batch",
                later=call.later,
            )
            try:
                lease = await owner.acquire(waiting, call.expert)
            except EngineUnavailable:
                # It may have moved to another device meanwhile; then its calls move with it.
                if self._closed or self._where.get(call.server) in (owner, None):
                    raise
                continue
            self._out[lease.id] = (lease, owner)
            return lease

    def release(self, lease: Lease, *, lost: bool = False) -> None:
        held = self._out.get(lease.id)
        if held is None or held[0] != lease:
            raise ValueError(f"lease {lease.id} is not out: unknown, or released before")
        del self._out[lease.id]
        held[1].release(lease.id, lost=lost)

    def configure(self, places: Mapping[str, Place], memory_gb: Mapping[str, float]) -> None:
        by_device: dict[str, dict[str, Place]] = defaultdict(dict)
        for server, place in places.items():
            if place.model.id != server:
                raise ValueError(f"place {server!r} is of a model {place.model.id!r}")
            by_device[place.device][server] = place
        for device in by_device.keys() - self._owners.keys():
            self._owners[device] = DeviceOwner(
                *(device, next(self._owner_numbers), self._make_policy()),
                *(self._clock, self.events),
            )
        # First where everybody is now, so that calls that lose their place find the new one.
        self._where = {server: self._owners[place.device] for server, place in places.items()}
        for device, owner in self._owners.items():
            owner.configure(by_device.get(device, {}), memory_gb.get(device, 0.0))
        self._drop_idle()

    def resident(self, server: str) -> bool:
        owner = self._where.get(server)
        return owner is not None and owner.resident(server)

    def now(self) -> float:
        return self._clock.now()

    def stats(self) -> Mapping[str, Any]:
        return {k: v for owner in self._owners.values() for k, v in owner.loads().items()}

    def snapshot(self, *, events: int = 0) -> dict[str, Any]:
        now = self.now()
        return {
            "now": now,
            "servers": self.stats(),
            "devices": {
                device: device_snapshot(owner, now) for device, owner in self.owners.items()
            },
            "log": self.events.stats(),
            "events": [plain(step) for step in self.events.last(events)],
        }

    @property
    def owners(self) -> Mapping[str, DeviceOwner]:
        """By device, with those that are being drained."""
        self._drop_idle()
        return self._owners

    async def close(self) -> None:
        self._closed = True
        await asyncio.gather(*(owner.close() for owner in self._owners.values()))
        await asyncio.to_thread(self.events.close)

    def _drop_idle(self) -> None:
        for device in [d for d, owner in self._owners.items() if owner.idle]:
            del self._owners[device]
