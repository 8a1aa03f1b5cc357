"""What is kept of a request and its outcome, and its JSON form. Knows no database, no file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args
from uuid import uuid4

import numpy as np
import orjson

from composer.errors import RequestError
from composer.types import Choice, FloatArray, Message, Plan, Timings, Usage

Status = Literal["ok", "error", "cancelled"]

MAX_ID = 200
"""Characters; ids are indexed, and PostgreSQL refuses index rows over 2,704 bytes."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request and what became of it. `id` is the response id the caller was given.

    Handed over to the recorder as it is: nothing it refers to may change afterwards.

    `plan` is None when the request failed before one was made; it holds the choices with their
    weights, the scores and the reasons, so that offline training can rebuild the decision.
    `experts` are those that answered, the one the caller saw first. `cost_usd` is None where a
    price is unknown. `messages`, `answer` and `query_embedding` (d,) stay None unless the
    settings say that content is kept.
    """

    id: str
    policy: str | None
    model: str
    catalog_version: int
    catalog_digest: str
    status: Status
    strategy: str | None = None
    plan: Plan | None = None
    experts: tuple[str, ...] = ()
    error_code: str | None = None
    timings: Timings = field(default_factory=Timings)
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = None
    stream: bool = False
    messages: tuple[Message, ...] | None = None
    answer: str | None = None
    query_embedding: FloatArray | None = field(default=None, compare=False)
    created: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class Feedback:
    """An outcome attached to a response: `score` in [0, 1].

    `id` is unique among one response's feedbacks; a client that sends its own may send it
    again without counting twice. Make one by `Feedback.checked`.
    """

    response_id: str
    score: float
    id: str
    comment: str | None = None
    labels: Mapping[str, Any] | None = None
    created: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def checked(
        cls,
        response_id: str,
        score: float,
        *,
        id: str | None = None,
        comment: str | None = None,
        labels: Mapping[str, Any] | None = None,
    ) -> Feedback:
        """Raises RequestError, naming the field, for a score outside [0, 1] or a wrong id."""
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not number or not math.isfinite(score) or not 0 <= score <= 1:
            raise RequestError(f"score must be a number from 0 to 1, not {score!r}", param="score")
        for name, text in (("response_id", response_id), ("id", id)):
            if text is not None and not 1 <= len(text) <= MAX_ID:
                raise RequestError(
                    f"{name} must have 1 to {MAX_ID} characters, not {len(text)}", param=name
                )
        if labels is not None:
            try:
                to_json(labels)
            except TypeError as error:
                raise RequestError(f"labels are not plain JSON: {error}", param="labels") from None
        return cls(
            response_id=clean_text(response_id),
            score=float(score),
            id=clean_text(id) if id is not None else f"fb-{uuid4().hex}",
            comment=comment,
            labels=labels,
        )


Entry = Record | Feedback
"""What the journal holds, one a line."""


# --- JSON --------------------------------------------------------------------------------


def to_json(value: Any) -> bytes:
    """JSON that both databases store: NaN is null, NUL and lone surrogates become U+FFFD.

    Raises TypeError for what has no JSON form, integers beyond 64 bits among it.
    """
    options = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    try:
        data = orjson.dumps(value, default=_plain, option=options)
        # A harmless text may hold a literal backslash-u0000: it takes the slow way, unchanged.
        if b"\\u0000" not in data:
            return data
    except TypeError:
        pass  # a lone surrogate, which `_cleaned` mends, or something it cannot: raised below
    return orjson.dumps(_cleaned(value), default=_plain, option=options)


def encode(entry: Entry) -> bytes:
    """The journal's form of an entry. Holds no line break. Raises TypeError as `to_json`."""
    kind = "request" if isinstance(entry, Record) else "feedback"
    return to_json({"kind": kind, "entry": entry})


def decode(data: bytes) -> Entry:
    """The inverse of `encode`. Fields added since take their defaults.

    Raises ValueError for what is no entry of this or an earlier version.
    """
    try:
        line = orjson.loads(data)
        kind, fields = line["kind"], dict(line["entry"])
        fields["created"] = datetime.fromisoformat(fields["created"])
        if kind == "feedback":
            return Feedback(**fields)
        if kind == "request":
            return _record(fields)
        raise ValueError(f"unknown kind {kind!r}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a journal entry: {type(error).__name__}: {error}") from error


def _record(fields: dict[str, Any]) -> Record:
    if fields.get("status") not in get_args(Status):
        raise ValueError(f"unknown status {fields.get('status')!r}")
    if fields.get("plan") is not None:
        fields["plan"] = plan_from_json(fields["plan"])
    fields["experts"] = tuple(fields.get("experts", ()))
    fields["timings"] = Timings(**fields.get("timings", {}))
    fields["usage"] = Usage(**fields.get("usage", {}))
    if fields.get("messages") is not None:
        fields["messages"] = tuple(fields["messages"])
    if fields.get("query_embedding") is not None:
        fields["query_embedding"] = np.asarray(fields["query_embedding"], dtype=np.float32)
    return Record(**fields)


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    """A Plan from its JSON object; fields it lacks take their defaults."""
    return Plan(
        **{
            **data,
            "choices": tuple(Choice(**choice) for choice in data["choices"]),
            "calls": tuple(data["calls"]),
        }
    )


def clean_text(text: str) -> str:
    """The text as PostgreSQL can hold it: without NUL and lone surrogates."""
    if text.isascii() and "\x00" not in text:
        return text
    return (
        text.replace("\x00", "\ufffd")
        .encode("utf-16-le", "surrogatepass")
        .decode("utf-16-le", "replace")
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):  # a MappingProxyType, say
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, np.ndarray):  # orjson takes contiguous native arrays only
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {
            clean_text(key) if isinstance(key, str) else key: _cleaned(item)
            for key, item in value.items()
        }
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _cleaned(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value
