"""JSON and server-sent events as bytes. Knows nothing about what they say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS

DONE = b"data: [DONE]\n\n"


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    """NaN and infinities become null, as JSON has neither."""
    return orjson.dumps(content, default=_plain, option=OPTIONS)


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % to_json(content)


def with_field(event_: bytes, name: str, content: Any) -> bytes:
    """The event, whose data are a JSON object, with one more field: by its bytes, since decoding
    and encoding would cost more, and could change, what somebody else has written. Only where it
    may have the field already (of another service like this one), it is replaced."""
    key = b'"%b":' % name.encode()
    if key in event_.replace(b'" :', b'":'):
        data = orjson.loads(event_.removeprefix(b"data:"))
        return event({**data, name: content})
    body, brace, rest = event_.rpartition(b"}")
    return b"%b,%b%b%b%b" % (body, key, to_json(content), brace, rest)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
