"""What a report is made of: sections, tables, and numbers as they are written there. Knows no
measure and no picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router_training.intervals import Interval

NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    cells: tuple[str, ...]
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class PageTable:
    caption: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """`absent` is why there is nothing else in it."""

    id: str
    title: str
    text: str = ""
    svg: str = ""
    caption: str = ""
    tables: tuple[PageTable, ...] = ()
    absent: str = ""


def percent(value: float | None, spread: Sequence[float] | None = None) -> str:
    if value is None:
        return NOTHING
    around = "" if spread is None else f" ({100 * spread[0]:.1f} to {100 * spread[1]:.1f})"
    return f"{100 * value:.1f} %{around}"


def interval(around: Interval) -> str:
    return percent(around.mean, (around.low, around.high))


def gain_of(card: Mapping[str, Any]) -> str:
    gain, spread = card.get("gain_over_best_single"), card.get("gain_ci95")
    if gain is None or spread is None:
        return NOTHING
    return f"{100 * gain:+.1f} ({100 * spread[0]:+.1f} to {100 * spread[1]:+.1f})"


def number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def dollars(value: float | None) -> str:
    """Per question in, per 1,000 questions out."""
    return NOTHING if value is None else f"{1000 * value:.3g}"
