"""The service's own database as outcomes: what callers said of single experts' answers.
Reads only, through `composer.store`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from composer.routing.conversation import read_then
from composer.store import Record
from composer.store.reading import Census, Reading
from composer.types import user_texts
from router_training.errors import DataError
from router_training.tables import Table

_COLUMNS = ("query", "expert", "score", "cost", "benchmark", "category", "group", "split", "answer")
_LABELS = ("benchmark", "category", "group", "split")


def table_of(url: str) -> tuple[Table, list[str]]:
    """One row an outcome, as `data.py` describes them, and notes on what could not be used.

    An outcome is a request with feedback that one expert answered; its score is the mean of its
    feedbacks', its cost the request's. Its query is what the router read: of a conversation, as
    many turns as the decision reached back. `benchmark`, `category`, `group` and `split` are labels
    of the feedback. Blocks; not to be called where an event loop runs.
    Raises StoreError for a database that cannot be read, DataError for one without outcomes.
    """
    return asyncio.run(_table_of(url))


async def _table_of(url: str) -> tuple[Table, list[str]]:
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    labels: dict[str, dict[str, Any]] = {}  # of a text: the latest word on each
    without_text = several = failed = 0
    async with Reading(url) as reading:
        census = await reading.census()
        async for record, feedback in reading.judged():
            if record.messages is None:
                without_text += 1
            elif record.status != "ok":
                failed += 1
            elif len(record.experts) != 1:
                several += 1
            else:
                text = _text(record)
                for item in feedback:
                    labels.setdefault(text, {}).update(item.labels or {})
                row: Mapping[str, Any] = {
                    "query": text,
                    "expert": record.experts[0],
                    "score": sum(item.score for item in feedback) / len(feedback),
                    "cost": record.cost_usd,
                    "answer": record.answer or None,
                }
                for name, cell in row.items():
                    columns[name].append(cell)
        file = reading.name
    notes = []
    if without_text:
        notes.append(f"{without_text} requests with feedback have no text: it was not stored")
    if several:
        notes.append(f"{several} answers were made by several experts: nobody's own outcome")
    if failed:
        notes.append(f"{failed} requests with feedback failed or were cancelled")
    n = len(columns["query"])
    for name in _LABELS:
        columns[name] = [labels[text].get(name) or None for text in columns["query"]]
    if not n:
        raise DataError.of(file, *_nothing(census, notes))
    return Table(file, columns, range(1, n + 1)), notes


def _text(record: Record) -> str:
    assert record.messages is not None
    turns_read = None if record.plan is None else record.plan.reasons.get("turns_read")
    return read_then(user_texts(record.messages), turns_read)


def _nothing(census: Census, notes: list[str]) -> tuple[str, str]:
    """What is missing, and how to have it next time."""
    if not census.requests:
        return "no request is recorded", "Let the service answer some first."
    if not census.judged:
        return (
            f"none of the {census.requests} requests recorded has feedback",
            "Send scores to POST /v1/feedback.",
        )
    if not census.judged_with_text:
        return (
            f"{census.judged} requests have feedback, but the text of none was stored",
            "Run the service with COMPOSER_LOG_CONTENT=true; what is past cannot be had back.",
        )
    return f"no outcome can be used: {'; '.join(notes)}", "Judge answers of single experts."
