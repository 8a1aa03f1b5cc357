"""An expert's `prompt:` block: how a person's free wording becomes the prompt the expert was trained on.

Knows nothing about models, tokenizers or where the block was read from. A small or narrow expert
often understands one fixed form only, for instance ``uppercase fox``; its block says how to find
the input in "can you make this uppercase: fox" and how to write it down again::

    prompt:
      lower: true                        # read and fill in lower case
      template: "uppercase {word}"       # what the expert is given
      extract:                           # tried in order until every field of the template is filled
        - regex: '"(?P<word>[a-z]+)"'    # a quoted word; the group's name is the field
        - leftover: '[a-z]{2,}'          # else the last token that is no request word
          field: word
          take: last
          ignore: [uppercase, capital, capitals, letters]
      otherwise: pass                    # nothing found: give the message unchanged (or: refuse)

Every step looks at the whole message and fills those of its fields that are still empty, so one
step may find the letter and a later one the word. Curly quotes are read as straight ones.
"""

from __future__ import annotations

import re
from functools import lru_cache
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from composer.errors import Unsupported

MAX_CHARS = 1000
"""Longer messages are not searched, and count as "nothing found".

Python's `re` has no time limit. Patterns whose time grows exponentially are refused when the
block is read (`_refuse_nested_repeats`); what can remain is polynomial, and this bounds it.
"""

COMMON_WORDS = frozenset(
    # Function words.
    "a about above after again all also am an and another any are as at away back be because been "
    "before being below both but by came can cannot come could did do does doing done down each "
    "either else every few for from further had has have having he her here hers him his how "
    "however i if in instead into is it its itself just like many may me might mine more most much "
    "must my myself need needs no nor not now of off on once one only onto or other others our ours "
    "out over own per quite rather really same shall she should since so some such than that the "
    "their theirs them then there these they thing things this those through to together too under "
    "until up upon us very via was we were what whatever when where whether which while who whole "
    "whom whose why will with within without would yet you your yours "
    # Words of requests and courtesy.
    "actually alright answer appreciate ask asking basically below change check choose computer "
    "convert create curious dear display ensure exactly express figure final find following form "
    "get getting give given gives giving go going goes got great grateful gotta guess handle hello "
    "help hey hi hoping input instruction item kindly know let lets look looking love make makes "
    "making mean means mind need needed obtain ok okay output perform perhaps please pls possible "
    "print prints process produce provide provided put question quick quickly read receive render "
    "replace replacing reply request respond response result return returned returning say see send "
    "shape shortly show simply solve somebody someone something sort spell start stuff supply sure "
    "take task tell text thank thanks thanx thx transform translate trying turn turned turning type "
    "understand use using value version wanna want wanted wants way wish wonder wondering work write "
    "writes writing written wrote yes "
    # Contractions without their apostrophe, as hurried people type them.
    "cant didnt doesnt dont id ill im isnt ive id lets theres thats whats wheres whos wont wouldnt".split()
)
"""English words that a request may hold around its input; `leftover` steps skip them."""

