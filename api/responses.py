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


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
