"""What is wrong with the data a router should be trained on, or with who should answer for it.
Knows no format."""

from __future__ import annotations

from collections.abc import Sequence

from composer.errors import ComposerError, Problem

SHOWN = 20
"""Problems told at once: enough to mend a file in a few rounds, few enough to read."""


class DataError(ComposerError):
    """The data cannot be used as it is. `problems` holds the first SHOWN of `found`."""

    code = "invalid_data"

    def __init__(self, problems: Sequence[Problem], found: int | None = None) -> None:
        self.problems = tuple(problems[:SHOWN])
        self.found = len(problems) if found is None else found
        lines = [str(problem) for problem in self.problems]
        if self.found > len(self.problems):
            lines.append(f"… and {self.found - len(self.problems)} more")
        super().__init__("\n".join(lines))

    @classmethod
    def of(cls, file: str, message: str, remedy: str, *, column: str = "") -> DataError:
        """Of one problem that has no line."""
        return cls([Problem(file, column, message, remedy)])


class Problems:
    """All that is wrong with one file, until `settle` raises it."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._first: list[Problem] = []
        self.found = 0

    def add(self, line: int | None, column: str, message: str, remedy: str) -> None:
        """`line` counts from 1; None where the whole column is meant."""
        self.found += 1
        if len(self._first) < SHOWN:
            self._first.append(Problem(self.file, column, message, remedy, line))

    def settle(self) -> None:
        """Raises DataError if anything was added, the topmost lines first."""
        if self.found:
            raise DataError(sorted(self._first, key=lambda p: p.line or 0), self.found)


class TrainingError(ComposerError):
    """The data can be read, and what was asked cannot be done with it: "what is wrong; the
    remedy"."""

    code = "cannot_train"


class NoBudget(TrainingError):
    """None of the budgets can be kept: even the cheapest choice costs more."""

    code = "no_budget"


class AskError(TrainingError):
    """A call of an expert got no answer. Raised itself where no call of any expert can get one:
    nobody is there, the key is wrong, there is no such expert."""

    code = "cannot_ask"


class AskRefused(AskError):
    """This call will not be answered as it stands (too long, not able): asking again is no use."""

    code = "ask_refused"


class AskFailed(AskError):
    """The expert's server failed, or had no room for as long as was waited: it may answer later."""

    code = "ask_failed"
