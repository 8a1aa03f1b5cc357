"""A table's columns as arrays, every cell checked: one question a row, or one outcome a row.
Knows no file format, and merges no questions that are only alike."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from composer.types import BoolArray
from router_training.cells import Float64, columns_of, flags, listed, numbers, texts
from router_training.errors import Problems
from router_training.pricing import CHARS_PER_TOKEN, Prices
from router_training.tables import Table

SCORE, COST, OUT, ANSWER = "score|", "cost|", "out_chars|", "answer|"
IN_TOKENS, OUT_TOKENS = "in_tokens|", "out_tokens|"

_OF_QUESTION = (
    "query_id",
    "query",
    "choices",
    "benchmark",
    "category",
    "group",
    "split",
    "contaminated",
    "gold",
    "in_chars",
)
_OF_OUTCOME = ("expert", "score", "cost", "out_chars", "in_tokens", "out_tokens", "answer")

_PREFIXES = (SCORE, COST, OUT, IN_TOKENS, OUT_TOKENS, ANSWER)

_SCORE = "Write a number from 0 (wrong) to 1 (right), or nothing where it is not known."
_COST = "Write US dollars, 0 or more, or nothing where they are not known."
_CHARS = "Write a number of characters, or nothing where it is not known."
_TOKENS = "Write a number of tokens, or nothing where it is not known."


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """n questions, E experts: `quality`, `cost` and `given` (n, E), the rest (n,)."""

    experts: tuple[str, ...]
    text: tuple[str, ...]
    ids: tuple[str, ...]
    benchmark: tuple[str, ...]
    category: tuple[str, ...]
    group: tuple[str | None, ...]
    contaminated: BoolArray
    gold: tuple[str | None, ...]
    quality: Float64
    cost: Float64
    given: npt.NDArray[np.object_]
    notes: tuple[str, ...]


def is_wide(table: Table) -> bool:
    return any(name.startswith(SCORE) for name in table.columns)


def is_long(table: Table) -> bool:
    return {"expert", "score"} <= set(table.columns)


def from_wide(table: Table, prices: Prices | None) -> Draft:
    """One question a row. Raises DataError with all that is wrong."""
    problems = Problems(table.file)
    experts = tuple(n.removeprefix(SCORE) for n in table.columns if n.startswith(SCORE))
    if "" in experts:
        problems.add(None, SCORE, "the column names no model", "Write `score|MODEL`.")
    shape = (len(table), len(experts))
    quality, cost = np.full(shape, np.nan), np.full(shape, np.nan)
    given = np.full(shape, None, np.object_)
    in_chars = _optional(table, "in_chars", problems, _CHARS)
    for e, expert in enumerate(experts):
        quality[:, e] = numbers(table, SCORE + expert, problems, high=1.0, remedy=_SCORE)
        cost[:, e] = _cost(
            table, f"|{expert}", np.array([expert] * len(table)), in_chars, prices, problems
        )
        if (name := ANSWER + expert) in table.columns:
            given[:, e] = [text or None for text in texts(table, name, problems)]
    read = set(_OF_QUESTION) | {prefix + expert for prefix in _PREFIXES for expert in experts}
    question = questions_of(table, problems)
    problems.settle()
    return Draft(
        experts=experts,
        **question,
        quality=quality,
        cost=cost,
        given=given,
        notes=_ignored(table, read),
    )


def from_long(table: Table, prices: Prices | None) -> Draft:
    """One outcome a row. Raises DataError with all that is wrong, rows of one question that
    contradict each other among it."""
    problems = Problems(table.file)
    names = texts(table, "expert", problems, required=True)
    score = numbers(table, "score", problems, high=1.0, remedy=_SCORE)
    in_chars = _optional(table, "in_chars", problems, _CHARS)
    cost = _cost(table, "", np.array(names), in_chars, prices, problems)
    answers = texts(table, "answer", problems)
    question = questions_of(table, problems)
    has_ids = "query_id" in table.columns
    keys = [
        id if has_ids and id else text
        for id, text in zip(question["ids"], question["text"], strict=True)
    ]
    row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    merged = _merged(table, question, [row_of[key] for key in keys], problems)
    problems.settle()

    experts = tuple(dict.fromkeys(names))
    place = {expert: column for column, expert in enumerate(experts)}
    at = (np.array([row_of[key] for key in keys]), np.array([place[name] for name in names]))
    shape = (len(row_of), len(experts))
    given = np.full(shape, None, np.object_)
    for row, column, answer in zip(*at, answers, strict=True):
        if answer and given[row, column] is None:
            given[row, column] = answer
    quality, counted = _mean(at, score, shape)
    notes = _ignored(table, {*_OF_QUESTION, *_OF_OUTCOME})
    if repeated := int((counted > 1).sum()):
        notes += (f"{repeated} experts' outcomes on a question are means of several",)
    return Draft(
        experts=experts,
        **merged,
        quality=quality,
        cost=_mean(at, cost, shape)[0],
        given=given,
        notes=notes,
    )


def _mean(
    at: tuple[npt.NDArray[Any], npt.NDArray[Any]], values: Float64, shape: tuple[int, int]
) -> tuple[Float64, Float64]:
    """Means of the known values of each cell, NaN where there is none, and their number."""
    known = ~np.isnan(values)
    where = (at[0][known], at[1][known])
    total, counted = np.zeros(shape), np.zeros(shape)
    np.add.at(total, where, values[known])
    np.add.at(counted, where, 1.0)
    return np.where(counted > 0, total / np.maximum(counted, 1), np.nan), counted


def _cost(
    table: Table,
    of: str,
    models: npt.NDArray[np.str_],
    in_chars: Float64,
    prices: Prices | None,
    problems: Problems,
) -> Float64:
    """(n,) as recorded, else from lengths and list prices, else NaN. `of` ends the column's name;
    `models` (n,) is who answered."""
    recorded = _optional(table, f"cost{of}", problems, _COST)
    out_chars = _optional(table, f"out_chars{of}", problems, _CHARS)
    tokens = []
    for name, chars in (("in_tokens", in_chars), ("out_tokens", out_chars)):
        counted = _optional(table, name + of, problems, _TOKENS)
        tokens.append(np.where(np.isnan(counted), chars / CHARS_PER_TOKEN, counted))
    if prices is not None:
        for model in np.unique(models):
            mine = (models == model) & np.isnan(recorded)
            recorded[mine] = prices.cost(str(model), tokens[0][mine], tokens[1][mine])
    return recorded


def _optional(table: Table, column: str, problems: Problems, remedy: str) -> Float64:
    if column not in table.columns:
        return np.full(len(table), np.nan)
    return numbers(table, column, problems, remedy=remedy)


def questions_of(table: Table, problems: Problems) -> dict[str, Any]:
    """The Draft's fields that belong to a row's question."""
    if "query" not in table.columns:
        remedy = f"Add it, with the question's text. {columns_of(table)}"
        problems.add(None, "query", "there is no such column", remedy)
        problems.settle()
    stems = texts(table, "query", problems, required=True)
    options = table.columns.get("choices", [None] * len(table))
    return {
        "text": tuple(
            _with_options(stem, cell, table.lines[row], problems)
            for row, (stem, cell) in enumerate(zip(stems, options, strict=True))
        ),
        "ids": tuple(texts(table, "query_id", problems)),
        "benchmark": tuple(texts(table, "benchmark", problems)),
        "category": tuple(texts(table, "category", problems)),
        "group": tuple(text or None for text in texts(table, "group", problems)),
        "contaminated": flags(table, "contaminated", problems),
        "gold": tuple(text or None for text in texts(table, "gold", problems)),
    }


def _with_options(stem: str, cell: Any, line: int, problems: Problems) -> str:
    """The question with its options below it, one a line: `A. first`, `B. second` …"""
    options = options_of(cell)
    if options is None:
        problems.add(
            line, "choices", "not a JSON list of options", 'Write it so: ["first", "second"].'
        )
        return stem
    names = [
        *string.ascii_uppercase,
        *map(str, range(len(string.ascii_uppercase) + 1, len(options) + 1)),
    ]
    return "\n".join(
        [stem, *(f"{name}. {option}" for name, option in zip(names, options, strict=False))]
    )


def options_of(cell: Any) -> list[str] | None:
    """Of a cell of `choices`, none for an empty one; None where it is no list of options."""
    if cell is None:
        return []
    options = cell
    if isinstance(cell, str):
        try:
            options = orjson.loads(cell)
        except orjson.JSONDecodeError:
            return None
    if not isinstance(options, list) or not all(isinstance(o, str | int | float) for o in options):
        return None
    return [str(option) for option in options]


def _merged(
    table: Table, question: dict[str, Any], of: Sequence[int], problems: Problems
) -> dict[str, Any]:
    """Fields by row → fields by question, `of` (n,) being each row's. What one row says of its
    question holds for all, so no other may say otherwise."""
    n = max(of) + 1
    column = {"text": "query", "ids": "query_id"}
    merged: dict[str, Any] = {}
    for field, values in question.items():
        said: list[int | None] = [None] * n  # the row that speaks for the question
        for row, number in enumerate(of):
            speaker = said[number]
            if not values[row]:
                continue
            if speaker is None:
                said[number] = row
            elif values[row] != values[speaker]:
                problems.add(
                    table.lines[row],
                    column.get(field, field),
                    f"differs from line {table.lines[speaker]}, which is of the same question",
                    "Write the same in both, or give them different query_ids.",
                )
        nothing = None if field in ("group", "gold") else ""
        kept = tuple(nothing if row is None else values[row] for row in said)
        merged[field] = (
            np.array([row is not None for row in said]) if field == "contaminated" else kept
        )
    return merged


def _ignored(table: Table, read: set[str]) -> tuple[str, ...]:
    unknown = [name for name in table.columns if name not in read]
    return (f"columns left alone: {listed(unknown)}",) if unknown else ()
