"""What became of one request, as it moves on. Knows no router, engine or store."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

from composer.errors import ComposerError
from composer.routing.sessions import Session
from composer.types import Expert, GateTrace, Plan, Request, Timings, Usage

Status = Literal["running", "ok", "error", "cancelled"]


@dataclass(slots=True)
class Outcome:
    """What became of a request. `started` is on the `perf_counter` clock, in seconds."""

    request: Request
    started: float
    plan: Plan | None = None
    session: Session | None = None
    catalog_version: int = 0
    catalog_digest: str = ""
    timings: Timings = field(default_factory=Timings)
    usage: Usage = field(default_factory=Usage)
    experts: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, GateTrace] = field(default_factory=dict)
    cost_usd: float | None = 0.0
    status: Status = "running"
    error: str | None = None

    def spend(self, expert: Expert, usage: Usage) -> None:
        """Adds a call's price. One unknown price makes the sum unknown: it is never guessed."""
        if self.cost_usd is not None:
            self.cost_usd = self.cost_usd + expert.cost.of(usage) if expert.cost else None

    def end(self, error: BaseException | None) -> None:
        """Settles the status. Only the first end counts."""
        if self.status != "running":
            return
        self.timings.total_ms = ms_since(self.started)
        if error is None:
            self.status = "ok"
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.status = "cancelled"
        else:
            self.status = "error"
            self.error = error.code if isinstance(error, ComposerError) else "internal_error"


def ms_since(started: float) -> float:
    """`started` is on the `perf_counter` clock, in seconds."""
    return (perf_counter() - started) * 1000
