"""Answer extractors: from free text to the short form in which answers are compared.

Pure functions of the text. Each returns None where the text holds no such answer; whoever
counts votes takes that as an abstention.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

Extractor = Callable[[str], str | None]

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])[-+]?\.\d+"
)

_STATED_CHOICE = re.compile(
    r"(?i:\b(?:answer|choice|option)\b(?:\s+is)?)\s*[:=]?\s*[*\"(\[]*"
    r"([A-HJ]\b|I\b(?!['’]|\s+\w))"
)
_LEADING_CHOICE = re.compile(r"\s*[*\"(\[]*([A-J])(?:[).:\]*\"]|\s*$)")
_BARE_CHOICE = re.compile(r"\W*([A-Ja-j])\W*")
_BRACKETED_CHOICE = re.compile(r"[(\[]([A-J])[)\]]")


def exact(text: str) -> str | None:
    """The whole text, white space collapsed, case folded."""
    return " ".join(text.split()).casefold() or None


def number(text: str) -> str | None:
    """The last number of the text as a plain decimal: `$1,234.50` and `1234.5` are equal.

    The last, because worked solutions end with their result (GSM8K's convention)."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    value = Decimal(found[-1].replace(",", "")).normalize()
    return format(value if value else Decimal(0), "f")


def choice(text: str) -> str | None:
    """The letter A to J of a multiple-choice answer, upper case.

    In order of trust: the last stated one ("the answer is (C)"), a leading one ("C." or "c"
    alone), the last one in brackets. A bare letter within a sentence is not taken: "A" and
    "I" are words.
    """
    stated = _STATED_CHOICE.findall(text)
    if stated:
        return str(stated[-1])
    leading = _LEADING_CHOICE.match(text) or _BARE_CHOICE.fullmatch(text)
    if leading:
        return leading[1].upper()
    bracketed = _BRACKETED_CHOICE.findall(text)
    return bracketed[-1] if bracketed else None


def literal(text: str) -> str | None:
    """A value as a program would print it, to the letter: outer white space and one pair of equal
    quotes off, so that `'ab'` and `ab` are the same. Case and inner spaces count."""
    value = text.strip()
    if len(value) > 1 and value[0] in "\"'" and value[-1] == value[0]:
        return value[1:-1]
    return value or None


def regex(pattern: str) -> Extractor:
    """The last match of `pattern`: its first group where it has one, else all of it.

    Raises ValueError for a pattern that is not a regular expression."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error

    def extract(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        if not matches:
            return None
        last = matches[-1]
        found = last[1] if compiled.groups else last[0]
        return exact(found) if found is not None else None

    return extract


EXTRACTORS: dict[str, Extractor] = {
    "exact": exact,
    "number": number,
    "choice": choice,
    "literal": literal,
}
"""By the name a policy gives. `regex` is made by `make_extractor` from the policy's pattern."""


def make_extractor(name: str, pattern: str | None) -> Extractor:
    """Raises ValueError, naming the remedy, for an unknown name or a missing or idle pattern."""
    if name == "regex":
        if pattern is None:
            raise ValueError("the regex extractor needs a pattern; add `pattern:`")
        return regex(pattern)
    if pattern is not None:
        raise ValueError(f"the {name} extractor takes no pattern; drop it or use `regex`")
    if name not in EXTRACTORS:
        known = ", ".join([*EXTRACTORS, "regex"])
        raise ValueError(f"there is no extractor {name!r}; known are {known}")
    return EXTRACTORS[name]
