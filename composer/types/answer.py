"""What comes of a request: the plan, its calls, and the pieces of the answer. Knows no engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from composer.types.catalog import Adapter
from composer.types.request import Message, Sampling
from composer.types.values import GroupBy, Priority, Usage, empty


@dataclass(frozen=True, slots=True)
class Choice:
    """One expert of a plan. Weights of a plan sum to 1; `quality` is the calibrated probability
    that it answers well, None where nobody estimated it."""

    expert: str
    weight: float
    quality: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done for a request, decided before anything runs.

    `calls` are the experts that will be called, or may be where a strategy stops early, best
    first, so that a scheduler can look ahead. `scores` is expected quality per considered expert
    (best few, not all); `reasons` says in words and numbers why; `confident` whether the best of
    them is expected to reach the policy's floor, None where it has none. `learning` is what the
    router needs again when the outcome is known: recorded, and not shown.
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
    are the servers that the same request is likely to call when this one has answered, so that
    they are rather kept loaded; calls made at once are seen together anyway. `embedding` (dim,), of
    unit length, is the request's text for an adapter whose gate reads it; `gates`: the gate's
    weights are to be told, averaged over these groups of modules; `weigh`: they are all that is
    wanted, averaged over the prompt (`Chunk.weights`).
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
    embedding: tuple[float, ...] | None = None
    gates: GroupBy | None = None
    weigh: bool = False


@dataclass(frozen=True, slots=True)
class TokenGates:
    """How much of which member a token was read or written with: group of modules → member →
    mean weight, for the few largest."""

    token: str
    weights: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class GateTrace:
    """Who of a gate's members spoke where. `prompt` are the tokens of the prompt, each with the
    weights that it was read with, `answers` those of each choice, with the weights that they were
    written with. `left_out`: tokens beyond the limit, the prompt's first ones and an answer's
    last."""

    members: tuple[str, ...]
    prompt: tuple[TokenGates, ...]
    answers: tuple[tuple[TokenGates, ...], ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one emitted token; `top` are the likeliest alternatives."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. `index` is the choice (0..n−1) it belongs to; each choice ends
    with one chunk that has a finish reason; the last chunk of a call carries its usage.
    `expert` names who wrote it. `delta` holds the other fields of OpenAI's `delta` (of a streamed
    answer) or `message` (of a whole one), such as `tool_calls` and `reasoning_content`.

    `raw` is one server-sent event, `data: …\\n\\n`, in OpenAI's shape and ready to be sent, where
    the call allows it (`Call.forward`); text, delta and logprobs are then empty.

    `details` is what a strategy tells of how the answer came about, in plain values: it stands in
    the answer's `composer` field. `gates` comes with the last chunk of a call that asked for it, if
    its adapter is a gated one; so do `weights` (`Call.weigh`): module → the mean weight of each
    member over the prompt's tokens, in the gate's order.
    """

    text: str = ""
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    expert: str = ""
    delta: Mapping[str, Any] = field(default_factory=empty)
    raw: bytes | None = None
    details: Mapping[str, Any] = field(default_factory=empty)
    gates: GateTrace | None = None
    weights: Mapping[str, tuple[float, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Mix:
    """Several experts as one: their adapters' weighted sum. `shares` are experts and weights, none
    negative and one positive; they are rounded to whole numbers of 1 / `steps`, so that requests
    that are alike share what is made. `base` is the base model's own weight beside them. `method`
    and its `settings` say how they become one (composer/adapters/merging); `whole`: the policy's
    other experts are members too, of weight 0.

    `gate` is the expert whose gate's weights, averaged over the prompt's tokens, are to take the
    place of the shares', by module if `by_module`. Then `modules` are those of single modules: of
    each of `shares` and, last, of the base; a module that is not named has no adapter. `weighed`:
    it was asked, so the mix reads and draws as `gate` does; `left_out` are those whom it does not
    know. `unweighed`: why it was not to be had, so that the shares stand as they came."""

    shares: tuple[tuple[str, float], ...]
    steps: int = 8
    base: float = 0.0
    modules: Mapping[str, tuple[float, ...]] = field(default_factory=empty)
    gate: str | None = None
    by_module: bool = False
    weighed: bool = False
    unweighed: str = ""
    left_out: tuple[str, ...] = ()
    method: str = "cat"
    settings: Mapping[str, Any] = field(default_factory=empty)
    whole: bool = False


class Ask(Protocol):
    """A strategy's only way to call an expert. Closing the generator cancels the call."""

    def __call__(
        self,
        expert: str | Mix,
        *,
        messages: Sequence[Message] | None = None,
        sampling: Sampling | None = None,
        later: Sequence[str] = (),
        verbatim: bool = False,
    ) -> AsyncGenerator[Chunk, None]:
        """`later` are the experts that this request is likely to ask when this one has answered;
        those asked at once need not be named, since the scheduler decides on them together.
        `verbatim`: every chunk is passed on unread, so they may come as the server's own events.
        Without `messages` the expert reads the request's own; without `sampling`, its own.
        A `Mix` is made of adapters on one server, that of its heaviest expert; `Chunk.details` of
        its first chunk say what it was."""
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

    @property
    def called(self) -> list[str]:
        """The experts of the calls that the answer came of, in order: not those whom a router
        asked, or whose gate weighed."""
        return [
            str(call["expert"])
            for call in self.calls
            if "routing" not in call and "weighing" not in call
        ]
