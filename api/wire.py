"""Answers in OpenAI's shapes: chat and plain completions, whole and in chunks.

Pure functions of what the pipeline yields; knows nothing about HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from composer.errors import EngineError
from composer.outcome import Outcome
from composer.types import Chunk, FinishReason, GateTrace, TokenGates, TokenLogprob, Usage

LEAST_LOGPROB = -9999.0
"""OpenAI's stand-in for a probability of zero: JSON has no infinity."""


@dataclass(slots=True)
class Collected:
    """One choice of an answer that is sent whole."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    finish_reason: FinishReason | None = None


def collect(chunks: Sequence[Chunk], n: int) -> list[Collected]:
    """The answer's n choices. Raises EngineError where one has no end."""
    choices = [Collected() for _ in range(n)]
    for chunk in chunks:
        choice = choices[chunk.index]
        choice.text.append(chunk.text)
        choice.logprobs.extend(chunk.logprobs)
        add_delta(choice.more, chunk.delta)
        choice.finish_reason = chunk.finish_reason or choice.finish_reason
    if unfinished := [i for i, choice in enumerate(choices) if choice.finish_reason is None]:
        raise EngineError(f"the answer ended without a finish reason for choices {unfinished}")
    return choices


def beside(choices: Sequence[Collected]) -> dict[str, Any]:
    """What a server said of the prompt, which stands beside the choices of a whole chat."""
    return {key: choices[0].more[key] for key in _OF_PROMPT if key in choices[0].more}


_OF_PROMPT = ("prompt_logprobs",)


def add_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Adds a chunk's further fields to those of the message so far, as OpenAI's clients do:
    texts go on, tool calls are told apart by their index, lists grow."""
    for key, value in delta.items():
        known = message.get(key)
        if key == "tool_calls":
            calls: list[dict[str, Any]] = message.setdefault(key, [])
            for call in value or ():
                _add_call(calls, call)
        elif known is None:
            message[key] = list(value) if isinstance(value, list) else value
        elif isinstance(known, str) and isinstance(value, str):
            message[key] = known + value
        elif isinstance(known, list) and isinstance(value, list):
            known.extend(value)
        elif value is not None:
            message[key] = value


def _add_call(calls: list[dict[str, Any]], part: Mapping[str, Any]) -> None:
    """One without an index is whole, and another one than those before. Of the parts of one,
    only the arguments go on; some servers repeat the rest."""
    index = part.get("index")
    call = next((one for one in calls if index is not None and one["index"] == index), None)
    if call is None:
        call = {"index": index, "type": "function", "function": {"name": "", "arguments": ""}}
        calls.append(call)
    function = part.get("function") or {}
    call["function"]["name"] = call["function"]["name"] or function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""
    rest = {key: value for key, value in part.items() if key != "function" and value is not None}
    call.update(rest)


def _whole_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call as a whole message has it."""
    return {key: value for key, value in call.items() if key != "index"}


