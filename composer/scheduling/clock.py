"""The scheduler's clock and its alarms. Knows nothing of what they are for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Alarm(Protocol):
    def cancel(self) -> None:
        """Safe to call after it rang."""
        ...


class Clock(Protocol):
    def now(self) -> float:
        """Seconds; never goes back."""
        ...

    def call_at(self, at: float, ring: Callable[[], None]) -> Alarm:
        """Rings once, at that time or (where it has passed) as soon as can be, from the event
        loop and never from inside this call."""
        ...


class LoopClock:
    """The machine's monotonic clock, with alarms of the running event loop."""

    def now(self) -> float:
        return time.monotonic()

    def call_at(self, at: float, ring: Callable[[], None]) -> Alarm:
        return _LoopAlarm(at, ring)


class _LoopAlarm:
    def __init__(self, at: float, ring: Callable[[], None]) -> None:
        self._at, self._ring = at, ring
        self._loop = asyncio.get_running_loop()
        self._handle = self._wait()

    def cancel(self) -> None:
        self._handle.cancel()

    def _wait(self) -> asyncio.TimerHandle:
        return self._loop.call_later(max(self._at - time.monotonic(), 0.0), self._due)

    def _due(self) -> None:
        # A loop may ring a clock tick early; nobody is told of a time that is still to come.
        if time.monotonic() < self._at:
            self._handle = self._wait()
        else:
            self._ring()
