"""One caller's `acquire` while its device's owner holds it, one server's line of them, and the
words of a refusal. Decides nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from composer.errors import ComposerError, EngineUnavailable, Overloaded
from composer.scheduling.base import Lease
from composer.scheduling.events import RETRY_AFTER_S, Model, Waiting
from composer.types import Priority


@dataclass(eq=False, slots=True)
class Ticket:
    """One `acquire`, from its arrival to its release. `stay` numbers its model's stays on the
    device, so that a lease of an earlier one cannot report the present one lost."""

    call: Waiting
    expert: str
    asked: float
    stay: int = 0
    lease: Lease | None = None
    refusal: Exception | None = None
    settled: asyncio.Future[Lease] | None = None

    @property
    def priority(self) -> Priority:
        return "batch" if self.call.batch else "interactive"

    @property
    def left(self) -> bool:
        """Its caller was cancelled, and has not run its own clean-up yet."""
        return self.settled is not None and self.settled.cancelled()

    def grant(self, lease: Lease) -> None:
        self.lease = lease
        if self.settled is not None:
            self.settled.set_result(lease)

    def refuse(self, error: Exception) -> None:
        self.refusal = error
        if self.settled is not None and not self.settled.done():
            self.settled.set_exception(error)


@dataclass(slots=True)
class Line:
    """One server's calls. `model` None: it left, and its last leases are still out."""

    model: Model | None
    running: int = 0
    waiting: int = 0


def refusal(
    model: str, line: Line, reason: str, retry_after_s: float, *, loaded: bool
) -> ComposerError:
    """What the caller is told. `reason` is that of `Refuse`."""
    if reason == "gone":
        return EngineUnavailable(f"server {model!r} was taken out of service")
    what = {"full": "is full", "late": "cannot take the call within its bound"}
    calls = f"{line.running} calls run and {line.waiting} wait"
    state = "" if loaded else ", and it is not loaded"
    low, high = RETRY_AFTER_S
    wait = min(max(retry_after_s, low), high)
    return Overloaded(
        f"server {model!r} {what.get(reason, f'refuses ({reason})')}: {calls}{state}; come back "
        f"in {wait:.0f} s",
        retry_after=wait,
    )
