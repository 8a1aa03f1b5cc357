"""How long calls wait on a device, what is refused, and for whom: over a sliding window.

Decides nothing. Times are seconds on the scheduler's clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np

from composer.types import Priority

WINDOW_S = 600.0
WINDOW_CALLS = 5_000
"""Waits are told of the last calls that got a lease: at most so old, and at most so many."""

RECENT_CALLS = 512
"""Of the traffic, the newest calls: what its routing consistency is told of."""

BUCKETS_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds of the histogram of waits: from no wait at all to several swaps."""


class Waits:
    """The waits of one priority: a window for percentiles, a histogram for ever."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW_CALLS)
        self._counts = [0] * (len(BUCKETS_S) + 1)

    def add(self, now: float, waited_s: float) -> None:
        self._window.append((now, waited_s))
        self._counts[bisect_left(BUCKETS_S, waited_s)] += 1
        self.total_s += waited_s

    def percentiles(self, now: float) -> dict[str, float]:
        """Of the window; only `calls` where it is empty."""
        window = self._window
        while window and window[0][0] < now - WINDOW_S:
            window.popleft()
        if not window:
            return {"calls": 0}
        waits = np.array([waited for _, waited in window])
        p50, p95, p99 = np.percentile(waits, (50, 95, 99)).tolist()
        return {"calls": len(window), "p50": p50, "p95": p95, "p99": p99, "max": waits.max().item()}

    def histogram(self) -> list[tuple[float | None, int]]:
        """(upper bound, calls that waited at most so long); the last has no bound."""
        return list(zip((*BUCKETS_S, None), accumulate(self._counts), strict=True))


class CallStats:
    """What became of a device's calls. `recent` are the models that the newest asked for."""

    def __init__(self) -> None:
        self.waits: dict[Priority, Waits] = {}
        self.refused: Counter[str] = Counter()
        self.left = 0
        self.recent: deque[str] = deque(maxlen=RECENT_CALLS)

    def granted(self, priority: Priority, now: float, waited_s: float) -> None:
        waits = self.waits.get(priority)
        if waits is None:
            waits = self.waits[priority] = Waits()
        waits.add(now, waited_s)

    def snapshot(self, now: float) -> Mapping[str, Any]:
        return {
            "wait_s": {priority: waits.percentiles(now) for priority, waits in self.waits.items()},
            "waits": {
                priority: {"total_s": waits.total_s, "at_most_s": waits.histogram()}
                for priority, waits in self.waits.items()
            },
            "refused": dict(self.refused),
            "left": self.left,
        }
