"""List prices of models, and what an answer of known length cost. Knows no outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from composer.types import Cost
from router_training.cells import Float64, columns_of, numbers, texts
from router_training.errors import DataError, Problems
from router_training.tables import name_of, read_table

CHARS_PER_TOKEN = 4.0
"""Where lengths are recorded in characters alone, for prices are per token: a fair estimate for
English."""

BESIDE = "models.csv"
INPUT, OUTPUT = "usd_per_1M_input", "usd_per_1M_output"


@dataclass(frozen=True, slots=True)
class Prices:
    """Of one table's models: those without a known price are left out."""

    file: str
    of: Mapping[str, Cost]

    def cost(self, model: str, in_tokens: Float64, out_tokens: Float64) -> Float64:
        """US dollars of calls with prompts and answers of so many tokens, (n,) each; NaN where a
        length or the price is not known."""
        price = self.of.get(model)
        if price is None:
            return np.full(len(in_tokens), np.nan)
        spent = price.input_per_1m * in_tokens + price.output_per_1m * out_tokens
        return np.asarray(spent / 1e6, np.float64)


def read_prices(path: Path, table: str) -> Prices:
    """A table with the columns `model`, `usd_per_1M_input`, `usd_per_1M_output` and perhaps
    `table`: then the rows of the named one count, and for its other models those whose price is
    the same wherever it is named. Raises DataError."""
    rows = read_table(path)
    problems = Problems(str(path))
    lacking = [name for name in ("model", INPUT, OUTPUT) if name not in rows.columns]
    if lacking:
        raise DataError.of(
            str(path),
            f"there is no column {', '.join(lacking)}",
            f"Prices need the columns model, {INPUT} and {OUTPUT}. {columns_of(rows)}",
        )
    remedy = "Write US dollars per million tokens, or nothing."
    models = texts(rows, "model", problems, required=True)
    dear = (
        numbers(rows, INPUT, problems, remedy=remedy),
        numbers(rows, OUTPUT, problems, remedy=remedy),
    )
    own = [not name or name == table for name in texts(rows, "table", problems)]
    said: dict[str, set[tuple[bool, Cost | None]]] = {}
    for row, model in enumerate(models):
        cost: Cost | None = Cost(float(dear[0][row]), float(dear[1][row]))
        missing = np.isnan([dear[0][row], dear[1][row]])
        if missing.any():
            cost = None
            if not missing.all():
                problems.add(
                    rows.lines[row], "", f"{model} has half a price", "Write both, or neither."
                )
        said.setdefault(model, set()).add((own[row], cost))
    chosen: dict[str, Cost] = {}
    for model, entries in said.items():
        here = {cost for of_table, cost in entries if of_table}
        prices = here or {cost for _, cost in entries}
        price = prices.pop()
        if price is not None and not prices:
            chosen[model] = price
    problems.settle()
    return Prices(str(path), chosen)


def prices_for(path: Path, prices: Path | None) -> Prices | None:
    """Those of the file given, else of `models.csv` beside the table, else None."""
    if prices is None:
        prices = path.parent / BESIDE
        if not prices.exists():
            return None
    return read_prices(prices, name_of(path))
