"""The scheduler's clock and its alarms. Knows nothing of what they are for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

MOMENT_TURNS = 8
"""Turns of the event loop that a moment lasts. What belongs together takes a few of them: the
members of a vote are asked in one; a call that ends and settles a vote is noticed one turn later,
its strategy wakes in the second, and the calls it cancels leave in the third or fourth. Counted in
turns, since these grow with the load; on an idle machine it is a tenth of a millisecond."""


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


class MomentsEnd:
    """Rings when what is happening now has happened: after so many turns of the running loop."""

    def __init__(self, ring: Callable[[], None], turns: int = MOMENT_TURNS) -> None:
        self._ring, self._left = ring, turns
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_soon(self._turn)

    def cancel(self) -> None:
        self._handle.cancel()

    def _turn(self) -> None:
        self._left -= 1
        if self._left:
            self._handle = self._loop.call_soon(self._turn)
        else:
            self._ring()


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
