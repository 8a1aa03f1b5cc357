"""What a knob promised and kept as rows of a table, the same for the screen, Markdown and the page.
Knows how `CurveTrial.kept_promises` tells it and no router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEADS = (
    "asked",
    "promised share (95 %)",
    "achieved share (95 %)",
    "within",
    "quality, %: promised, achieved",
    "US dollars a call: promised, achieved",
)
"""Shares are of the best single expert's mean quality on the same questions."""


def promise_row(promise: Mapping[str, Any]) -> list[str]:
    alone = promise["expert"]
    asked = f"{promise['asked']:g}"
    return [
        asked if alone is None else f"{asked} ({alone} alone)",
        _share(promise["promised"], promise["interval"]),
        _share(promise["achieved"], promise["achieved_ci95"]),
        _place(promise),
        f"{100 * promise['promised_quality']:.1f}, {100 * promise['achieved_quality']:.1f}",
        f"{promise['promised_cost']:.3g}, {promise['achieved_cost']:.3g}",
    ]


def _place(promise: Mapping[str, Any]) -> str:
    """Whoever gets more than was promised is told so, since that breaks nothing."""
    if promise["within_interval"]:
        return "yes"
    return "above" if promise["achieved"] > promise["interval"][1] else "below"


def _share(share: float, around: Sequence[float]) -> str:
    return f"{share:.3f} ({around[0]:.3f} to {around[1]:.3f})"
