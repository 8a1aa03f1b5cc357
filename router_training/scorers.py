"""Scorers by name, and the one that runs code. Knows no file and no endpoint."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from router_training.asking import Ask
from router_training.errors import TrainingError
from router_training.judging import Judge, Mode
from router_training.sandbox import Sandbox
from router_training.scoring import (
    TOLERANCE,
    Choice,
    Exact,
    Example,
    Lack,
    Numeric,
    Regex,
    Scorer,
)

NAMES = ("exact", "regex", "numeric", "choice", "judge", "code")

_FENCED = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Code:
    """The answer's code, and after it the row's tests, come to their end and raise nothing: pass@1
    (Chen et al. 2021, arXiv 2107.03374, section 2). The two run apart where the tests' form allows
    it (`examiner.py`), so that the code cannot tell the verdict itself."""

    sandbox: Sandbox

    needs = "tests"

    def lack(self, example: Example) -> Lack | None:
        tests = example.tests or ""
        remedy = "Write a Python program that raises where the answer's code is wrong."
        if not tests.strip():
            return Lack("tests", "there is nothing", remedy)
        if not _parses(tests):
            return Lack("tests", "not Python", remedy)
        return None

    async def __call__(self, answer: str, example: Example) -> float | None:
        code = code_of(answer)
        if code is None:
            return 0.0
        return float((await self.sandbox.run(code, example.tests or "")).passed)


def code_of(answer: str) -> str | None:
    """The longest fenced block that is Python, else the whole text if it is; None where there is
    neither. The longest, because examples of use and corrections of a line are short."""
    blocks = [block for tag, block in _FENCED.findall(answer) if tag.lower() in _TAGS]
    for block in sorted(blocks, key=len, reverse=True):
        if _parses(block):
            return str(block)
    return answer if _parses(answer) else None


_TAGS = ("", "py", "python", "python3")


def _parses(text: str) -> bool:
    try:
        return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def make_scorer(
    name: str,
    *,
    pattern: str | None = None,
    tolerance: float | None = None,
    ask: Ask | None = None,
    judge: str | None = None,
    mode: Mode | None = None,
    sandbox: Sandbox | None = None,
) -> Scorer:
    """A setting that is None is at its default. Raises TrainingError for an unknown name, a setting
    of another scorer, or one that is missing."""
    if name not in NAMES:
        raise TrainingError(f"there is no scorer {name!r}; there are: {', '.join(NAMES)}")
    given = {
        "pattern": pattern,
        "tolerance": tolerance,
        "judge": judge,
        "judge-mode": mode,
        "allow-code": sandbox,
    }
    idle = [s for s, v in given.items() if v is not None and s not in _SETTINGS.get(name, ())]
    if idle:
        raise TrainingError(f"the scorer {name} takes no --{idle[0]}; leave it out")
    if name == "regex":
        return Regex(pattern)
    if name == "numeric":
        return Numeric(TOLERANCE if tolerance is None else tolerance)
    if name == "judge":
        if judge is None or ask is None:
            raise TrainingError("the scorer judge needs an expert that grades; add --judge EXPERT")
        return Judge(ask, judge, mode or "grade")
    if name == "code":
        if sandbox is None:
            raise TrainingError(
                "the scorer code runs what experts write; add --allow-code if you want that"
            )
        return Code(sandbox)
    return Exact() if name == "exact" else Choice()


_SETTINGS = {
    "regex": ("pattern",),
    "numeric": ("tolerance",),
    "judge": ("judge", "judge-mode"),
    "code": ("allow-code",),
}
