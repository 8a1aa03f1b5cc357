"""The words every room shares. Knows nothing of HTTP, YAML, models or databases.

Two groups: what is served (Expert, Server, Policy, Catalog) and what is asked
(Request, Plan, Call, Chunk). All are frozen: a request sees one catalog for its whole life.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NotRequired, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from composer.prompting import PromptSpec

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

Tier = Literal["supported", "experimental"]

Ability = Literal["tools", "json", "vision", "logprobs"]
"""What a request may need of an expert beyond text: function calls, `response_format`,
images, token log-probabilities."""


Priority = Literal["interactive", "batch"]
"""Interactive calls go before batch calls wherever both wait."""

SAFE_PARAMETERS: frozenset[str] = frozenset(
    {
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "top_k",
        "min_p",
        "repetition_penalty",
        "stop_token_ids",
        "min_tokens",
        "ignore_eos",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "reasoning_effort",
        "verbosity",
    }
)
"""Wire fields that shape an answer and nothing else, which a policy allows unless it says
otherwise. What could reach into other requests or cost without bound (`cache_salt`,
`chat_template`, `priority`, `prompt_logprobs`) has to be allowed by name."""


def empty() -> Mapping[str, Any]:
    """A read-only empty mapping, for defaults."""
    return MappingProxyType({})


# --- what is served ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Adapter:
    """A verified LoRA adapter on disk. `digest` is the sha256 of its config and tensors,
    so equal digests mean equal behaviour on the same base. `server_path` is the same folder
    as a server in another container sees it; None: as we see it."""

    path: Path
    digest: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    server_path: str | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """Price of a call in US dollars per million tokens."""

    input_per_1m: float
    output_per_1m: float

    def of(self, usage: Usage) -> float:
        """US dollars for these tokens."""
        spent = (
            self.input_per_1m * usage.prompt_tokens + self.output_per_1m * usage.completion_tokens
        )
        return spent / 1e6


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or whatever else has memory for some of the servers placed on it at a time."""

    id: str
    memory_gb: float


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a server's weights go when it is loaded, and what loading costs, in seconds.

    The seconds are first estimates: what is observed replaces them. `sleep_level` None stops
    the process to make room; 1 or 2 puts it to sleep (vLLM's sleep mode) and wakes it again.
    """

    device: str
    memory_gb: float
    start_s: float = 60.0
    stop_s: float = 5.0
    sleep_level: Literal[1, 2] | None = None
    sleep_s: float = 2.0
    wake_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Server:
    """A process that runs models. `settings` is the engine's own validated model, so that
    two servers are the same exactly when they compare equal. `placement` None: it is always
    there, and takes no room from others."""

    id: str
    engine: str
    settings: Any
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """An expert's own values for what a request leaves open; None: none of its own."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True)
class Expert:
    """Something that can answer: the server's base model, alone or with one adapter.

    `context_window` is in tokens; `chars_per_token` is the estimate the filter uses before
    any tokenizer is asked. `parameters` are the wire fields beyond OpenAI's core that its
    engine understands (`top_k`, `repetition_penalty` …). `cost` is None where the price is
    unknown.
    """

    id: str
    server: str
    description: str = ""
    skills: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    adapter: Adapter | None = None
    prompt: PromptSpec | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    context_window: int = 4096
    chars_per_token: float = 3.0
    abilities: frozenset[Ability] = frozenset()
    parameters: frozenset[str] = frozenset()
    cost: Cost | None = None
    source: Literal["file", "runtime"] = "file"


@dataclass(frozen=True, slots=True)
class Component:
    """A router or strategy by its registered name, with its own validated settings. `digest`
    stands for the content of the files that they name."""

    name: str
    settings: Any
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Unsure:
    """What a policy does where the best chosen expert's expected quality is `below` its floor:
    say so in the answer (which it does in any case), ask `k` experts, or go to the best by
    quality whatever it costs."""

    below: float
    do: Literal["say", "ask_more", "ask_stronger"] = "say"
    k: int = 3


@dataclass(frozen=True, slots=True)
class Policy:
    """A named way of answering. `experts` are the ids it may use, in catalog order.

    `threshold` is a calibrated quality in [0, 1]: when no expert reaches it, the plan is
    `default_expert` alone. `cost_weight` is λ of `quality − λ·cost`, in quality per
    US dollar per million output tokens. `k` is the number of experts a plan may hold.
    `max_wait_s` bounds the wait of each of its calls for a lease, in seconds; None: the
    process's default. `parameters` are the extra wire fields that its requests may carry.
    `tolerance` is the expected quality that may be given up for an expert that is resident.
    `quality` (share of the best single expert's mean quality, at least cost) or `max_cost` (US
    dollars a request on average) take the place of `cost_weight`, and need a trained router.
    `min_quality`, `top_p`, `null_expert` with `null_margin`, and `unsure`: see `choose`.
    `stay` is the expected quality that may be given up for a conversation to keep its experts.
    """

    id: str
    router: Component
    strategy: Component
    experts: tuple[str, ...]
    default_expert: str | None = None
    threshold: float = 0.0
    cost_weight: float = 0.0
    k: int = 1
    max_wait_s: float | None = None
    parameters: frozenset[str] = SAFE_PARAMETERS
    tolerance: float = 0.0
    quality: float | None = None
    max_cost: float | None = None
    min_quality: float = 0.0
    top_p: float | None = None
    null_expert: str | None = None
    null_margin: float = 0.0
    unsure: Unsure | None = None
    stay: float = 0.0


@dataclass(frozen=True, slots=True)
class Catalog:
    """One frozen snapshot. `version` counts up by one per snapshot within a process;
    `digest` is equal for equal content across processes."""

    version: int
    digest: str
    servers: Mapping[str, Server]
    experts: Mapping[str, Expert]
    policies: Mapping[str, Policy]
    default_policy: str = "auto"
    devices: Mapping[str, Device] = field(default_factory=empty)


# --- what is asked -------------------------------------------------------------------


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
    conversation; `caller` tells callers apart, and is no secret. `explore` False: no expert is
    tried out on it.
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


@dataclass(frozen=True, slots=True)
class Choice:
    """One expert of a plan. Weights of a plan sum to 1."""

    expert: str
    weight: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done for a request, decided before anything runs.

    `calls` are the experts known to be called, best first, so that a scheduler can look
    ahead. `scores` is expected quality per considered expert (best few, not all);
    `reasons` says in words and numbers why; `confident` whether the best of them is expected to
    reach the policy's floor, None where it has none. `learning` is what the router needs again
    when the outcome is known: recorded, and not shown.
    """

    policy: str
    strategy: str
    choices: tuple[Choice, ...]
    calls: tuple[str, ...]
    scores: Mapping[str, float] = field(default_factory=empty)
    reasons: Mapping[str, Any] = field(default_factory=empty)
    confident: bool | None = None
    learning: Mapping[str, Any] = field(default_factory=empty)

    @property
    def best(self) -> str:
        return self.choices[0].expert


@dataclass(frozen=True, slots=True)
class Forward:
    """The caller streams and nobody reads the text on the way, so an engine may hand on its
    server's events as bytes. `id` and `model` are what they must say."""

    id: str
    model: str


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one expert, as scheduler and engine see it: already rendered.

    `adapter` None is the base model alone. Exactly one of `messages` and `prompt` is set.
    `max_tokens_asked` is False where `sampling.max_tokens` is the expert's default: an engine
    then clips it to the room left, where it refuses what a caller asked for.

    `stream` is whether the answer is wanted piece by piece; `forward` further allows an engine
    to yield `Chunk.raw`. `max_wait_s` bounds the wait for a lease from `arrived` (the scheduler's
    clock, set at the first attempt, so that a retry keeps its bound); None: no bound. `later`
    are the servers that the same request is known to call when this one has answered, so that
    they are rather kept loaded; calls made at once are seen together anyway.
    """

    id: str
    expert: str
    server: str
    adapter: Adapter | None
    messages: tuple[Message, ...]
    prompt: str | None
    sampling: Sampling
    context_window: int
    extra: Mapping[str, Any] = field(default_factory=empty)
    max_tokens_asked: bool = True
    stream: bool = False
    forward: Forward | None = None
    priority: Priority = "interactive"
    max_wait_s: float | None = None
    arrived: float | None = None
    later: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one emitted token; `top` are the likeliest alternatives."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one or more calls."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. `index` is the choice (0..n−1) it belongs to; each choice ends
    with one chunk that has a finish reason; the last chunk of a call carries its usage.
    `expert` names who wrote it. `delta` holds the other fields of OpenAI's `delta` (of a streamed
    answer) or `message` (of a whole one), such as `tool_calls` and `reasoning_content`.

    `raw` is one server-sent event, `data: …\\n\\n`, in OpenAI's shape and ready to be sent, where
    the call allows it (`Call.forward`); text, delta and logprobs are then empty.
    """

    text: str = ""
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    expert: str = ""
    delta: Mapping[str, Any] = field(default_factory=empty)
    raw: bytes | None = None


class Ask(Protocol):
    """A strategy's only way to call an expert. Closing the generator cancels the call."""

    def __call__(
        self,
        expert: str,
        *,
        messages: Sequence[Message] | None = None,
        sampling: Sampling | None = None,
        later: Sequence[str] = (),
        verbatim: bool = False,
    ) -> AsyncGenerator[Chunk, None]:
        """`later` are the experts that this request will surely ask when this one has answered;
        those asked at once need not be named, since the scheduler decides on them together.
        `verbatim`: every chunk is passed on unread, so they may come as the server's own events.
        Without `messages` the expert reads the request's own; without `sampling`, its own."""
        ...


@dataclass(slots=True)
class Timings:
    """Milliseconds. Written by the pipeline as a request moves on; `queue_ms` is waiting for
    leases, `run_ms` is inside engines (both summed over a plan's calls)."""

    decision_ms: float = 0.0
    queue_ms: float = 0.0
    first_token_ms: float | None = None
    run_ms: float = 0.0
    total_ms: float = 0.0
    calls: list[dict[str, Any]] = field(default_factory=list)
