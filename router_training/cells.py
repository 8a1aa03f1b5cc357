"""Columns become checked values: numbers in their range, texts, flags. Knows no outcome."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from composer.types import BoolArray
from router_training.errors import Problems
from router_training.tables import Table

Float64 = npt.NDArray[np.float64]


def numbers(
    table: Table, column: str, problems: Problems, *, high: float = math.inf, remedy: str
) -> Float64:
    """(n,) of 0 to `high`, NaN where there is nothing."""
    cells = table.columns[column]
    out = np.array([_number(cell) for cell in cells], np.float64)
    empty = np.array([cell is None for cell in cells], np.bool_)
    for row in np.flatnonzero(~empty & ~((out >= 0) & (out <= high) & np.isfinite(out))).tolist():
        wrong = "is not a number" if np.isnan(out[row]) else "is out of range"
        problems.add(table.lines[row], column, f"{_shown(cells[row])} {wrong}", remedy)
    return out


def _number(cell: Any) -> float:
    if cell is None or (isinstance(cell, str) and "_" in cell):  # float() takes "1_000"
        return math.nan
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def texts(table: Table, column: str, problems: Problems, *, required: bool = False) -> list[str]:
    """ "" where there is nothing. Numbers are taken as they are written."""
    out = []
    for row, cell in enumerate(table.columns.get(column, [None] * len(table))):
        if isinstance(cell, str):
            text = cell
        elif isinstance(cell, int | float) and not isinstance(cell, bool) and not required:
            text = str(cell)
        else:
            text = ""
            if cell is not None:
                problems.add(
                    table.lines[row], column, f"{_shown(cell)} is not text", "Write a text."
                )
                out.append(text)
                continue
        if required and not text.strip():
            problems.add(
                table.lines[row],
                column,
                "there is nothing",
                "Write the text, or leave the row out.",
            )
        out.append(text)
    return out


def flags(table: Table, column: str, problems: Problems) -> BoolArray:
    """(n,) from 0 and 1; no column, or nothing in it: False."""
    if column not in table.columns:
        return np.zeros(len(table), np.bool_)
    values = numbers(table, column, problems, remedy="Write 0 or 1.")
    for row in np.flatnonzero((values != 0) & (values != 1) & np.isfinite(values)).tolist():
        problems.add(
            table.lines[row], column, f"{values[row]:g} is neither 0 nor 1", "Write 0 or 1."
        )
    return np.asarray(values == 1, np.bool_)


def listed(names: Sequence[str], limit: int = 8) -> str:
    """A few of the names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def columns_of(table: Table) -> str:
    """A sentence with those that there are, for who misses one."""
    return f"There are: {listed(list(table.columns), 12)}."


def counted(n: int, one: str, many: str | None = None) -> str:
    """How many of what, for a message."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _shown(cell: Any) -> str:
    written = repr(cell)
    return written if len(written) <= 40 else f"{written[:37]}…"
