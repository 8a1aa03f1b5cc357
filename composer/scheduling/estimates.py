"""What is learnt of durations and arrivals. Knows nothing of models, queues or plans.

All seconds. Nothing here reads a clock: times come with each observation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PEAK_MEMORY = 256
"""Observations after which a peak's height above the mean has fallen to 1/e."""


@dataclass(slots=True)
class Duration:
    """A moving mean of a duration and of its distance from that mean (as in Jacobson, "Congestion
    Avoidance and Control", 1988), and its peak, which is forgotten slowly.

    `first` is believed until something is observed, with a spread of `doubt` × `first`. `memory`
    is the number of observations that the mean stands for.
    """

    first: float
    doubt: float = 0.0
    memory: int = 8
    mean: float = 0.0
    spread: float = 0.0
    peak: float = 0.0
    seen: int = 0

    def __post_init__(self) -> None:
        self.mean, self.spread = self.first, self.doubt * self.first

    def observe(self, seconds: float) -> None:
        self.seen += 1
        error = seconds - self.mean
        self.mean += error / min(self.seen, self.memory)
        self.spread += (abs(error) - self.spread) / min(self.seen + 1, self.memory)
        self.peak = max(seconds, self.peak - (self.peak - self.mean) / PEAK_MEMORY)

    def high(self, margin: float) -> float:
        """A duration that is seldom exceeded: `margin` spreads above the mean, or the peak."""
        return max(self.mean + margin * self.spread, self.peak if margin else 0.0)


@dataclass(slots=True)
class Rate:
    """Arrivals a second: an exponentially decaying count over a decaying span of time, so that
    the first few arrivals after `since` already give an unbiased figure.

    `horizon` is the time after which an arrival weighs 1/e.
    """

    since: float
    horizon: float
    count: float = 0.0
    last: float = 0.0

    def observe(self, now: float) -> None:
        self.count = self.count * math.exp((self.last - now) / self.horizon) + 1.0
        self.last = now

    def at(self, now: float) -> float:
        if self.count == 0.0:
            return 0.0
        count = self.count * math.exp((self.last - now) / self.horizon)
        # The span is at least a tenth of the horizon: one early arrival is no flood.
        elapsed = max(now - self.since, self.horizon / 10)
        return count / (self.horizon * -math.expm1(-elapsed / self.horizon))
