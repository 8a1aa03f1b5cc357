"""Batches at the edge: what callers send, a line as a request, and its answer as the body that
the route would have sent. Knows nothing of order, or of how batches are kept.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends
from fastapi import Request as HttpRequest
from pydantic import Field, ValidationError

from api.answering import whole
from api.body import Body, off
from api.errors import WireError, logged, validation_error
from api.responses import to_json
from api.schemas import Caller, ChatBody, CompletionBody
from api.wire import ChatWire, CompletionWire, Wire
from composer.batch.base import Line, Reply
from composer.batch.files import Files
from composer.batch.jobs import Batches
from composer.batch.runner import Runner
from composer.errors import RequestError
from composer.pipeline import Pipeline, Planned
from composer.service import Service
from composer.types import Request


@dataclass(frozen=True, slots=True)
class Endpoint:
    body: type[ChatBody] | type[CompletionBody]
    prefix: str
    wire: Callable[[Request], Wire]


def _chat(request: Request) -> Wire:
    return ChatWire(logprobs=request.sampling.logprobs is not None)


def _completion(request: Request) -> Wire:
    return CompletionWire(logprobs=request.sampling.logprobs)


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(ChatBody, ChatWire.prefix, _chat),
    "/v1/completions": Endpoint(CompletionBody, CompletionWire.prefix, _completion),
}


class InvalidBody(RequestError):
    """A line's body is not what its endpoint takes."""

    def __init__(self, wire: WireError) -> None:
        super().__init__(wire.message, param=wire.param)
        self.wire = wire


@dataclass(frozen=True, slots=True)
class WireAsked:
    """A line's body as a request. One per attempt: the wire counts offsets in it."""

    request: Request
    wire: Wire

    async def reply(self, pipeline: Pipeline, planned: Planned | None) -> Reply:
        created = int(time.time())
        answer = await pipeline.answer(self.request, planned)
        return Reply(200, to_json(await whole(answer, self.request, self.wire, created)))


class WireCodec:
    """OpenAI's bodies, read and written by the code of the routes."""

    endpoints = frozenset(ENDPOINTS)

    def read(self, line: Line, id: str) -> WireAsked:
        """Raises RequestError, InvalidBody where a field is wrong."""
        endpoint = ENDPOINTS[line.url]
        try:
            body = endpoint.body.model_validate(line.body)
        except ValidationError as error:
            problems: list[dict[str, Any]] = [
                {**problem, "loc": ("body", *problem["loc"])}
                for problem in error.errors(include_url=False)
            ]
            raise InvalidBody(validation_error(problems, line.body)) from error
        if body.stream:
            raise RequestError("a batch gives whole answers; leave stream out", param="stream")
        request = dataclasses.replace(
            body.request(endpoint.prefix + id, Caller(key=line.key)),
            priority="batch",
            max_wait_s=None,
        )
        return WireAsked(request, endpoint.wire(request))

    def failed(self, error: Exception, id: str) -> Reply:
        wire = error.wire if isinstance(error, InvalidBody) else logged(error, id)
        return Reply(wire.status, to_json(wire.body))


# --- what routes are handed --------------------------------------------------------------


def make_batches(service: Service) -> tuple[Files, Batches]:
    """Nothing is read or started before `Batches.start`, which needs a service that answers."""
    files = Files(service.settings.files_dir)
    runner = Runner(service.pipeline, service.generations, service.scheduler, WireCodec())
    return files, Batches(service.settings.files_dir, files, runner)


def _files(request: HttpRequest) -> Files:
    files: Files = request.app.state.files
    return files


def _batches(request: HttpRequest) -> Batches:
    batches: Batches = request.app.state.batches
    return batches


FilesDep = Annotated[Files, Depends(_files)]
BatchesDep = Annotated[Batches, Depends(_batches)]


class BatchBody(Body):
    """POST /v1/batches."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=200)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: Annotated[Any, off()] = None
