"""What can be read off a query's text by rule: its question, its answer options, its format.
Knows no label and no model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from composer.types import FloatArray

MAX_CHARS = 20_000
"""Characters of a text that are read; an embedding model reads no further either."""

# At the start of a line "A." and "A:" do; within one "by A. Smith and B. Jones" is no list.
_LINE = re.compile(r"^[ \t]*(?P<open>\(?)A(?P<close>[.):])(?=\s)", re.MULTILINE)
_INLINE = re.compile(r"(?<!\S)(?P<open>\(?)A(?P<close>\))(?=\s)")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Reading:
    """`text` is what is read of the `whole`: its first MAX_CHARS. `stem` is the text before its
    first answer option, all of it where there is none or nothing stands before them. `options` are
    the answers, without their letters."""

    whole: str
    text: str
    stem: str
    options: tuple[str, ...]


def read(text: str) -> Reading:
    """Answer options are a list of at least two, lettered from A in one style: "A. …", "A: …" or
    "(A) …" at the start of lines, "A) …" and "(A) …" within a line as well."""
    whole, text = text, text[:MAX_CHARS]
    for pattern, lead in ((_LINE, r"^[ \t]*"), (_INLINE, r"(?<!\S)")):
        endless: set[tuple[str, str]] = set()
        for first in pattern.finditer(text):
            style = (first["open"], first["close"])
            if style in endless:
                continue
            marks = _marks(text, first, lead)
            if len(marks) > 1:
                ends = [start for start, _ in marks[1:]] + [len(text)]
                options = tuple(
                    text[after:end].strip() for (_, after), end in zip(marks, ends, strict=True)
                )
                stem = text[: marks[0][0]].rstrip()
                return Reading(whole, text, stem or text, options)
            # Behind a later A there is no B either: thousands of them must not cost a search each.
            endless.add(style)
    return Reading(whole, text, text, ())


def _marks(text: str, first: re.Match[str], lead: str) -> list[tuple[int, int]]:
    """Where the letters of a list that begins here start and end, in order."""
    before, after = re.escape(first["open"]), re.escape(first["close"])
    found = [(first.start(), first.end())]
    for letter in LETTERS[1:]:
        pattern = re.compile(rf"{lead}{before}{letter}{after}(?=\s)", re.MULTILINE)
        match = pattern.search(text, found[-1][1])
        if match is None:
            break
        found.append((match.start(), match.end()))
    return found


Measure = Callable[[Reading], float]

_NUMBER = re.compile(r"-?\d[\d,.]*")


def _share(inside: Callable[[str], bool], text: str) -> float:
    return sum(map(inside, text)) / (len(text) + 1)


def _log(count: int | float) -> float:
    return float(np.log1p(count))


def _count(marks: str) -> Measure:
    return lambda r: _log(sum(map(r.text.count, marks)))


def _of_options(measure: Callable[[Sequence[str]], float | np.floating]) -> Measure:
    return lambda r: float(measure(r.options)) if r.options else 0.0


def _says(phrase: str) -> Measure:
    return lambda r: float(phrase in r.text.lower())


PHRASES = (
    "which of the following", " not ", "except", "calculate", "find", "determine", "what is",
    "how many", "how much", "write a function", "assert", "def ", "return", "statement", "suppose",
    "consider", "according to", "____", "prove", "true", "false", "why", "who", "best",
    "most likely", "all of the above", "none of the above", "always", "python", "if ",
)  # fmt: skip
"""Turns of phrase that tell kinds of question apart whatever their subject."""

FORMAT: tuple[tuple[str, Measure], ...] = (
    ("length", lambda r: _log(len(r.text))),
    ("stem_length", lambda r: _log(len(r.stem))),
    ("words", lambda r: _log(len(r.text.split()))),
    ("word_length", lambda r: len(r.text) / (len(r.text.split()) + 1)),
    ("digits", lambda r: _share(str.isdigit, r.text)),
    ("numbers", lambda r: _log(len(_NUMBER.findall(r.stem)))),
    ("longest_number", lambda r: _log(max(map(len, _NUMBER.findall(r.stem)), default=0))),
    ("capitals", lambda r: _share(str.isupper, r.stem)),
    ("not_ascii", lambda r: _share(lambda c: c > "\x7f", r.text)),
    ("lines", _count("\n")),
    ("dollars", _count("$")),
    ("backslashes", _count("\\")),
    ("brackets", _count("{}[]()")),
    ("operators", _count("=+-*/^<>")),
    ("quotes", _count("\"'")),
    ("commas", _count(",")),
    ("full_stops", _count(".")),
    ("asks", lambda r: float("?" in r.stem)),
    ("ends_asking", lambda r: float(r.stem.rstrip().endswith("?"))),
    ("ends_stating", lambda r: float(r.stem.rstrip().endswith((".", ":")))),
    ("begins_small", lambda r: float(r.stem[:1].islower())),
    ("options", lambda r: float(len(r.options))),
    ("option_length", _of_options(lambda o: _log(float(np.mean([len(x) for x in o]))))),
    ("option_spread", _of_options(lambda o: _log(float(np.std([len(x) for x in o]))))),
    ("options_numeric", _of_options(lambda o: np.mean([any(map(str.isdigit, x)) for x in o]))),
    ("options_sentences", _of_options(lambda o: np.mean([x.endswith(".") for x in o]))),
    ("options_small", _of_options(lambda o: np.mean([x[:1].islower() for x in o]))),
    ("options_repeated", _of_options(lambda o: float(len(set(o)) < len(o)))),
    *((f"says {phrase.strip()!r}", _says(phrase)) for phrase in PHRASES),
)  # fmt: skip
"""Every format feature: its name and how it is measured. Counts and lengths are logarithms."""


def measured(readings: Sequence[Reading]) -> FloatArray:
    """(n, f) the format features in the order of FORMAT."""
    return np.array([[m(r) for _, m in FORMAT] for r in readings], np.float32).reshape(
        len(readings), len(FORMAT)
    )


_TOKEN = re.compile(r"\\[a-z]+|[^\W\d_]+|\d+|[^\w\s]|_")


def words_of(text: str) -> list[str]:
    """Words, marks and TeX commands in lower case, then pairs of neighbours ("a b"). Of a number
    only its length counts, up to 4 digits: that it is one says more than which. A language written
    without spaces gives long words that hardly repeat."""
    single = [
        "0" * min(len(token), 4) if token[0].isdigit() else token
        for token in _TOKEN.findall(text[:MAX_CHARS].lower())
    ]
    return single + [f"{a} {b}" for a, b in pairwise(single)]


PIECES = range(2, 6)
MAX_PIECED = 2_000
"""Characters of a text that are cut into pieces: there are four times as many."""


def pieces_of(text: str) -> list[str]:
    """Pieces of 2 to 5 characters of each word in lower case, a space at either end of it: what
    wordings have in common whose words differ by an ending or a slip."""
    pieces: list[str] = []
    for word in text[:MAX_PIECED].lower().split():
        padded = f" {word} "
        for size in PIECES:
            pieces += [padded[i : i + size] for i in range(max(1, len(padded) - size + 1))]
            if size >= len(padded):  # the word is one piece, and so it would be again
                break
    return pieces
