"""What each error is on the wire: status, OpenAI's error object, headers. Raises none itself.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

`TABLE` is the only place where an error becomes a status; a test holds it complete.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api.responses import Json
from composer.errors import (
    AdapterError,
    CatalogError,
    ComposerError,
    Conflict,
    ContextTooLong,
    EngineError,
    EngineFull,
    EngineMisconfigured,
    EngineRefused,
    EngineUnavailable,
    Forbidden,
    NotFound,
    Overloaded,
    RequestError,
    SettingsError,
    StoreError,
    UnknownModel,
    UnknownResponse,
    Unsupported,
)

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"

UNAVAILABLE_RETRY_S = 5
"""Advice where nobody knows better: about what a server needs to come back."""

LONGEST_RETRY_S = 3600
"""Nobody knows the queue of in an hour; and an estimate may be infinite."""

HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "content_too_large"}
"""Of what the framework itself refuses."""

SHOWN_PROBLEMS = 3
"""Validation problems named in one message; the rest are counted."""

INTERNAL = "the service failed; its log has the cause under this request's x-request-id"


@dataclass(frozen=True, slots=True)
class Row:
    """`message` replaces the error's own words where those are for the operator: they may
    name hosts, paths or statements, and go to the log instead."""

    status: int
    type: str
    message: str | None = None
    retry_after: int | None = None


TABLE: Mapping[type[ComposerError], Row] = {
    ComposerError: Row(500, SERVER, INTERNAL),
    RequestError: Row(400, INVALID),
    UnknownModel: Row(404, INVALID),
    Forbidden: Row(403, INVALID),
    NotFound: Row(404, INVALID),
    Unsupported: Row(400, INVALID),
    ContextTooLong: Row(400, INVALID),
    Conflict: Row(409, INVALID),
    CatalogError: Row(400, INVALID),
    AdapterError: Row(400, INVALID),
    EngineError: Row(502, SERVER, "the expert's server failed while it answered; try again"),
    EngineUnavailable: Row(
        503,
        SERVER,
        "the expert's server is not there now (starting, restarting or stopped); try again later",
        retry_after=UNAVAILABLE_RETRY_S,
    ),
    EngineMisconfigured: Row(502, SERVER),
    EngineRefused: Row(403, INVALID),
    EngineFull: Row(409, INVALID),
    Overloaded: Row(503, "overloaded_error"),
    StoreError: Row(
        503,
        SERVER,
        "the store is not there now; nothing was kept, try again later",
        retry_after=UNAVAILABLE_RETRY_S,
    ),
    UnknownResponse: Row(404, INVALID),
    SettingsError: Row(500, SERVER, INTERNAL),
}


@dataclass(frozen=True, slots=True)
class WireError:
    """An error ready to be sent: as a response, or as the last event of a stream."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            **self.more,
        }
        return {"error": error}

    def response(self) -> Response:
        return Json(self.body, status_code=self.status, headers=self.headers)


def wire_error(error: Exception) -> WireError:
    """The error as the caller sees it. What is not ours says nothing of its inside."""
    if not isinstance(error, ComposerError):
        return WireError(500, INTERNAL, SERVER, ComposerError.code)
    row = _row(error)
    retry_after: float | None = row.retry_after
    if isinstance(error, Overloaded):
        retry_after = error.retry_after
    headers = {} if retry_after is None else {"retry-after": str(_seconds(retry_after))}
    more: dict[str, Any] = {}
    if isinstance(error, CatalogError):
        more["problems"] = [
            {
                "path": problem.path,
                "message": without_paths(problem.message),
                "remedy": without_paths(problem.remedy),
            }
            for problem in error.problems
        ]
    return WireError(
        status=row.status,
        message=row.message or _in_words(error),
        type=row.type,
        code=error.code,
        param=error.param if isinstance(error, RequestError) else None,
        headers=headers,
        more=more,
    )


def _seconds(retry_after: float) -> int:
    """Whole seconds, rounded up: clients that come back early only meet the same queue."""
    return math.ceil(min(max(retry_after, 1), LONGEST_RETRY_S))