class Wire(Protocol):
    """The one or the other endpoint's shape. One per request: offsets are counted in it."""

    @property
    def prefix(self) -> str:
        """Of response ids."""
        ...

    @property
    def whole(self) -> str:
        """`object` of a whole answer."""
        ...

    @property
    def part(self) -> str:
        """`object` of a chunk."""
        ...

    def choice(self, index: int, choice: Collected) -> dict[str, Any]: ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice in the chunk before its first text, if there is one."""
        ...

    def piece(self, chunk: Chunk) -> dict[str, Any]:
        """The choice in a chunk of text, or of other fields of the answer."""
        ...

    def ending(self, index: int, reason: FinishReason) -> dict[str, Any]:
        """The choice in the chunk that ends it."""
        ...


class ChatWire:
    prefix = "chatcmpl-"
    whole = "chat.completion"
    part = "chat.completion.chunk"

    def __init__(self, *, logprobs: bool) -> None:
        self._logprobs = logprobs

    def choice(self, index: int, choice: Collected) -> dict[str, Any]:
        content: str | None = "".join(choice.text)
        more = {key: value for key, value in choice.more.items() if key not in _OF_PROMPT}
        if calls := more.get("tool_calls"):
            more["tool_calls"] = [_whole_call(call) for call in calls]
            content = content or None  # as OpenAI has it where there are calls alone
        return {
            "index": index,
            "message": {"role": "assistant", "content": content, "refusal": None, **more},
            "logprobs": self._of(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._delta(index, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, chunk: Chunk) -> dict[str, Any]:
        said: dict[str, Any] = dict(chunk.delta)
        if "tool_calls" in said:
            said["tool_calls"] = [
                {"index": i} | call for i, call in enumerate(said["tool_calls"] or ())
            ]
        if chunk.text or not said:
            said["content"] = chunk.text
        return self._delta(chunk.index, said) | {"logprobs": self._of(chunk.logprobs)}

    def ending(self, index: int, reason: FinishReason) -> dict[str, Any]:
        return self._delta(index, {}) | {"finish_reason": reason}

    @staticmethod
    def _delta(index: int, delta: Mapping[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _of(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            _token(entry.token, entry.logprob)
            | {"top_logprobs": [_token(token, logprob) for token, logprob in entry.top]}
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}


class CompletionWire:
    prefix = "cmpl-"
    whole = part = "text_completion"

    def __init__(self, *, logprobs: int | None) -> None:
        self._logprobs = logprobs
        self._sent: dict[int, int] = {}

    def choice(self, index: int, choice: Collected) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(choice.text),
            "logprobs": self._of(index, choice.logprobs),
            "finish_reason": choice.finish_reason,
            **{key: value for key, value in choice.more.items() if key in _OF_PROMPT},
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, chunk: Chunk) -> dict[str, Any]:
        return {
            "index": chunk.index,
            "text": chunk.text,
            "logprobs": self._of(chunk.index, chunk.logprobs),
            "finish_reason": None,
        }

    def ending(self, index: int, reason: FinishReason) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def _of(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """`text_offset` counts characters from the start of the answer, over all its chunks."""
        if self._logprobs is None:
            return None
        offsets: list[int] = []
        for entry in logprobs:
            offset = self._sent.get(index, 0)
            offsets.append(offset)
            self._sent[index] = offset + len(entry.token)
        return {
            "tokens": [entry.token for entry in logprobs],
            "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
            # OpenAI's promise: the token that was drawn is there too, besides the likeliest.
            "top_logprobs": [
                {token: _finite(logprob) for token, logprob in entry.top}
                | {entry.token: _finite(entry.logprob)}
                for entry in logprobs
            ]
            if self._logprobs
            else None,
            "text_offset": offsets,
        }


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": _finite(logprob), "bytes": list(token.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def usage_body(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def composer_body(outcome: Outcome) -> dict[str, Any]:
    """Who answered and why: the `composer` field. Of an answer that has ended.

    `expert` wrote the text; `experts` are all that were called for it, best first, but for those
    that a router asked or whose gate weighed; `details` is what the strategy tells of how it came
    about; `gates`, where asked for, is what each of them tells of its gate, null for one that has
    none.
    """
    plan, timings = outcome.plan, outcome.timings
    assert plan is not None
    called = dict.fromkeys(timings.called)
    first = timings.first_token_ms
    return {
        "expert": answered_by(outcome),
        "experts": list(called),
        "policy": plan.policy,
        "strategy": plan.strategy,
        "scores": plan.scores,
        "reasons": plan.reasons,
        **({} if plan.confident is None else {"confident": plan.confident}),
        **({"details": outcome.details} if outcome.details else {}),
        **({} if outcome.request.gates is None else {"gates": _gates_body(called, outcome.gates)}),
        "catalog_version": outcome.catalog_version,
        "cost_usd": outcome.cost_usd,
        "decision_ms": round(timings.decision_ms, 3),
        "queue_ms": round(timings.queue_ms, 3),
        "run_ms": round(timings.run_ms, 3),
        "first_token_ms": None if first is None else round(first, 3),
    }


def _gates_body(called: Iterable[str], traces: Mapping[str, GateTrace]) -> dict[str, Any]:
    return {expert: _trace_body(traces.get(expert)) for expert in called}


def _trace_body(trace: GateTrace | None) -> dict[str, Any] | None:
    if trace is None:
        return None

    def tokens(own: Sequence[TokenGates]) -> list[dict[str, Any]]:
        return [{"token": one.token, "weights": one.weights} for one in own]

    return {
        "members": trace.members,
        "prompt": tokens(trace.prompt),
        "answers": [tokens(answer) for answer in trace.answers],
        "left_out": trace.left_out,
    }


def answered_by(outcome: Outcome) -> str:
    """The expert who wrote the answer; before there is one, the plan's best."""
    assert outcome.plan is not None
    return outcome.experts[0] if outcome.experts else outcome.plan.best
