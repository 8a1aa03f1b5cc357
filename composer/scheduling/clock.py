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
        loop = asyncio.get_running_loop()

        def due() -> None:
            # A loop may ring a clock tick early; nobody is told of a time that is still to come.
            nonlocal handle
            if (left := at - self.now()) > 0:
                handle = loop.call_later(left, due)
            else:
                ring()

        handle = loop.call_later(max(at - self.now(), 0.0), due)

        class _Handle:
            def cancel(self) -> None:
                handle.cancel()

        return _Handle()