def _in_words(error: ComposerError) -> str:
    """The error's own words; of a catalog error without the file, which is the operator's."""
    if not isinstance(error, CatalogError):
        return str(error)
    return "\n".join(
        f"{problem.path + ': ' if problem.path else ''}"
        f"{without_paths(problem.message)}. {without_paths(problem.remedy)}"
        for problem in error.problems
    )


_ABSOLUTE = re.compile(r"(?<![\w./…])/(?!/)[^\s,;:()'\"`]+")


def without_paths(text: str) -> str:
    """The text without absolute paths: resolved, they tell a caller how this machine is laid
    out and where its links lead. What the caller wrote wrongly is named by the problem's path."""
    return _ABSOLUTE.sub("…", text)


def logged(error: Exception, request_id: str) -> WireError:
    """`wire_error`, and the cause in the log where the caller is not told (all of) it: with its
    traceback where nobody foresaw it, a line where the error says what happened."""
    wire = wire_error(error)
    if not isinstance(error, ComposerError):
        log.error("request %s: %s", request_id, error, exc_info=error)
    elif _row(error).message is not None:
        log.error("request %s: %s", request_id, error)
    elif isinstance(error, CatalogError):
        log.warning("request %s is refused: %s", request_id, error)
    return wire


def _row(error: ComposerError) -> Row:
    """Of the nearest class in the table, so that a room's own subclass needs no line here."""
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


# --- what the framework raises -----------------------------------------------------------


def validation_error(problems: Sequence[Mapping[str, Any]], body: Any) -> WireError:
    """Pydantic's problems as one 400; `param` is where the first one stands."""
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first["ctx"]["error"]
        return WireError(400, f"the body is not JSON: {reason}", INVALID, "invalid_json")
    said: list[str] = []
    for problem in problems:
        where = _place(problem, body)
        said.append(f"{where}: {_words(problem)}" if where else _words(problem))
    said = list(dict.fromkeys(said))
    if len(said) > SHOWN_PROBLEMS:
        said[SHOWN_PROBLEMS:] = [f"and {len(said) - SHOWN_PROBLEMS} more"]
    code = "unsupported" if first["type"] == "unsupported" else RequestError.code
    return WireError(400, "; ".join(said), INVALID, code, param=_place(first, body) or None)


def _words(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return "this field is not known here; leave it out"
    if problem["type"] == "union_tag_not_found":
        return "Field required"
    if tuple(problem["loc"]) == ("body",):
        if problem["type"] == "missing":
            return "the body is missing; send a JSON object"
        if isinstance(problem.get("input"), bytes):
            return "the body is read as JSON only; send `content-type: application/json`"
        return "the body must be a JSON object"
    return str(problem["msg"])


def _place(problem: Mapping[str, Any], body: Any) -> str:
    """The problem's place as the caller wrote it: `messages.0.content`.

    Pydantic's own place also names the branch of a union it tried; those steps are not in
    the body, so walking the body drops them.
    """
    path = list(problem["loc"][1:])
    missing = path.pop() if path and problem["type"] == "missing" else None
    steps: list[str] = []
    here = body
    for step in path:
        try:
            here = here[step] if isinstance(here, dict | list) else _NOWHERE[step]
        except (KeyError, IndexError, TypeError):
            continue
        steps.append(str(step))
    if missing is not None:
        steps.append(str(missing))
    elif problem["type"].startswith("union_tag_"):
        steps.append(problem["ctx"]["discriminator"].strip("'"))
    return ".".join(steps)


_NOWHERE: Mapping[Any, Any] = {}


def install(app: FastAPI) -> None:
    """Every error of ours and of the framework in OpenAI's shape."""

    async def composer_error(request: Request, error: Exception) -> Response:
        return logged(error, request.state.request_id).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return validation_error(error.errors(), error.body).response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = HTTP_CODES.get(error.status_code, RequestError.code)
        message = error.detail
        if error.status_code in (404, 405):
            message = f"there is no {request.method} {request.url.path} here; see /openapi.json"
        kind = INVALID if error.status_code < 500 else SERVER
        wire = WireError(error.status_code, message, kind, code, headers=error.headers or {})
        return wire.response()

    app.add_exception_handler(ComposerError, composer_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
