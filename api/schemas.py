"""What callers may send, in OpenAI's field names, and how it becomes a Request.

Knows nothing about experts or engines. Four kinds of fields: honoured; `Parameters`, which some
engines honour; `Ignored`, which change nothing in an answer; and those that would change it and
that no engine here can honour, so that only the value meaning "off" passes. A field that is in
none of them is refused as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)
from pydantic_core import PydanticCustomError

from api.body import Body, off
from api.composer_field import ComposerField
from api.messages import AnyMessage, needs_of, plain
from api.parameters import ChatParameters, Parameters
from composer.errors import RequestError
from composer.types import Ability, Request, Sampling

MAX_N = 8
MAX_STOP = 4
MAX_TOP_LOGPROBS = 20
LEGACY_MAX_TOKENS = 16
"""What OpenAI's /v1/completions takes when `max_tokens` is left out."""


class Ignored(Body):
    """Bookkeeping for OpenAI's own platform."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """What the headers say of who asks. `id` is a digest; `session` the conversation's name; `key`
    that of the caller's key."""

    id: str = ""
    session: str | None = None
    key: str = ""


NOBODY = Caller()


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, off(False)] = None


def _listed(value: Any) -> Any:
    """`stop` may be one text."""
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]] | None,
    Field(max_length=MAX_STOP),
    BeforeValidator(_listed),
]


class Generation(Ignored, Parameters):
    """What chat and plain completions share."""

    model: Annotated[str | None, Field(max_length=512)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_N)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1, allow_inf_nan=False)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1)] = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    composer: ComposerField | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _request(
        self,
        id: str,
        caller: Caller,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        needs: frozenset[Ability] = frozenset(),
        extra: Mapping[str, Any] = MappingProxyType({}),
        **rest: Any,
    ) -> Request:
        if self.stream_options is not None and not self.stream:
            raise RequestError("only a stream has stream_options", param="stream_options")
        parameters = self.asked()
        if max_tokens is not None and parameters.get("min_tokens", 0) > max_tokens:
            raise RequestError(
                f"min_tokens exceeds max_tokens, which is {max_tokens}", param="min_tokens"
            )
        ours = self.composer or ComposerField()
        given = {
            name: value
            for name in ("temperature", "top_p", "seed", "n")
            if (value := getattr(self, name)) is not None
        }
        sampling = Sampling(
            max_tokens=max_tokens, logprobs=logprobs, stop=tuple(self.stop or ()), **given
        )
        return Request(
            id=id,
            model=self.model or "",
            sampling=sampling,
            needs=needs | ({"logprobs"} if logprobs is not None else frozenset()),
            extra={**extra, **parameters},
            parameters=frozenset(parameters),
            exclude=frozenset(ours.exclude),
            stream=bool(self.stream),
            priority=ours.priority,
            max_wait_s=ours.max_wait_s,
            quality=ours.quality,
            max_cost=ours.max_cost,
            explore=ours.explore,
            session=ours.session or caller.session,
            caller="/".join((caller.id, self.safety_identifier or self.user or "")),
            key=caller.key,
            gates="all" if ours.gates is True else ours.gates or None,
            **rest,
        )


class Function(BaseModel):
    """A tool's function; what else it says is the engine's to read."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    name: Annotated[str, Field(min_length=1)]


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    type: Literal["function"]
    function: Function


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class ChatBody(Generation, ChatParameters):
    """POST /v1/chat/completions."""

    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    tools: Annotated[list[Tool] | None, Field(min_length=1)] = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    audio: Annotated[Any, off()] = None
    function_call: Annotated[Any, off("none")] = None
    functions: Annotated[Any, off([])] = None
    modalities: Annotated[Any, off(["text"])] = None
    moderation: Annotated[Any, off()] = None
    prediction: Annotated[Any, off()] = None
    web_search_options: Annotated[Any, off()] = None

    def request(self, id: str, caller: Caller = NOBODY) -> Request:
        """Raises RequestError where fields contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.tool_choice is not None and self.tools is None:
            raise RequestError("tool_choice needs tools", param="tool_choice")
        return self._request(
            id,
            caller,
            max_tokens=self._max_tokens(),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            needs=needs_of(self.messages) | self._needs(),
            messages=tuple(plain(message) for message in self.messages),
            extra=self._extra(),
        )

    def _max_tokens(self) -> int | None:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestError(
                "max_tokens and max_completion_tokens are one setting and differ; send one",
                param="max_completion_tokens",
            )
        return both.pop() if both else None

    def _needs(self) -> frozenset[Ability]:
        needs: set[Ability] = set()
        if self.tools is not None:
            needs.add("tools")
        if self._format() is not None:
            needs.add("json")
        return frozenset(needs)

    def _format(self) -> ResponseFormat | None:
        """The response format, if it asks for anything."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise RequestError(
                "response_format of type json_schema needs its json_schema",
                param="response_format.json_schema",
            )
        return wanted

    def _extra(self) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if self.tools is not None:
            extra["tools"] = [tool.model_dump(exclude_unset=True) for tool in self.tools]
            for name in ("tool_choice", "parallel_tool_calls"):
                if getattr(self, name) is not None:
                    extra[name] = getattr(self, name)
        wanted = self._format()
        if wanted is not None:
            extra["response_format"] = wanted.model_dump(exclude_unset=True)
        return extra


def _one_text(what: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if len(value) == 1 and isinstance(value[0], str):
            return value[0]
        if value and all(isinstance(item, str) for item in value):
            raise PydanticCustomError(
                "unsupported", f"one {what} a request is answered; send one request for each"
            )
        raise PydanticCustomError(
            "unsupported", f"a {what} is read as text, not as token ids; send text"
        )

    return check


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: Annotated[str, Field(min_length=1), BeforeValidator(_one_text("prompt"))]
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None

    best_of: Annotated[Any, off(1)] = None
    echo: Annotated[Any, off(False)] = None
    suffix: Annotated[Any, off("")] = None

    def request(self, id: str, caller: Caller = NOBODY) -> Request:
        """Raises RequestError where fields contradict each other."""
        return self._request(
            id,
            caller,
            max_tokens=self.max_tokens or LEGACY_MAX_TOKENS,
            logprobs=self.logprobs,
            prompt=self.prompt,
        )


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: str
    input: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(min_length=1, max_length=2048),
        BeforeValidator(_listed),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(ge=1)] = None
    user: str | None = None


class ExpertBody(BaseModel):
    """POST /v1/experts: an entry of experts.yaml with its id. What else it holds is checked
    as the file's entries are, by the registry."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    id: Annotated[str, Field(min_length=1)]


class FeedbackBody(Body):
    """POST /v1/feedback."""

    response_id: Annotated[str, Field(min_length=1, max_length=200)]
    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    id: Annotated[
        str | None,
        Field(min_length=1, max_length=200, description="Yours; sent again, it counts once."),
    ] = None
    comment: Annotated[str | None, Field(max_length=10_000)] = None
    labels: dict[str, Any] | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every error, in OpenAI's shape. For /openapi.json; `errors.py` writes them."""

    error: ErrorDetail
