"""Tables of intents as outcomes: one expert an intent, right for its own queries alone.
Knows no router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from composer.routing.outcomes import Outcomes
from router_training.cells import columns_of, counted, texts
from router_training.errors import DataError, Problems
from router_training.groups import groups_of
from router_training.tables import Table, name_of, read_table

OUT_OF_SCOPE = "oos"


def read_intents(
    path: str | Path, *, experts: Sequence[str] | None = None, out_of_scope: str = OUT_OF_SCOPE
) -> Outcomes:
    """A table with the columns `query`, `intent` and perhaps `domain`, which becomes the category.

    Quality is 1 for the query's own intent and 0 for every other, so 0 throughout where the intent
    is `out_of_scope`; there are no costs. `experts`: the intents in the order wanted, say those of
    the training part; without it the file's own, by name. Dense: 150 intents of 15,000 queries
    are 9 MB. Raises DataError.
    """
    return from_intents(read_table(Path(path)), experts=experts, out_of_scope=out_of_scope)


def of_intents(table: Table) -> bool:
    """Whether a table is one of intents."""
    return {"query", "intent"} <= table.columns.keys()


def from_intents(
    table: Table,
    *,
    experts: Sequence[str] | None = None,
    also: Sequence[str] = (),
    out_of_scope: str = OUT_OF_SCOPE,
) -> Outcomes:
    """As `read_intents`, of a table that is read. Without `experts` those in `also` are experts
    beside the table's own."""
    lacking = [name for name in ("query", "intent") if name not in table.columns]
    if lacking:
        raise DataError.of(
            table.file,
            f"there is no column {', '.join(lacking)}",
            f"A table of intents has the columns query and intent. {columns_of(table)}",
        )
    problems = Problems(table.file)
    queries = texts(table, "query", problems, required=True)
    intents = texts(table, "intent", problems, required=True)
    domains = texts(table, "domain", problems)
    if experts is None:
        own = {intent for intent in intents if intent and intent != out_of_scope}
        experts = sorted(own.union(also))
    place = {expert: column for column, expert in enumerate(experts)}
    quality = np.zeros((len(table), len(experts)), np.float32)
    strange: dict[str, list[int]] = {}  # unknown intent → its lines
    for row, intent in enumerate(intents):
        if intent in place:
            quality[row, place[intent]] = 1.0
        elif intent and intent != out_of_scope:
            strange.setdefault(intent, []).append(table.lines[row])
    if strange:
        first = min(lines[0] for lines in strange.values())
        problems.add(first, "intent", *_unknown(strange, out_of_scope))
    problems.settle()
    if not quality.any():
        raise DataError.of(table.file, "every query is out of scope", "Name another file.")
    return Outcomes(
        experts=tuple(experts),
        text=tuple(queries),
        quality=quality,
        cost=np.full_like(quality, np.nan),
        category=tuple(domains),
        benchmark=(name_of(Path(table.file)),) * len(table),
        group=groups_of(queries, [None] * len(table)),
    )


EXAMPLES = 3
"""Unknown intents that an error names."""


def _unknown(strange: Mapping[str, Sequence[int]], out_of_scope: str) -> tuple[str, str]:
    """What is wrong with the intents that are not among the experts, told once for all, and the
    remedy. Each with its lines."""
    some = [
        f"{intent!r} ({counted(len(lines), 'query', 'queries')}, first on line {lines[0]})"
        for intent, lines in list(strange.items())[:EXAMPLES]
    ]
    more = f" and {counted(left, 'other')}" if (left := len(strange) - EXAMPLES) > 0 else ""
    are = "is" if len(strange) == 1 else "are"
    return (
        f"{', '.join(some)}{more} {are} not among the experts",
        f"Correct them, write {out_of_scope!r} where a query is nobody's, or train with these "
        "intents.",
    )
