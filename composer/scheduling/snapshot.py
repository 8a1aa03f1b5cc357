"""What can be seen of a device, as plain data: for GET /v1/scheduler and the metrics.

Changes nothing. Times are seconds on the scheduler's clock.
"""

from __future__ import annotations

from typing import Any

from composer.scheduling.device import DeviceOwner
from composer.scheduling.measures import segment_cache, segment_routing

INTERVALS = 100
"""Of a device's timeline, the newest."""

SEGMENT = 64
"""Calls in a row for which a set of residents has to serve, in the measures of consistency."""


def device_snapshot(owner: DeviceOwner, now: float) -> dict[str, Any]:
    """One device: what is on it, what moves and has moved, who waits, runs and was refused."""
    residency = owner.residency
    intervals = list(residency.intervals())
    present = [interval for interval in intervals if interval.until is None]
    moved: dict[str, dict[str, dict[str, float]]] = {}
    for (model, move), total in residency.moved.items():
        moved.setdefault(model, {})[move] = {"count": total.count, "seconds": total.seconds}
    queue: dict[tuple[str, str], dict[str, Any]] = {}
    for (server, expert, priority), count in owner.queue().items():
        line = {"server": server, "expert": expert, "interactive": 0, "batch": 0}
        queue.setdefault((server, expert), line)[priority] = count
    return {
        "memory_gb": residency.memory_gb,
        "used_gb": residency.used_gb(),
        "residents": [interval.model for interval in present if interval.state == "resident"],
        "moving": [
            {"model": interval.model, "state": interval.state, "since": interval.since}
            for interval in present
            if interval.state != "resident"
        ],
        "swaps": sum(total.count for (_, move), total in residency.moved.items() if move == "load"),
        "swap_s": sum(total.seconds for total in residency.moved.values()),
        "moved": moved,
        "losses": dict(residency.losses),
        "failures": dict(owner.failures),
        "timeline": [
            {
                "model": interval.model,
                "state": interval.state,
                "from": interval.since,
                "to": interval.until,
            }
            for interval in intervals[-INTERVALS:]
        ],
        "running": {server: load["running"] for server, load in owner.loads().items()},
        "queue": list(queue.values()),
        **owner.calls.snapshot(now),
        "consistency": _consistency(owner),
        "policy_faults": owner.faults,
        "policy": owner.policy_snapshot(),
    }


def _consistency(owner: DeviceOwner) -> dict[str, Any] | None:
    """How well the recent traffic suits keeping only what fits; None where nothing is moved."""
    calls, capacity = list(owner.calls.recent), owner.residency.capacity()
    if capacity == 0:
        return None
    return {
        "calls": len(calls),
        "capacity": capacity,
        "segment": SEGMENT,
        "segment_routing": segment_routing(calls, capacity, SEGMENT),
        "segment_cache": segment_cache(calls, capacity, SEGMENT),
    }
