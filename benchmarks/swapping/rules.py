"""The rules that are compared, ours among them, and the knobs of each. Runs none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.swapping.baselines import ActiveSet, ArrivalOrder, LeastRecentlyUsed, MergedWaits
from benchmarks.swapping.simulator import Workload
from composer.scheduling.events import DevicePolicy
from composer.scheduling.policy import SwapPolicy
from composer.scheduling.state import PolicySettings

OURS = "ours"


def _per_wait(share: float, work: Workload) -> float:
    """Calls that arrive in this share of the bound on waiting."""
    span = work.jobs[-1].call.arrived - work.jobs[0].call.arrived
    return share * len(work.jobs) * (work.max_wait_s or 0.0) / span


RULES: Mapping[str, tuple[Sequence[float], Callable[[float, Workload], DevicePolicy]]] = {
    OURS: (
        (0.001, 0.02, 0.1, 0.25, 0.5, 0.75, 1.0),
        lambda knob, work: SwapPolicy(PolicySettings(patience=knob)),
    ),
    "arrival order": ((1, 8), lambda knob, work: ArrivalOrder(int(knob))),
    "LRU": (
        (0.0, 0.05, 0.15, 0.4, 0.7, 1.0),
        lambda knob, work: LeastRecentlyUsed(round(_per_wait(knob, work))),
    ),
    "LoRAX": (
        (0.02, 0.05, 0.1, 0.3, 0.8),
        lambda knob, work: ActiveSet(knob * (work.max_wait_s or 0.0)),
    ),
    "llama-swap": (
        (0.0, 0.3, 0.6, 0.8, math.inf),
        lambda knob, work: MergedWaits(knob * (work.max_wait_s or 0.0)),
    ),
}
"""Each rule's knobs and its making. Ours: patience; arrival order: calls at once on a model; LRU:
look-ahead, LoRAX: maximal active time, llama-swap: hold, as shares of the bound on waiting."""
