"""Turns a piece of the registry into its model, and a refusal into problems with place and remedy.

One path for the file, for cards and for runtime experts: all are data with a place per key.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from composer.errors import Problem
from composer.registry.specs import DIGEST, ID, PARAMETER, SERVER_PATH
from composer.source import Document, Path

M = TypeVar("M", bound=BaseModel)

ID_REMEDY = (
    "Use lower-case letters, digits and . _ / - (64 at most), beginning with a letter or digit."
)


@dataclass(frozen=True, slots=True)
class Place:
    """A value's place in a document."""

    document: Document
    path: Path

    def __truediv__(self, step: str | int) -> Place:
        return Place(self.document, (*self.path, step))

    def problem(self, message: str, remedy: str) -> Problem:
        return self.document.problem(self.path, message, remedy)


@dataclass(frozen=True, slots=True)
class Block:
    """A mapping whose keys may come from different documents (an entry and its card).

    `home` is the place of the whole; `places` has those keys that do not stand directly there.
    """

    data: Mapping[str, Any]
    home: Place
    places: Mapping[str, Place]

    def at(self, path: Sequence[str | int]) -> Place:
        if path and path[0] in self.places:
            start = self.places[str(path[0])]
            return Place(start.document, (*start.path, *path[1:]))
        return Place(self.home.document, (*self.home.path, *path))

    def problem(self, path: Sequence[str | int], message: str, remedy: str) -> Problem:
        return self.at(path).problem(message, remedy)


def block_at(place: Place, data: Any) -> tuple[Block | None, list[Problem]]:
    """The block at `place`, where `data` must be a mapping."""
    if isinstance(data, Mapping):
        return Block(data, place, {}), []
    return None, [
        place.problem(
            f"it should have keys below it, not {_shown(data)}",
            "Write its keys below it, indented, or between { and }.",
        )
    ]


def block_named(place: Place, id_: str, data: Any) -> tuple[Block | None, list[Problem]]:
    """The block at `place` of what the file calls `id_`."""
    if re.fullmatch(ID, id_) is None:
        return None, [place.problem(f"{id_!r} cannot be an id", ID_REMEDY)]
    return block_at(place, data)


def validate(
    model: type[M], block: Block, *, beside: Sequence[str] = ()
) -> tuple[M | None, list[Problem]]:
    """The block as `model`, or every problem that keeps it from being one. `beside` are keys that
    may stand there too and have been taken out."""
    try:
        return model.model_validate(dict(block.data)), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, [_problem(model, block, one, beside) for one in details if not _follows(one)]
    except (ArithmeticError, RecursionError) as error:  # an absurd value in a family's validator
        return None, [
            block.problem((), f"it cannot be read: {error}", "Use values of an ordinary size.")
        ]


def unknown_name(kind: str, name: object, known: Sequence[str]) -> tuple[str, str]:
    """Message and remedy for a name that is none of the known ones."""
    message = f"no {kind} is called {_shown(name)}"
    if isinstance(name, str) and (close := _closest(name, known)):
        return message, f"Did you mean `{close}`?"
    if not known:
        return message, f"There is no {kind} at all: add one."
    shown = ", ".join(f"`{one}`" for one in known[:10])
    more = f" and {len(known) - 10} more" if len(known) > 10 else ""
    return message, f"Known here: {shown}{more}."


def _follows(error: ErrorDetails) -> bool:
    """Whether an error only follows from others: a list is too short once wrong items are out."""
    if error["type"] != "too_short" or not isinstance(error["input"], list | tuple):
        return False
    return bool(len(error["input"]) >= error["ctx"]["min_length"])


def _problem(
    model: type[BaseModel], block: Block, error: ErrorDetails, beside: Sequence[str]
) -> Problem:
    kind, loc = error["type"], error["loc"]
    if kind == "missing":
        parent = _in_data(block.data, loc[:-1], Mapping)
        fields = _fields_at(model, parent)
        key = str(loc[-1])
        meaning = fields[key].description if key in fields else None
        remedy = f"Add `{key}`: {_lowered(meaning)}" if meaning else f"Add `{key}`."
        return block.problem((*parent, key), "it is missing", _ended(remedy))
    path = _in_data(block.data, loc)
    if kind == "extra_forbidden":
        fields = _fields_at(model, path[:-1])
        names = [*fields, *(beside if len(path) == 1 else ())]
        close = _closest(str(path[-1]), names)
        known = ", ".join(f"`{name}`" for name in names)
        remedy = f"Did you mean `{close}`?" if close else f"Known here: {known}."
        return block.problem(path, "unknown key", remedy)
    if kind == "value_error":  # "what is wrong; how to mend it", where its author wrote so
        text = error["msg"].removeprefix("Value error, ")
        message, _, remedy = text.partition("; ") if "; " in text else text.rpartition(": ")
        if message:
            return block.problem(path, message, _ended(remedy[:1].upper() + remedy[1:]))
    return block.problem(path, _message(error), _ended(_remedy(model, path, error)))


