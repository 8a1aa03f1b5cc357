"""Questions through experts: who answered what, how right it was, what it cost; a table that
training reads. Knows no wire format and no scorer.

Asking comes first, one expert after the other, so that a device loads each model once; scoring
comes after it, for a judge is an expert, too. Every answer is kept at once (`calls.py`), so that a
run that was stopped goes on, and one with another scorer asks nobody again but its judge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from composer.types import Message
from router_training.asking import Ask, Said
from router_training.cells import columns_of
from router_training.draft import (
    ANSWER,
    COST,
    IN_TOKENS,
    OUT,
    OUT_TOKENS,
    SCORE,
    options_of,
    questions_of,
)
from router_training.errors import AskFailed, AskRefused, DataError, Problems, TrainingError
from router_training.progress import Progress, silent
from router_training.scoring import Example, Scorer
from router_training.tables import Table, read_table

CONCURRENCY = 16

FAILED_IN_A_ROW = 3
"""Calls of one expert, or of the judge, that fail, after all their tries, before the rest of its
questions, or of the answers, is left for another run."""

PLACE = "{query}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """How a question is put: `template` with `{query}` where it goes, after `system` if any. The
    router will see the bare question."""

    system: str | None = None
    template: str = PLACE

    def __post_init__(self) -> None:
        if PLACE not in self.template:
            raise TrainingError(f"--template has no {PLACE}; put it where the question goes")

    def messages(self, text: str) -> list[Message]:
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        messages.append({"role": "user", "content": self.template.replace(PLACE, text)})
        return messages

    def chars(self, text: str) -> int:
        return sum(len(str(message.get("content"))) for message in self.messages(text))


@dataclass(frozen=True, slots=True)
class Questions:
    """A table's rows as examples, (n,)."""

    table: Table
    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.examples)


def read_questions(path: Path, split: str | None = None) -> Questions:
    """The columns `query`, perhaps `choices`, `gold` (or `reference`) and `tests`; all others are
    kept. Raises DataError with all that is wrong."""
    table = read_table(path)
    columns = dict(table.columns)
    if "reference" in columns:
        if "gold" in columns:
            raise DataError.of(
                table.file, "there are both gold and reference", "Leave one of them out."
            )
        columns = {{"reference": "gold"}.get(n, n): cells for n, cells in columns.items()}
    table = Table(table.file, columns, table.lines)
    if split is not None:
        rows = [i for i, cell in enumerate(columns.get("split", ())) if cell == split]
        if not rows:
            raise DataError.of(
                table.file, f"no row is of the split {split!r}", "Name another, or leave it out."
            )
        table = table.rows(rows)
    problems = Problems(table.file)
    read = questions_of(table, problems)
    tests = table.columns.get("tests", [None] * len(table))
    options = [options_of(cell) for cell in table.columns.get("choices", [None] * len(table))]
    for row, cell in enumerate(tests):
        if cell is not None and not isinstance(cell, str):
            problems.add(table.lines[row], "tests", "not text", "Write a Python program.")
    problems.settle()
    return Questions(
        table,
        tuple(
            Example(text, gold, tuple(some or ()), test)
            for text, gold, some, test in zip(
                read["text"], read["gold"], options, tests, strict=True
            )
        ),
    )


def check(questions: Questions, scorer: Scorer, experts: Sequence[str]) -> None:
    """Before anybody is asked: every question can be scored, and no expert's outcomes are there
    already. Raises DataError."""
    table = questions.table
    if scorer.needs is not None and scorer.needs not in table.columns:
        other = " (or reference)" if scorer.needs == "gold" else ""
        raise DataError.of(
            table.file,
            f"there is no such column{other}, and this scorer needs it",
            f"Add it, or name another scorer. {columns_of(table)}",
            column=scorer.needs,
        )
    problems = Problems(table.file)
    for expert in experts:
        if (column := SCORE + expert) in table.columns:
            problems.add(
                1, column, "it was collected already", "Leave the column or the expert out."
            )
    for line, example in zip(table.lines, questions.examples, strict=True):
        if (lack := scorer.lack(example)) is not None:
            problems.add(line, lack.column, lack.message, lack.remedy)
    problems.settle()


@dataclass(slots=True)
class Collected:
    """What came of it, by expert: `said` and `scores`, one a question, None where there is none.
    `notes` say what is missing and why."""

    said: dict[str, list[Said | None]] = field(default_factory=dict)
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unasked: int = 0
    """Calls that failed and may succeed in another run."""
    unread: list[str] = field(default_factory=list)
    """Why answers have no score, one by one, of those that were tried."""


async def collect(
    questions: Questions,
    experts: Sequence[str],
    ask: Ask,
    scorer: Scorer,
    prompt: Prompt,
    *,
    concurrency: int = CONCURRENCY,
    progress: Progress = silent,
) -> Collected:
    """Call `check` first. Raises AskError where nobody can be asked, TrainingError where there is
    not one answer, or not one that could be scored."""
    found = await heard(
        questions, experts, ask, scorer, prompt, concurrency=concurrency, progress=progress
    )
    answers = sum(answer is not None for said in found.said.values() for answer in said)
    if not answers:
        raise TrainingError("; ".join(["there is not one answer", *found.notes]))
    if all(score is None for scores in found.scores.values() for score in scores):
        raise TrainingError(f"not one of {answers} answers could be scored: {found.unread[0]}")
    return found


