"""What is asked: messages, sampling, the request. Knows no expert that may answer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NotRequired, TypedDict

from composer.types.catalog import SamplingDefaults
from composer.types.values import Ability, GroupBy, Priority, empty


class Message(TypedDict):
    """One chat message in OpenAI's shape; `content` may be text or typed parts."""

    role: str
    content: NotRequired[str | list[dict[str, Any]] | None]
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `max_tokens` None means: up to the context window; `temperature`
    and `top_p` None: the expert's default, else 1. `logprobs` is None for none, else how many
    alternatives a token to give (0..20)."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    n: int = 1

    def with_defaults(self, defaults: SamplingDefaults) -> Sampling:
        """What is open here filled in from `defaults`."""
        return replace(
            self,
            **{
                default.name: getattr(defaults, default.name)
                for default in fields(defaults)
                if getattr(self, default.name) is None
            },
        )


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asked, validated. Exactly one of `messages` and `prompt` is set.

    `needs` are the abilities an expert must have; `extra` holds the wire fields an engine
    passes through untouched (tools, tool_choice, response_format, extra parameters);
    `parameters` names those of them that are beyond OpenAI's core. `max_wait_s` is the caller's
    own bound on the wait for a lease; it can only tighten the policy's. `quality` and `max_cost`
    (at most one) take the place of the policy's aim. `session` is the caller's own name for the
    conversation; `caller` tells callers apart, and is no secret; `key` names the caller's key among
    the catalog's, "" for one without a name. `explore` False: no expert is tried out on it.
    `gates`: how the weights of gates are to be told, averaged over which modules; None: not at all.
    """

    id: str
    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    sampling: Sampling = Sampling()
    needs: frozenset[Ability] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=empty)
    parameters: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    stream: bool = False
    priority: Priority = "interactive"
    max_wait_s: float | None = None
    quality: float | None = None
    max_cost: float | None = None
    explore: bool = True
    session: str | None = None
    caller: str = ""
    key: str = ""
    gates: GroupBy | None = None

    @property
    def text(self) -> str:
        """What is asked now: the prompt, or the last user message."""
        return self.prompt if self.prompt is not None else last_user_text(self.messages)

    @property
    def turns(self) -> tuple[str, ...]:
        """What was asked so far, oldest first, ending with `text`: the user's messages. System
        messages and answers are not among them: they say more of an application, and of the
        experts that have answered, than of what is wanted."""
        return (self.prompt,) if self.prompt is not None else user_texts(self.messages)

    @property
    def n_chars(self) -> int:
        """Length of all that an expert will read, in characters."""
        if self.prompt is not None:
            return len(self.prompt)
        return sum(len(message_text(message)) for message in self.messages)


def message_text(message: Message) -> str:
    """The text of a message; of typed parts, the text parts joined by line breaks."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def last_user_text(messages: Sequence[Message]) -> str:
    """The text of the last user message; without one, of the last message."""
    return user_texts(messages)[-1]


def user_texts(messages: Sequence[Message]) -> tuple[str, ...]:
    """The texts of all user messages; without one, of the last message. At least one text."""
    texts = tuple(message_text(message) for message in messages if message["role"] == "user")
    return texts or ((message_text(messages[-1]) if messages else ""),)
