"""What every HTTP request passes first: its id, the key, the size limit, the last catch.

Plain ASGI on purpose: a middleware that wraps responses would hide a client's leaving from
the streams behind it. Knows nothing about routes.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterable, Mapping
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import HTTP_CODES, INVALID, WireError, logged
from composer.types import ApiKey

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Answered without a key, so that a load balancer needs none."""

MAX_BODY = 4 * 2**20
"""Bytes of a request's body: room for a 128k-token prompt and a few small images."""


class Edge:
    """Gives the request its id (32 hex digits) in `request.state.request_id` and the
    `x-request-id` header. The id of an answer is the same digits behind OpenAI's prefix.
    `request.state.key` is the name of the caller's key, "" for one without a name."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        keys: Callable[[], Iterable[ApiKey]] = tuple,
        max_body: int = MAX_BODY,
        larger: Mapping[str, int] | None = None,
    ) -> None:
        """`keys` are those with a name, as they are now. `max_body` in bytes; `larger` are the
        limits of paths that have their own."""
        self._app = app
        self._keys = keys
        self._key = None if api_key is None else api_key.encode()
        self._max_body = max_body
        self._larger = larger or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            key = self._key_of(scope)
            scope["state"]["key"] = key or ""
            refusal = self._refusal(scope, known=key is not None)
            if refusal is not None:
                await refusal.response()(scope, receive, send_with_id)
                return
            await self._app(scope, self._limited(receive, self._limit(scope)), send_with_id)
        except Exception as error:
            if started:
                raise  # half an answer is out: only closing the connection tells the client
            await logged(error, request_id).response()(scope, receive, send_with_id)

    def _key_of(self, scope: Scope) -> str | None:
        """The name of the key that the request came with, None for one that opens nothing. Raises
        EngineUnavailable where nobody knows the keys yet, or any more."""
        if scope["path"] in OPEN_PATHS:
            return ""
        named = tuple(self._keys())
        if self._key is None and not named:
            return ""
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            return None
        given = key.strip().encode("latin-1")  # as headers are
        for one in named:
            if one.opens(given):
                return one.id
        # Compared in constant time, so that timing tells no prefix.
        whole = self._key is not None and hmac.compare_digest(given, self._key)
        return "" if whole else None

    def _refusal(self, scope: Scope, *, known: bool) -> WireError | None:
        if not known:
            return WireError(
                401,
                "a valid key is needed: `Authorization: Bearer <key>`",
                "authentication_error",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        # Beyond any limit; and int() itself refuses very long numbers.
        limit = self._limit(scope)
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            return WireError(413, _too_large(limit), INVALID, HTTP_CODES[413])
        return None

    def _limit(self, scope: Scope) -> int:
        return self._larger.get(scope["path"], self._max_body)

    def _limited(self, receive: Receive, limit: int) -> Receive:
        """`receive`, counting: a body in chunks declares no length beforehand."""
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > limit:
                    raise HTTPException(413, _too_large(limit))
            return message

        return limited


def _too_large(limit: int) -> str:
    return f"the body exceeds {limit} bytes; send less"
