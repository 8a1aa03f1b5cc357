"""An expert's `prompt:` block: turns a person's free wording into the prompt the expert knows.

Knows nothing about models, tokenizers or where the block was read from. A small or narrow expert
often understands one fixed form only, for instance ``uppercase fox``; its block says how to find
the input in "can you make this uppercase: fox" and how to write it down again::

    prompt:
      lower: true                        # read and fill in lower case
      template: "uppercase {word}"       # what the expert is given
      ignore: [uppercase, capitals]      # never the input, beside common English words
      extract:                           # tried in order until every field is filled
        - regex: '"(?P<word>[a-z]+)"'    # a quoted word; the group's name is the field
        - regex: '(?P<word>[a-z]+) in capitals'
          skip: request                  # but not "writing in capitals"
        - leftover: '[a-z]{2,}'          # else the last token that is not to be skipped
          field: word
      otherwise: pass                    # nothing found: give the message unchanged (or: refuse)

Every step looks at the whole message and fills those of its fields that are still empty, so one
step may find the letter and a later one the word. Curly quotes are read as straight ones.

What a step skips: ``none``, nothing; ``function``, the block's `ignore` words, function words and
courtesy (the, with, please); ``request``, those, the block's `context` words, and words that
requests are made of (make, write, word, letters). Where an input may itself be such a word, end
with a step that skips less.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from string import Formatter
from time import thread_time
from typing import Annotated, Any, Literal, Self

import regex
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from regex import Match, Pattern

from composer.errors import Unsupported
from composer.wording import Skip, Skipped, is_skipped, skipped_words

log = logging.getLogger(__name__)

MAX_CHARS = 1000
"""Longer messages are not searched, and count as "nothing found"."""

MAX_SECONDS = 0.05
"""Time to search one message, which then counts as "nothing found", with a warning in the log.

Messages are read on the event loop, and backtracking is slow without anyone's malice: two `.*`
between three fields take time that grows with the fourth power of the message's length. The time
is this thread's on the processor; the examples' blocks take 0.07 ms, and 5 ms at most.
There is no such limit on compiling a pattern, where `(.{1000000}){1000}` asks for all memory:
read a stranger's card before you serve it.
"""

MAX_EARLIER = 4
"""Messages before the last that are searched where that one has no input."""

_TOKEN = regex.compile(r"[^\W_]+(?:['\-][^\W_]+)*")
_STRAIGHT = str.maketrans(
    {"“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "‚": "'"}
)


@lru_cache(maxsize=16_384)
def _compiled(pattern: str) -> Pattern[str]:
    """Kept, as a step asks for it at each message; one that was dropped costs half a millisecond.

    V0 is the library's name for the meaning that a pattern has in Python's `re`.
    """
    return regex.compile(pattern, regex.V0)


def _check_pattern(pattern: str) -> str:
    try:
        _compiled(pattern)
    except (regex.error, ValueError, RecursionError) as error:  # flags, nesting: not regex.error
        raise ValueError(
            f"the pattern {pattern!r} does not compile ({error}): correct it, and write it in "
            "single quotes, in which YAML leaves backslashes alone"
        ) from None
    return pattern


class _Budget:
    """What is left of the time to search one message, in seconds."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def run(
        self, match: Callable[..., Match[str] | None], text: str, start: int = 0
    ) -> Match[str] | None:
        """Calls a pattern's `search` or `fullmatch`. Raises TimeoutError when the time is up."""
        while self.left > 0:  # the library takes a negative limit for none
            began = thread_time()
            try:
                return match(text, start, timeout=self.left)
            except TimeoutError:
                # The library's clock counts all threads of the process: while another one loads
                # a model, it runs out within a search that has hardly begun. Ours decides.
                pass
            finally:
                self.left -= thread_time() - began
        raise TimeoutError


