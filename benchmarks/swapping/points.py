"""Points (swap seconds, wait, misses) of rules against our curve. Simulates nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.swapping.rules import OURS, RULES

MISSES = 0.001
"""Share of misses up to which a point counts as keeping the bounds."""

TOLERANCE = 0.03


@dataclass(frozen=True, slots=True)
class Point:
    """A rule with one knob on one cell. `swap_s` and `swaps` are per 1,000 calls; `waits` is how
    many times `max_wait_s` the arrivals span."""

    cell: str
    rho: float
    rule: str
    knob: float
    swap_s: float
    swaps: float
    misses: float
    p50: float
    p95: float
    p99: float
    max_wait_s: float
    waits: float
    calls: float


MEANS = tuple(field.name for field in fields(Point))[4:]
"""What is meaned over seeds."""


def below(point: Point, curve: Sequence[Point]) -> bool:
    """Whether a point lies below our curve (`dominated` in benchmarks/swaps.py). `curve` is in
    the order of its knobs."""

    def reached(swap_s: float, p95: float, misses: float) -> bool:
        return (
            swap_s <= point.swap_s * (1 + TOLERANCE) + 1e-9
            and p95 <= point.p95 * (1 + TOLERANCE) + 1e-9
            and misses <= point.misses + MISSES
        )

    if any(reached(p.swap_s, p.p95, p.misses) for p in curve):
        return False
    for a, b in pairwise(curve):
        for share in np.linspace(0, 1, 21)[1:-1]:
            swap_s = a.swap_s + share * (b.swap_s - a.swap_s)
            p95 = a.p95 + share * (b.p95 - a.p95)
            if reached(swap_s, p95, max(a.misses, b.misses)):
                return False
    return True


def by_cell(points: Iterable[Point]) -> dict[str, dict[str, list[Point]]]:
    cells: dict[str, dict[str, list[Point]]] = {}
    for point in points:
        cells.setdefault(point.cell, {}).setdefault(point.rule, []).append(point)
    for rules in cells.values():
        for found in rules.values():
            found.sort(key=lambda p: p.knob)
    return cells


def least_swaps(points: Iterable[Point]) -> list[dict[str, Any]]:
    rows = []
    for cell, rules in by_cell(points).items():
        row: dict[str, Any] = {"cell": cell}
        for rule, found in rules.items():
            if rule == OURS:
                row["max_wait_s"] = round(found[0].max_wait_s)
                row["calls"] = round(found[0].calls)
                row["waits"] = round(found[0].waits, 1)
        for rule, found in rules.items():
            kept = [p for p in found if p.misses <= MISSES]
            best = min(kept, key=lambda p: (p.swap_s, p.p95), default=None)
            if best is None:
                fewest = min(p.misses for p in found)
                row[rule] = f"misses {fewest:.1%}"
            else:
                row[rule] = f"{best.swap_s:.0f} ({best.p95:.0f})"
        rows.append(row)
    return rows


def dominated(points: Iterable[Point]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The share per rule and load, and the points that are not."""
    cells = by_cell(points)
    shares: dict[tuple[str, float], list[bool]] = {}
    exceptions = []
    for cell, rules in cells.items():
        ours = rules[OURS]
        for rule, found in rules.items():
            if rule == OURS:
                continue
            listed = set()
            for point in found:
                crosses = below(point, ours)
                shares.setdefault((rule, point.rho), []).append(not crosses)
                figures = (point.swap_s, point.p95, point.misses)
                if crosses and figures not in listed:  # several knobs may do the same
                    listed.add(figures)
                    exceptions.append(
                        {
                            "cell": cell,
                            "rule": rule,
                            "knob": point.knob if math.isfinite(point.knob) else "∞",
                            "swap_s": point.swap_s,
                            "p95": point.p95,
                            "misses": f"{point.misses:.2%}",
                            "ours, no slower": _nearest(point, ours),
                        }
                    )
    rows = []
    for rule in RULES:
        if rule != OURS:
            row: dict[str, Any] = {"rule": rule}
            for rho in sorted({rho for _, rho in shares}):
                found_here = shares[rule, rho]
                row[f"ρ {rho:g}"] = f"{sum(found_here)}/{len(found_here)}"
            rows.append(row)
    return rows, exceptions


def _nearest(point: Point, ours: Sequence[Point]) -> str:
    """The fewest swap seconds that one of our points has at no longer a wait."""
    quick = [p for p in ours if p.p95 <= point.p95 * (1 + TOLERANCE)]
    if not quick:
        quickest = min(ours, key=lambda p: p.p95)
        return f"none (quickest: {quickest.swap_s:.0f} at {quickest.p95:.0f} s)"
    best = min(quick, key=lambda p: p.swap_s)
    return f"{best.swap_s:.0f} at {best.p95:.0f} s, misses {best.misses:.2%}"
