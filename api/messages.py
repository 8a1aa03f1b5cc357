"""Chat messages as callers may send them: one model per role. Knows nothing of the other fields."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from composer.types import Ability, Message


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TextPart(_Model):
    type: Literal["text"]
    text: str


class ImageUrl(_Model):
    url: Annotated[str, Field(pattern=r"^(https?://|data:image/)")]
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Model):
    type: Literal["image_url"]
    image_url: ImageUrl


def _kind(content: Any) -> str:
    # Told apart beforehand, so that a wrong part is reported and not "should be a text".
    return "parts" if isinstance(content, list) else "text"


_Text = Annotated[str, Tag("text")]
_TextParts = Annotated[list[TextPart], Field(min_length=1), Tag("parts")]
_AnyPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
_AnyParts = Annotated[list[_AnyPart], Field(min_length=1), Tag("parts")]

TextContent = Annotated[_Text | _TextParts, Discriminator(_kind)]
UserContent = Annotated[_Text | _AnyParts, Discriminator(_kind)]


class CalledFunction(_Model):
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class ToolCall(_Model):
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(_Model):
    """`developer` is the newer name of `system`; experts' chat templates know the older one."""

    role: Literal["system", "developer"]
    content: TextContent
    name: str | None = None


class UserMessage(_Model):
    role: Literal["user"]
    content: UserContent
    name: str | None = None


class AssistantMessage(_Model):
    """An earlier answer. Its last fields are those that clients send back unchanged from an
    answer's message; experts are not shown them."""

    role: Literal["assistant"]
    content: TextContent | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall] | None, Field(min_length=1)] = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and self.tool_calls is None:
            raise PydanticCustomError(
                "no_content", "an assistant message needs content, or tool_calls in its place"
            )
        return self


class ToolMessage(_Model):
    role: Literal["tool"]
    content: TextContent
    tool_call_id: Annotated[str, Field(min_length=1)]
    name: str | None = None


AnyMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


_NOT_SHOWN = {
    "refusal",
    "annotations",
    "audio",
    "function_call",
    "reasoning",
    "reasoning_content",
}


def plain(message: AnyMessage) -> Message:
    """The message as experts read it: OpenAI's shape without what was left out."""
    fields: dict[str, Any] = message.model_dump(exclude_none=True, exclude=_NOT_SHOWN)
    if isinstance(message, SystemMessage):
        fields["role"] = "system"
    elif isinstance(message, AssistantMessage):
        fields["content"] = fields.get("content")
    return cast(Message, fields)


def needs_of(messages: Iterable[AnyMessage]) -> frozenset[Ability]:
    """What an expert must be able to read: images, and the traces of tool calls."""
    needs: set[Ability] = set()
    for message in messages:
        if isinstance(message, ToolMessage) or (
            isinstance(message, AssistantMessage) and message.tool_calls
        ):
            needs.add("tools")
        if isinstance(message, UserMessage) and not isinstance(message.content, str):
            needs |= {"vision" for part in message.content if isinstance(part, ImagePart)}
    return frozenset(needs)