_TOKEN = re.compile(r"[^\W_]+(?:['\-][^\W_]+)*")
_STRAIGHT = str.maketrans(
    {"“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "‚": "'"}
)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _check_pattern(pattern: str) -> str:
    try:
        _compiled(pattern)
    except re.error as error:
        raise ValueError(
            f"the pattern {pattern!r} does not compile ({error}): correct it, and write it in "
            "single quotes, in which YAML leaves backslashes alone"
        ) from None
    _refuse_nested_repeats(pattern)
    return pattern


def _refuse_nested_repeats(pattern: str) -> None:
    """Refuses an unbounded repeat of a group that itself repeats or branches, e.g. ``(a+)+``.

    Such a pattern can take time exponential in the message's length. The test reads the pattern's
    text only, so it also refuses some that are harmless; a bound such as ``{0,5}`` always passes.
    """
    # Escapes and character classes hold no operators: blank them out first.
    text = re.sub(r"\\.", "__", pattern, flags=re.DOTALL)
    text = re.sub(r"\[\^?\]?[^\]]*\]", "_", text)
    unbounded = re.compile(r"[*+]|\{\d*,\}")
    risky: list[bool] = []  # per open group: does it repeat without bound, or branch?
    for i, char in enumerate(text):
        if char == "(":
            risky.append(False)
        elif char == ")" and risky:
            inner = risky.pop()
            repeated = unbounded.match(text, i + 1) is not None
            if inner and repeated:
                raise ValueError(
                    f"the pattern {pattern!r} repeats without bound a group that itself repeats or "
                    "branches, which can take exponential time: give the outer repeat a bound such "
                    "as {0,5}"
                )
            if risky and (inner or repeated):
                risky[-1] = True
        elif risky and (char == "|" or unbounded.match(text, i)):
            risky[-1] = True


class RegexStep(BaseModel):
    """Searches the message for a pattern; its named groups are fields of the template."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    regex: str = Field(
        min_length=1,
        description="Python regular expression with at least one named group, e.g. `(?P<word>[a-z]+)`.",
    )

    _pattern = field_validator("regex")(_check_pattern)

    @field_validator("regex")
    @classmethod
    def _has_named_groups(cls, pattern: str) -> str:
        if not _compiled(pattern).groupindex:
            raise ValueError(
                f"the pattern {pattern!r} has no named group: name what it finds after a field of "
                "the template, e.g. (?P<word>[a-z]+)"
            )
        return pattern

    @property
    def fields(self) -> frozenset[str]:
        """The fields that this step can fill."""
        return frozenset(_compiled(self.regex).groupindex)

    def find(self, text: str) -> dict[str, str]:
        """The groups of the first match that took part in it; empty when nothing matches."""
        match = _compiled(self.regex).search(text)
        return {} if match is None else {k: v for k, v in match.groupdict().items() if v}


class LeftoverStep(BaseModel):
    """Takes a token of the message that is left when request words are put aside.

    Tokens are runs of letters and digits, with inner hyphens and apostrophes; a possessive ``'s``
    is dropped. A token is left over when the pattern matches all of it and it is neither in
    `ignore` nor, unless `common` is false, one of `COMMON_WORDS`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    leftover: str = Field(min_length=1, description="Pattern that the whole token must match.")
    field: str = Field(min_length=1, description="The template's field that is filled.")
    take: Literal["first", "last", "longest"] = Field(
        default="last", description="Which of several tokens; among the longest, the last."
    )
    ignore: tuple[str, ...] = Field(
        default=(), description="Words that are not the input, in any case, e.g. `letters`."
    )
    common: bool = Field(default=True, description="Skip common English request words too.")

    _pattern = field_validator("leftover")(_check_pattern)

    @property
    def fields(self) -> frozenset[str]:
        """The one field that this step can fill."""
        return frozenset({self.field})

    def find(self, text: str) -> dict[str, str]:
        """The chosen token, or an empty dict when none is left."""
        ignored = _lowered(self.ignore)
        pattern = _compiled(self.leftover)
        left = []
        for match in _TOKEN.finditer(text):
            token = match.group().removesuffix("'s")
            word = token.lower()
            if word in ignored or (self.common and word in COMMON_WORDS):
                continue
            if pattern.fullmatch(token):
                left.append(token)
        if not left:
            return {}
        if self.take == "first":
            return {self.field: left[0]}
        if self.take == "last":
            return {self.field: left[-1]}
        return {self.field: max(reversed(left), key=len)}


@lru_cache(maxsize=4096)
def _lowered(words: tuple[str, ...]) -> frozenset[str]:
    return frozenset(word.lower() for word in words)


def _kind(step: Any) -> str | None:
    """Which step it is, by its first key, so that errors speak of that kind alone."""
    if isinstance(step, RegexStep):
        return "regex"
    if isinstance(step, LeftoverStep):
        return "leftover"
    if isinstance(step, dict):
        return next((kind for kind in ("regex", "leftover") if kind in step), None)
    return None


Step = Annotated[
    Annotated[RegexStep, Tag("regex")] | Annotated[LeftoverStep, Tag("leftover")],
    Discriminator(
        _kind,
        custom_error_type="extract_step",
        custom_error_message="an extract step has the key `regex` or `leftover`: add one of them",
    ),
]


class PromptSpec(BaseModel):
    """The `prompt:` block of an expert: see the module's text for an example."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str = Field(
        description="What the expert is given, with named fields, e.g. `uppercase {word}`."
    )
    extract: tuple[Step, ...] = Field(
        min_length=1, description="Steps, tried in order until every field is filled."
    )
    lower: bool = Field(default=False, description="Read the message in lower case.")
    otherwise: Literal["pass", "refuse"] = Field(
        default="pass",
        description="When a field stays empty: give the message unchanged, or refuse the request.",
    )

    @property
    def fields(self) -> tuple[str, ...]:
        """The template's fields in their order, each once."""
        return tuple(dict.fromkeys(_fields(self.template)))

    @field_validator("template")
    @classmethod
    def _has_plain_fields(cls, template: str) -> str:
        if not _fields(template):
            raise ValueError(
                f"the template {template!r} has no field: write what is found as a named field, "
                'e.g. "uppercase {word}"'
            )
        return template

    @model_validator(mode="after")
    def _steps_fit_the_template(self) -> Self:
        wanted = set(self.fields)
        found = set().union(*(step.fields for step in self.extract))
        if missing := sorted(wanted - found):
            raise ValueError(
                f"no extract step fills {_quoted(missing)}: add a step with that field, "
                "or take the field out of the template"
            )
        if unused := sorted(found - wanted):
            raise ValueError(
                f"the template has no field {_quoted(unused)}, which an extract step fills: rename "
                "it after a field of the template, or make the group unnamed with (?:…)"
            )
        return self


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _fields(template: str) -> list[str]:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"the template {template!r} is malformed ({error}): write a field as {{name}} and a "
            "brace that is meant as such twice, {{ or }}"
        ) from None
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(
                f"the template {template!r} has a field that is not a plain name: write it as "
                "{name}, without index, attribute or format"
            )
        names.append(name)
    return names


def extract(spec: PromptSpec, text: str) -> dict[str, str] | None:
    """The template's fields as found in a message, or None when one of them is not found.

    Args:
        text: a person's message; beyond `MAX_CHARS` characters it is not searched.
    """
    if len(text) > MAX_CHARS:
        return None
    text = text.translate(_STRAIGHT)
    if spec.lower:
        text = text.lower()
    found: dict[str, str] = {}
    for step in spec.extract:
        if step.fields <= found.keys():
            continue
        # What earlier steps found stays: they are the more certain ones.
        found = step.find(text) | found
        if len(found) == len(spec.fields):
            return found
    return None


def render(spec: PromptSpec, text: str) -> str:
    """The prompt for the expert: the filled template, or the message itself where `otherwise: pass`.

    Raises:
        Unsupported: a field is not found in the message and the block says `otherwise: refuse`.
    """
    found = extract(spec, text)
    if found is not None:
        return spec.template.format(**found)
    if spec.otherwise == "pass":
        return text
    raise Unsupported(
        f"the expert found no {' and '.join(spec.fields)} in the message: put the input in quotes "
        f"or after a colon, in a message of at most {MAX_CHARS} characters",
        param="messages",
    )
