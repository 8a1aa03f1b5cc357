"""What routes are handed: the service, the request's id, bodies read by a strict parser."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from api.schemas import Caller
from composer.eligibility import key_of
from composer.errors import Forbidden
from composer.service import Service
from composer.types import ApiKey


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _request_id(request: Request) -> str:
    id_: str = request.state.request_id
    return id_


def _caller(request: Request) -> Caller:
    """Callers are told apart by their keys, of which a digest is kept."""
    key = request.headers.get("authorization", "").encode("latin-1")
    digest = hashlib.blake2b(key, digest_size=16).hexdigest() if key else ""
    session = request.headers.get("x-composer-session") or None
    return Caller(digest, session, request.state.key)


def _excluded(request: Request) -> frozenset[str]:
    key = _key(request)
    return frozenset() if key is None else key.exclude


def _admin(request: Request) -> None:
    """Raises Forbidden for a key with a name that is no admin's."""
    key = _key(request)
    if key is not None and not key.admin:
        raise Forbidden(
            f"the key {key.id!r} may ask experts and not do this; send an admin's key, or set "
            f"`admin: true` at keys.{key.id} in the registry"
        )


def _key(request: Request) -> ApiKey | None:
    return key_of(request.state.key, _service(request).generations.current.catalog)


CallerDep = Annotated[Caller, Depends(_caller)]
ServiceDep = Annotated[Service, Depends(_service)]
Excluded = Annotated[frozenset[str], Depends(_excluded)]
"""Experts that there are not for the caller's key."""
ADMIN = Depends(_admin)
"""Of routes that change the service, or watch it as a whole: `dependencies=[ADMIN]`."""
RequestId = Annotated[str, Depends(_request_id)]


class _StrictJson(Request):
    """Reads JSON as the standard has it. Python's own parser also takes NaN, lone surrogates,
    which no reply could repeat, and nesting until the stack is used up."""

    async def json(self) -> Any:
        return orjson.loads(await self.body())


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictJson(request.scope, request.receive))

        return strict


def make_router() -> APIRouter:
    return APIRouter(route_class=_Route)
