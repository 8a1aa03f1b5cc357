"""What a gate is trained on: prompts with their answers, some of them an expert's own. Knows no
model and no gate."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from router_training.errors import DataError, Problems, TrainingError
from router_training.tables import Table, read_table


@dataclass(frozen=True, slots=True)
class Question:
    """`expert`: whose training data it is of; None: of nobody's alone."""

    prompt: str
    answer: str
    expert: str | None = None


@dataclass(frozen=True, slots=True)
class Questions:
    """`digest` is that of the texts, in their order."""

    source: str
    rows: tuple[Question, ...]

    @property
    def digest(self) -> str:
        seen = hashlib.sha256()
        for row in self.rows:
            seen.update(f"{row.prompt}\0{row.answer}\0{row.expert or ''}\0".encode())
        return f"sha256:{seen.hexdigest()}"

    def of(self, expert: str) -> tuple[Question, ...]:
        """An expert's own. Raises TrainingError where it has none."""
        own = tuple(row for row in self.rows if row.expert == expert)
        if not own:
            raise TrainingError(
                f"{self.source} has no question of {expert!r}; give it some, with its name in the "
                "column `expert`"
            )
        return own

    def check_experts(self, members: Sequence[str]) -> None:
        """Raises TrainingError where a question is of an expert that is no member."""
        strangers = sorted({r.expert for r in self.rows if r.expert} - set(members))
        if strangers:
            raise TrainingError(
                f"{self.source} has questions of {', '.join(map(repr, strangers[:5]))}, which the "
                f"gate has no adapter of; name its adapter, or leave the questions out (the "
                f"members: {', '.join(members)})"
            )


def read_questions(path: Path) -> Questions:
    """Columns `prompt`, `answer` and, where there is one, `expert` (or `skill`), of CSV, JSON lines
    or parquet. Raises DataError, naming line and remedy."""
    table = read_table(path)
    for name in ("prompt", "answer"):
        if name not in table.columns:
            has = ", ".join(table.columns)
            raise DataError.of(
                str(path),
                f"there is no column {name!r} among {has}",
                "A gate is trained on columns `prompt` and `answer`; `expert` says whose it is.",
                column=name,
            )
    problems = Problems(str(path))
    owner = next((name for name in ("expert", "skill") if name in table.columns), None)
    rows = []
    for i, line in enumerate(table.lines):
        prompt, answer = (_text(table, name, i, line, problems) for name in ("prompt", "answer"))
        expert = None if owner is None else table.columns[owner][i]
        if expert is not None and not isinstance(expert, str):
            problems.add(line, owner or "", f"{expert!r} is no name", "Write the expert's name.")
        rows.append(Question(prompt, answer, expert))
    problems.settle()
    return Questions(path.name, tuple(rows))


def _text(table: Table, name: str, i: int, line: int, problems: Problems) -> str:
    value = table.columns[name][i]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a number in JSON is its text
    if not isinstance(value, str):
        what = "nothing" if value is None else f"{value!r}, which is no text"
        problems.add(line, name, f"there is {what}", "Write the text, or delete the line.")
        return ""
    return value