async def heard(
    questions: Questions,
    experts: Sequence[str],
    ask: Ask,
    scorer: Scorer,
    prompt: Prompt,
    *,
    concurrency: int = CONCURRENCY,
    progress: Progress = silent,
) -> Collected:
    """As `collect`, and silence is a finding, too: it may be without one answer or score. Raises
    AskError where nobody can be asked."""
    found = Collected()
    for expert in experts:
        found.said[expert] = await _asked(
            questions, expert, ask, prompt, concurrency, found, progress
        )
    await _score(questions, scorer, concurrency, found, progress)
    return found


async def _asked(
    questions: Questions,
    expert: str,
    ask: Ask,
    prompt: Prompt,
    concurrency: int,
    found: Collected,
    progress: Progress,
) -> list[Said | None]:
    said: list[Said | None] = [None] * len(questions)
    refused: list[str] = []
    failed: list[str] = []
    done = in_a_row = left = 0
    progress(f"asking {expert}", 0, len(questions))

    async def one(row: int) -> None:
        nonlocal done, in_a_row, left
        if in_a_row >= FAILED_IN_A_ROW:
            left += 1
            return
        try:
            said[row] = await ask(expert, prompt.messages(questions.examples[row].text))
            in_a_row = 0
        except AskRefused as error:
            refused.append(str(error))
            in_a_row = 0
        except AskFailed as error:
            failed.append(str(error))
            in_a_row += 1
        done += 1
        progress(f"asking {expert}", done, len(questions))

    await _each(range(len(questions)), one, concurrency)
    if refused:
        found.notes.append(f"{expert}: {len(refused)} calls are refused, the first: {refused[0]}")
    if failed:
        rest = f", and {left} more were not tried" if left else ""
        found.notes.append(f"{expert}: {len(failed)} calls failed{rest}; the first: {failed[0]}")
        found.unasked += len(failed) + left
    if cut := sum(answer is not None and answer.finish_reason == "length" for answer in said):
        found.notes.append(f"{expert}: {cut} answers are cut off at their greatest length")
    if empty := sum(answer is not None and not answer.text.strip() for answer in said):
        found.notes.append(f"{expert}: {empty} answers are empty, which counts as wrong")
    return said


async def _score(
    questions: Questions, scorer: Scorer, concurrency: int, found: Collected, progress: Progress
) -> None:
    todo = [
        (expert, row)
        for expert, said in found.said.items()
        for row, answer in enumerate(said)
        if answer is not None
    ]
    found.scores = {expert: [None] * len(questions) for expert in found.said}
    unread = found.unread
    done = in_a_row = left = 0
    progress("scoring", 0, len(todo))

    async def one(at: tuple[str, int]) -> None:
        nonlocal done, in_a_row, left
        if in_a_row >= FAILED_IN_A_ROW:
            left += 1
            return
        expert, row = at
        answer = found.said[expert][row]
        assert answer is not None
        try:
            score = await scorer(answer.text, questions.examples[row])
            in_a_row = 0
            if score is None:
                unread.append("there is no verdict")
        except AskRefused as error:
            score = None
            in_a_row = 0
            unread.append(str(error))
        except AskFailed as error:
            score = None
            in_a_row += 1
            unread.append(str(error))
            found.unasked += 1
        found.scores[expert][row] = score
        done += 1
        progress("scoring", done, len(todo))

    await _each(todo, one, concurrency)
    found.unasked += left
    if unread:
        rest = f", and {left} more were not tried" if left else ""
        found.notes.append(f"{len(unread)} answers could not be scored{rest}; first: {unread[0]}")


T = TypeVar("T")


async def _each(items: Iterable[T], work: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """All items, in their order, so many at a time; the first error ends the rest."""
    left = iter(items)

    async def worker() -> None:
        for item in left:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


def table_of(questions: Questions, found: Collected, prompt: Prompt) -> dict[str, list[Any]]:
    """The questions' own columns, and those of outcomes (`data.py`); columns of costs and tokens
    only where the service told them."""
    columns: dict[str, list[Any]] = {n: list(cells) for n, cells in questions.table.columns.items()}
    columns["in_chars"] = [prompt.chars(example.text) for example in questions.examples]
    for expert, scores in found.scores.items():
        columns[SCORE + expert] = list(scores)
    for expert, said in found.said.items():
        columns[OUT + expert] = [None if one is None else len(one.text) for one in said]
    told = ((COST, "cost_usd"), (IN_TOKENS, "prompt_tokens"), (OUT_TOKENS, "completion_tokens"))
    for prefix, field_ in told:
        for expert, said in found.said.items():
            cells = [None if one is None else getattr(one, field_) for one in said]
            if any(cell is not None for cell in cells):
                columns[prefix + expert] = cells
    for expert, said in found.said.items():
        columns[ANSWER + expert] = [None if one is None else one.text for one in said]
    return columns


def summary(found: Collected) -> list[dict[str, Any]]:
    """By expert: `answered`, `scored`, `mean` score, and `cost_usd` in all, None where it is not
    known of every answer."""
    rows = []
    for expert, said in found.said.items():
        answers = [one for one in said if one is not None]
        scores = [score for score in found.scores[expert] if score is not None]
        costs = [one.cost_usd for one in answers]
        known = [cost for cost in costs if cost is not None]
        rows.append(
            {
                "expert": expert,
                "answered": len(answers),
                "scored": len(scores),
                "mean": float(np.mean(scores)) if scores else None,
                "cost_usd": sum(known) if answers and len(known) == len(costs) else None,
            }
        )
    return rows