_PLAIN = {
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid frozenset": "a list",
    "a valid string": "text",
    "a valid dictionary": "a mapping",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
}


def _message(error: ErrorDetails) -> str:
    text = error["msg"].removeprefix("Value error, ")
    if text.startswith("Input should "):
        wanted = text.removeprefix("Input should ")
        for theirs, ours in _PLAIN.items():
            wanted = wanted.replace(theirs, ours)
        return f"it should {wanted}, not {_shown(error['input'])}"
    if error["type"] == "string_pattern_mismatch":
        return f"{_shown(error['input'])} is not of the form wanted here"
    if error["type"] in ("string_too_short", "too_short") and not error["input"]:
        return "it is empty"
    return text[:1].lower() + text[1:]


def _remedy(model: type[BaseModel], path: Path, error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    match kind:
        case "string_type":
            return "Put the text in quotes."
        case "tuple_type" | "list_type" | "set_type" | "frozen_set_type":
            return "Write a list: one `- ` item a line, or [a, b]."
        case "dict_type" | "model_type" | "model_attributes_type":
            return "Write its keys below it, indented, or between { and }."
        case "int_type" | "int_parsing" | "int_from_float":
            return "Write a whole number, without quotes."
        case "float_type" | "float_parsing" | "finite_number":
            return "Write a finite number, without quotes."
        case "bool_type" | "bool_parsing":
            return "Write true or false."
        case "greater_than_equal":
            return f"Write {context['ge']:g} or more."
        case "greater_than":
            return f"Write more than {context['gt']:g}."
        case "less_than_equal":
            return f"Write {context['le']:g} or less."
        case "less_than":
            return f"Write less than {context['lt']:g}."
        case "literal_error":
            return f"Write {context['expected']}."
        case "string_too_short" | "too_short":
            return "Fill it in, or remove the key."
        case "string_pattern_mismatch" if context.get("pattern") == ID:
            return ID_REMEDY
        case "string_pattern_mismatch" if context.get("pattern") == SERVER_PATH:
            return "Write a path from the top, such as /mnt/adapters/…."
        case "string_pattern_mismatch" if context.get("pattern") == PARAMETER:
            return "Write a field's name, such as `top_k`, or `+top_k` to add to the default."
        case "string_pattern_mismatch" if context.get("pattern") == DIGEST:
            return "Write `sha256:` and 64 hexadecimal digits, as `composer check` prints them."
    name = str(path[-1]) if path else ""
    fields = _fields_at(model, path[:-1])
    if name in fields and fields[name].description:
        return f"Correct `{name}`: {_lowered(fields[name].description or '')}"
    return "Correct it; examples/experts.schema.json has the format."


def _in_data(data: Any, loc: Sequence[str | int], kind: type = object) -> Path:
    """pydantic's location as keys and indices of the data: it puts the tags of unions between.

    A tag may look like a key that is there too, so both readings are tried. The better one ends
    at a value of that kind, uses the last part, and uses the most parts, in this order.
    """

    def readings(at: Any, rest: Sequence[str | int]) -> list[tuple[bool, bool, Path]]:
        if not rest:
            return [(isinstance(at, kind), False, ())]
        head, tail = rest[0], rest[1:]
        found = readings(at, tail)
        inside = (isinstance(at, Mapping) and head in at) or (
            isinstance(at, list | tuple) and isinstance(head, int) and head < len(at)
        )
        if inside:
            found += [
                (fits, last or not tail, (head, *path))
                for fits, last, path in readings(at[head], tail)
            ]
        return found

    return max(readings(data, loc), key=lambda it: (it[0], it[1], len(it[2])))[2]


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> Mapping[str, Any]:
    """The fields of the model, or of all models it may be, at `path` within `model`."""
    models = [model]
    for step in path:
        if isinstance(step, int):
            continue
        models = [
            inner
            for outer in models
            if step in outer.model_fields
            for inner in _models_in(outer.model_fields[step].annotation)
        ]
    return {name: info for one in models for name, info in one.model_fields.items()}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = get_origin(annotation)
    if origin is Annotated:
        return _models_in(get_args(annotation)[0])
    if origin in (Union, types.UnionType, tuple, list, dict, frozenset, set):
        return [model for arg in get_args(annotation) for model in _models_in(arg)]
    return []


def _closest(name: str, known: Sequence[str]) -> str | None:
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.6)), None)


def _shown(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _lowered(text: str) -> str:
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def _ended(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."