class RegexStep(BaseModel):
    """Searches the message for a pattern; its named groups are fields of the template."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    regex: str = Field(
        min_length=1,
        description=(
            "Python regular expression (read by the `regex` library) with a named group per "
            "field, `(?P<word>[a-z]+)`."
        ),
    )
    skip: Skip = Field(
        default="none", description="Pass over matches in which a field is such a common word."
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
    def pattern(self) -> Pattern[str]:
        """`regex`, compiled."""
        return _compiled(self.regex)

    @property
    def fields(self) -> frozenset[str]:
        """The fields that this step can fill."""
        return frozenset(self.pattern.groupindex)

    def find(self, text: str, skipped: Skipped, budget: _Budget) -> dict[str, str]:
        """The groups that took part in the first acceptable match; empty without one.

        Raises:
            TimeoutError: the budget is spent.
        """
        search, start = self.pattern.search, 0
        while (match := budget.run(search, text, start)) is not None:
            found = {name: value for name, value in match.groupdict().items() if value}
            passed = [n for n in found if is_skipped(found[n], skipped[self.skip])]
            if not passed:
                return found
            # Just behind the skipped word, not behind the match: what follows may be in it. A
            # word found by looking behind may end where this search began: go on all the same.
            start = max(start + 1, min(match.end(name) for name in passed))
        return {}


class LeftoverStep(BaseModel):
    """Takes a token of the message that is left when common words are put aside.

    Tokens are runs of letters and digits, with inner hyphens and apostrophes; a possessive ``'s``
    is dropped. A token is left over when the pattern matches all of it and it is not skipped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    leftover: str = Field(min_length=1, description="Pattern that the whole token must match.")
    field: str = Field(min_length=1, description="The template's field that is filled.")
    take: Literal["first", "last", "longest"] = Field(
        default="last", description="Which of several tokens; among the longest, the last."
    )
    skip: Skip = Field(default="request", description="Which common words are put aside.")

    _pattern = field_validator("leftover")(_check_pattern)

    @property
    def pattern(self) -> Pattern[str]:
        """`leftover`, compiled."""
        return _compiled(self.leftover)

    @property
    def fields(self) -> frozenset[str]:
        """The one field that this step can fill."""
        return frozenset({self.field})

    def find(self, text: str, skipped: Skipped, budget: _Budget) -> dict[str, str]:
        """The chosen token, or an empty dict when none is left.

        Raises:
            TimeoutError: the budget is spent.
        """
        fullmatch = self.pattern.fullmatch
        left = [
            token.removesuffix("'s")
            for token in _TOKEN.findall(text)
            if not is_skipped(token, skipped[self.skip])
            and budget.run(fullmatch, token.removesuffix("'s"))
        ]
        if not left:
            return {}
        if self.take == "first":
            return {self.field: left[0]}
        if self.take == "last":
            return {self.field: left[-1]}
        return {self.field: max(reversed(left), key=len)}


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
    ignore: tuple[str, ...] = Field(
        default=(),
        description="Words that are not the input, in any case: mostly the skill's own names.",
    )
    context: tuple[str, ...] = Field(
        default=(),
        description="Words that stand around the input, and are it only if nothing else is left.",
    )
    lower: bool = Field(default=False, description="Read the message in lower case.")
    otherwise: Literal["pass", "refuse"] = Field(
        default="pass",
        description="When a field stays empty: give the message unchanged, or refuse the request.",
    )

    @property
    def fields(self) -> tuple[str, ...]:
        """The template's fields in their order, each once."""
        return _fields(self.template)

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


@lru_cache(maxsize=16_384)
def _fields(template: str) -> tuple[str, ...]:
    """The fields of a template in their order, each once."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"the template {template!r} is malformed ({error}): write a field as {{name}} and a "
            "brace that is meant as such twice, {{ or }}"
        ) from None
    names: dict[str, None] = {}
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(
                f"the template {template!r} has a field that is not a plain name: write it as "
                "{name}, without index, attribute or format"
            )
        names[name] = None
    return tuple(names)


def extract(spec: PromptSpec, text: str) -> dict[str, str] | None:
    """The template's fields as found in a message, or None when one of them is not found.

    Args:
        text: a person's message; beyond `MAX_CHARS` characters it is not searched, and beyond
            `MAX_SECONDS` no longer.
    """
    if len(text) > MAX_CHARS:
        return None
    text = text.translate(_STRAIGHT)
    if spec.lower:
        text = text.lower()
    skipped = skipped_words(spec.ignore, spec.context)
    budget = _Budget(MAX_SECONDS)
    found: dict[str, str] = {}
    for step in spec.extract:
        if step.fields <= found.keys():
            continue
        try:
            # What earlier steps found stays: they are the surer ones.
            found = step.find(text, skipped, budget) | found
        except TimeoutError:
            log.warning(
                "searching a message of %d characters for the template %r was given up after "
                "%.0f ms, at the pattern %r: write it with fewer unbounded repeats such as .* "
                "or \\w+, or bound them, e.g. {0,20}",
                len(text),
                spec.template,
                1000 * MAX_SECONDS,
                step.pattern.pattern,
            )
            return None
        if len(found) == len(spec.fields):
            return found
    return None


def render(spec: PromptSpec, text: str, earlier: Sequence[str] = ()) -> str:
    """The prompt for the expert: the filled template, or the message where `otherwise: pass`.

    Args:
        earlier: the same person's messages before it, oldest first; where the message lacks a
            field, the latest of them (at most `MAX_EARLIER`) that has all is read instead.

    Raises:
        Unsupported: a field is not found in a message and the block says `otherwise: refuse`.
    """
    for message in (text, *reversed(earlier[-MAX_EARLIER:])):
        if (found := extract(spec, message)) is not None:
            return spec.template.format(**found)
    if spec.otherwise == "pass":
        return text
    raise Unsupported(
        f"the expert found no {' and '.join(spec.fields)} in the message: put the input in quotes "
        f"or after a colon, in a message of at most {MAX_CHARS} characters",
        param="messages",
    )
