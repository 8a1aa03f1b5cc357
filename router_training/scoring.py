"""How right an answer is, from 0 to 1, by what stands beside its question. Knows no file, and no
expert.

None means that nobody can say (a judge without a verdict): the outcome is missing. An answer in
which what was asked for cannot be found is wrong, as it would be for whoever asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import regex

from composer.strategies import extract
from router_training.errors import TrainingError
from router_training.numerals import equal, numeral

SEARCH_S = 1.0
"""Time to search one answer for a pattern; backtracking can be endless."""

TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Example:
    """A question and what is known of its right answer. `text` is the whole question, its options
    included; `choices` are the options again, in the order of their letters; `tests` is a program
    that raises where the code of an answer is wrong."""

    text: str
    gold: str | None = None
    choices: tuple[str, ...] = ()
    tests: str | None = None


@dataclass(frozen=True, slots=True)
class Lack:
    """Why an example cannot be scored: the column, what is wrong with it, and the remedy."""

    column: str
    message: str
    remedy: str


class Scorer(Protocol):
    @property
    def needs(self) -> str | None:
        """The column without which no example can be scored: `gold`, `tests`, or None."""
        ...

    def lack(self, example: Example) -> Lack | None:
        """What this example lacks, told before anybody is asked."""
        ...

    async def __call__(self, answer: str, example: Example) -> float | None:
        """0 to 1, None where nobody can say. `example` has no lack. A judge raises as its `Ask`."""
        ...


def _no_gold(example: Example) -> Lack | None:
    if example.gold is not None and example.gold.strip():
        return None
    return Lack("gold", "there is nothing", "Write the right answer, or leave the row out.")


@dataclass(frozen=True, slots=True)
class Exact:
    """Equal but for white space and case."""

    needs = "gold"

    def lack(self, example: Example) -> Lack | None:
        return _no_gold(example)

    async def __call__(self, answer: str, example: Example) -> float | None:
        return float(extract.exact(answer) == extract.exact(example.gold or ""))


@dataclass(frozen=True, slots=True)
class Regex:
    """With a pattern: its last match in the answer (its first group where it has one) equals the
    gold answer but for white space and case. Without: the gold answer is a pattern itself, to be
    found somewhere in the answer."""

    pattern: str | None = None

    needs = "gold"

    def __post_init__(self) -> None:
        if self.pattern is not None and (wrong := _not_a_pattern(self.pattern)):
            raise TrainingError(f"--pattern: {wrong}; mend it")

    def lack(self, example: Example) -> Lack | None:
        lack = _no_gold(example)
        if lack is None and self.pattern is None and (wrong := _not_a_pattern(example.gold or "")):
            return Lack("gold", wrong, "Mend it, or give --pattern: gold is then a plain text.")
        return lack

    async def __call__(self, answer: str, example: Example) -> float | None:
        gold = example.gold or ""
        try:
            if self.pattern is None:
                return float(regex.search(gold, answer, timeout=SEARCH_S) is not None)
            every = list(regex.finditer(self.pattern, answer, timeout=SEARCH_S))
        except TimeoutError:
            return None
        if not every:
            return 0.0
        found = every[-1]
        said = found[1] if found.re.groups else found[0]
        return float(extract.exact(said or "") == extract.exact(gold))


def _not_a_pattern(text: str) -> str | None:
    try:
        regex.compile(text)
    except regex.error as error:
        return f"{text!r} is not a regular expression: {error}"
    return None


@dataclass(frozen=True, slots=True)
class Numeric:
    """The number that the answer comes to (`numerals.py`) is the right one, within `tolerance` of
    it, relative to it."""

    tolerance: float = TOLERANCE

    needs = "gold"

    def lack(self, example: Example) -> Lack | None:
        lack = _no_gold(example)
        if lack is None and numeral(example.gold or "") is None:
            return Lack("gold", f"{example.gold!r} is no number", "Write one, or score otherwise.")
        return lack

    async def __call__(self, answer: str, example: Example) -> float | None:
        given, right = numeral(answer), numeral(example.gold or "")
        if given is None or right is None:
            return 0.0
        return float(equal(given, right, self.tolerance))


@dataclass(frozen=True, slots=True)
class Choice:
    """The letter of the answer (or an option's whole text, where options are known) is the right
    one."""

    needs = "gold"

    def lack(self, example: Example) -> Lack | None:
        lack = _no_gold(example)
        if lack is None and _letter(example.gold or "", example) is None:
            return Lack(
                "gold",
                f"{example.gold!r} is neither a letter nor one of the row's choices",
                "Write the letter of the right option.",
            )
        return lack

    async def __call__(self, answer: str, example: Example) -> float | None:
        return float(_letter(answer, example) == _letter(example.gold or "", example))


def _letter(text: str, example: Example) -> str | None:
    options = [extract.exact(option) for option in example.choices]
    if (whole := extract.exact(text)) in options:
        return chr(ord("A") + options.index(whole))
    return extract.choice(text)
