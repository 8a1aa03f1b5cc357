"""The number that an answer comes to, exactly: `$1,234.50`, `3/4`, `\\boxed{\\frac{1}{2}}`, `2e-3`.
Knows nothing of questions and of right answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_SPACE = "\u00a0\u202f\u2009"  # no-break, narrow no-break and thin: they stand between thousands
_WHOLE = rf"(?:\d{{1,3}}(?:[,{_SPACE}]\d{{3}})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\w))?"
_MIXED = r"(?P<mixed>\d+)\s+(?P<part>\d+)\s*/\s*(?P<of>\d+)"
_RATIO = rf"(?P<top>{_DECIMAL})(?:\s*/\s*(?P<bottom>{_DECIMAL}))?"
_POWER = r"(?:\s*(?:×|\*|x|\\times|\\cdot)\s*10\s*\^\s*\{?\s*(?P<power>[-+]?\d{1,3})\s*\}?)"
_NUMBER = re.compile(
    rf"(?<![\w.^])(?P<sign>[-+−])?[$€£¥]?(?:{_MIXED}|{_RATIO}{_POWER}?)"
    r"(?P<percent>\s*(?:%|percent\b))?"
)
_FRACTION = re.compile(
    r"\\[dt]?frac\s*\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}|\\[dt]?frac(\d)(\d)"
)
_NOISE = re.compile(r"\\[,;!: ]|\\(?:left|right|displaystyle)\b|\{,\}")
_NAMED = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}")
_STATED = re.compile(r"(?i:####|\banswer\b(?:\s+is)?\s*[:=]?)")


_LONGEST = 500


@dataclass(frozen=True, slots=True)
class Numeral:
    """`percent`: it was written with a percent sign, which `value` leaves out."""

    value: Fraction
    percent: bool = False


def numeral(text: str) -> Numeral | None:
    """In order of trust: the last number in the last `\\boxed{…}`, the first one after the last
    "####" or "answer is", the last one of the text. None where there is none."""
    if (box := _boxed(text)) is not None:
        found = _numerals(re.sub(r"^\s*([-−])\s+", r"\1", box))
        return found[-1] if found else None
    text = text.replace("**", "")
    for stated in reversed(list(_STATED.finditer(text))):
        # As far as the line goes: what follows is another thought.
        if found := _numerals(text[stated.end() :].lstrip().split("\n", 1)[0]):
            return found[0]
    found = _numerals(text)
    return found[-1] if found else None


def equal(given: Numeral, right: Numeral, tolerance: float) -> bool:
    """Within `tolerance` of the right one, relative to it (absolute where it is 0). A percent sign
    is a unit that may be left out; where one side alone has it, 50 % may also be 0.5."""
    values = [given.value]
    if given.percent != right.percent:
        values.append(given.value / 100 if given.percent else given.value * 100)
    room = Fraction(tolerance) * (abs(right.value) or 1)
    return any(abs(value - right.value) <= room for value in values)


def _boxed(text: str) -> str | None:
    """The inside of the last `\\boxed{…}`, braces matched."""
    at = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if at < 0:
        return None
    begin = text.index("{", at) + 1
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[begin:end]
    return text[begin:]


def _numerals(text: str) -> list[Numeral]:
    text = _NAMED.sub(r" \1 ", text).replace("\\%", "%").replace("\\$", "$")
    text = _NOISE.sub(lambda noise: "," if noise[0] == "{,}" else "", text)
    text = _FRACTION.sub(_ratio, text)
    found = []
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None:
            found.append(Numeral(value, match["percent"] is not None))
    return found


def _ratio(fraction: re.Match[str]) -> str:
    """A whole number before it makes it a mixed number, as it is read."""
    mixed = fraction.string[fraction.start() - 1 : fraction.start()].isdigit()
    return f"{' ' * mixed}{fraction[1] or fraction[3]}/{fraction[2] or fraction[4]}"


def _value(match: re.Match[str]) -> Fraction | None:
    """None where it is divided by nothing, or longer than any number that is meant."""
    if len(match[0]) > _LONGEST:
        return None
    mixed = match["mixed"] is not None
    top, bottom = ("part", "of") if mixed else ("top", "bottom")
    below = _fraction(match[bottom] or "1")
    if not below:
        return None
    value = int(match["mixed"] or 0) + _fraction(match[top]) / below
    value *= Fraction(10) ** int(match["power"] or 0)
    return -value if match["sign"] in ("-", "−") else value


def _fraction(written: str) -> Fraction:
    return Fraction(re.sub(rf"[,{_SPACE}]", "", written))
