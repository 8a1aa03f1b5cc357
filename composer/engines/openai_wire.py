"""Calls as OpenAI's request bodies, and OpenAI's answers as chunks. Pure; knows nothing of HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from composer.engines.http import refusal
from composer.errors import EngineError, EngineUnavailable
from composer.types import Call, Chunk, FinishReason, Forward, TokenLogprob, Usage

DONE = b"[DONE]"


def path_of(call: Call) -> str:
    """Below `/v1`."""
    return "/chat/completions" if call.prompt is None else "/completions"


def body_of(call: Call, model: str, *, max_tokens_field: str = "max_tokens") -> dict[str, Any]:
    """What is open stays open: the server's own default holds."""
    sampling = call.sampling
    body: dict[str, Any] = dict(call.extra)
    body["model"] = model
    if call.prompt is None:
        body["messages"] = call.messages
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    else:
        body["prompt"] = call.prompt
        max_tokens_field = "max_tokens"  # the only one it has
        if sampling.logprobs is not None:
            body["logprobs"] = sampling.logprobs
    given = {
        max_tokens_field: sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop": sampling.stop or None,
        "n": sampling.n if sampling.n > 1 else None,
        "stream": True if call.stream else None,
        "stream_options": {"include_usage": True} if call.stream else None,
    }
    return body | {name: value for name, value in given.items() if value is not None}


# --- whole answers ---------------------------------------------------------------------------


def whole(server: str, call: Call, body: Any) -> list[Chunk]:
    """One chunk per choice; the last carries the usage. Raises EngineError where the body is not
    an answer."""
    try:
        chunks = [_whole_choice(server, call, choice) for choice in body["choices"]]
        usage = _usage(body.get("usage"))
        asked = body.get("prompt_logprobs")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"server {server!r} sent no answer: {error!r} in {body!r:.500}") from None
    if asked is not None and chunks:
        chunks[0] = replace(chunks[0], delta={**chunks[0].delta, "prompt_logprobs": asked})
    if usage is not None:
        if chunks:
            chunks[-1] = replace(chunks[-1], usage=usage)
        else:
            chunks = [Chunk(usage=usage)]
    return chunks


def _whole_choice(server: str, call: Call, choice: Mapping[str, Any]) -> Chunk:
    message = choice.get("message") or {}
    text = message.get("content") if call.prompt is None else choice["text"]
    delta = _rest(message)
    if (asked := choice.get("prompt_logprobs")) is not None:  # of a completion it stands here
        delta = {**delta, "prompt_logprobs": asked}
    return Chunk(
        text=text or "",
        index=choice["index"],
        logprobs=_logprobs(choice.get("logprobs"), call.sampling.logprobs),
        finish_reason=_reason(server, choice.get("finish_reason")),
        delta=delta,
    )


# --- streamed answers ------------------------------------------------------------------------

_SPECIAL = re.compile(
    rb'"(?:finish_reason"\s*:\s*"|usage"\s*:\s*\{|error"\s*:\s*["{]|choices"\s*:\s*\[\s*\])'
)
"""What must be read even of an answer that is handed on: ends, usage, errors, events without a
choice. A JSON string escapes its quotes, so no text that a model writes can hold these bytes."""


class StreamReader:
    """One streamed answer's events as chunks: decoded, or, where the call allows it, handed on
    with our id and model put in as bytes.

    `done` once `[DONE]` came; `unfinished` are the choices without a finish reason; the usage goes
    into a last chunk, see `last`.
    """

    def __init__(self, server: str, call: Call) -> None:
        self._server = server
        self._call = call
        self._rewrite = Rewrite(call.forward) if call.forward is not None else None
        self._usage: Usage | None = None
        self.unfinished = set(range(call.sampling.n))
        self.done = False

    def read(self, data: bytes) -> list[Chunk]:
        """The chunks of one event's data. Raises the error that it tells of."""
        if data.strip() == DONE:
            self.done = True
            return []
        rewrite = self._rewrite
        if rewrite is not None and rewrite.learnt and _SPECIAL.search(data) is None:
            raw = rewrite(data)
            if raw is not None:
                return [Chunk(raw=raw)]
        event = self._decoded(data)
        if rewrite is not None and not rewrite.learnt:
            rewrite.learn(data, event)
        try:
            return self._chunks(data, event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"server {self._server!r} sent an event that is no chunk of an answer: {error!r} "
                f"in {data!r:.500}"
            ) from None

    def last(self) -> list[Chunk]:
        """The chunk after all others, once the stream has ended. Raises EngineUnavailable where
        it ended too early."""
        if not self.done and self.unfinished:
            raise EngineUnavailable(
                f"server {self._server!r} closed the connection in the middle of an answer"
            )
        return [Chunk(usage=self._usage)] if self._usage is not None else []

    def _decoded(self, data: bytes) -> dict[str, Any]:
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise EngineError(
                f"server {self._server!r} sent an event that is no JSON ({error}): {data!r:.500}"
            ) from None
        if not isinstance(event, dict):
            raise EngineError(f"server {self._server!r} sent {data!r:.500} as an event")
        if event.get("error"):
            code = event["error"].get("code") if isinstance(event["error"], dict) else None
            raise refusal(self._server, code if isinstance(code, int) else 500, event)
        return event

    def _chunks(self, data: bytes, event: dict[str, Any]) -> list[Chunk]:
        self._usage = _usage(event.get("usage")) or self._usage
        choices = event["choices"]
        reasons = [_reason(self._server, choice.get("finish_reason")) for choice in choices]
        ended = [c["index"] for c, reason in zip(choices, reasons, strict=True) if reason]
        self.unfinished.difference_update(ended)
        if self._rewrite is None:
            return [
                self._chunk(choice, reason) for choice, reason in zip(choices, reasons, strict=True)
            ]
        if not choices:
            return []  # of usage, which goes into the last chunk, or of what only its maker reads
        if len(choices) == 1 and event.get("usage") is None and reasons[0] in (
            None,
            choices[0].get("finish_reason"),
        ):  # fmt: skip
            raw = self._rewrite(data) or self._rewrite.encoded(event)
            return [Chunk(raw=raw, index=choices[0]["index"], finish_reason=reasons[0])]
        event = {key: value for key, value in event.items() if key != "usage"}
        return [
            Chunk(
                raw=self._rewrite.encoded(
                    event | {"choices": [{**choice, "finish_reason": reason}]}
                ),
                index=choice["index"],
                finish_reason=reason,
            )
            for choice, reason in zip(choices, reasons, strict=True)
        ]

    def _chunk(self, choice: Mapping[str, Any], reason: FinishReason | None) -> Chunk:
        delta = choice.get("delta") or {}
        text = delta.get("content") if self._call.prompt is None else choice["text"]
        return Chunk(
            text=text or "",
            index=choice["index"],
            logprobs=_logprobs(choice.get("logprobs"), self._call.sampling.logprobs),
            finish_reason=reason,
            delta=_rest(delta),
        )


class Rewrite:
    """Puts our `id` and `model` in the place of the server's, as bytes.

    How the server writes the two is learnt from the first event. Its `"id":"…"` cannot occur
    within a text, whose quotes are escaped; where it occurs again as a field, it means the same.
    """

    def __init__(self, forward: Forward) -> None:
        self._ours = {"id": forward.id, "model": forward.model}
        self._pairs: list[tuple[bytes, bytes]] = []
        self.learnt = False

    def learn(self, data: bytes, event: Mapping[str, Any]) -> None:
        pairs = []
        for field, ours in self._ours.items():
            for match in re.finditer(rb'"%s"(\s*:\s*)("(?:[^"\\]|\\.)*")' % field.encode(), data):
                if orjson.loads(match[2]) == event.get(field):
                    name = orjson.dumps(field)
                    pairs.append((match[0], name + match[1] + orjson.dumps(ours)))
                    break
        self.learnt = len(pairs) == len(self._ours)
        self._pairs = pairs

    def __call__(self, data: bytes) -> bytes | None:
        """The whole event, or None where it does not name the two as the first one did."""
        if not self.learnt:
            return None
        for theirs, ours in self._pairs:
            if theirs not in data:
                return None
            data = data.replace(theirs, ours)
        return b"data: " + data.replace(b"\n", b" ") + b"\n\n"

    def encoded(self, event: Mapping[str, Any]) -> bytes:
        """The same of a decoded event."""
        return b"data: " + orjson.dumps({**event, **self._ours}) + b"\n\n"


# --- their parts -----------------------------------------------------------------------------

_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


def _reason(server: str, written: str | None) -> FinishReason | None:
    """Raises for an answer that the server broke off; what else servers write is a stop."""
    if written is None:
        return None
    if written == "abort":
        raise EngineUnavailable(f"server {server!r} broke off the answer; it stops or sleeps")
    if written == "error":
        raise EngineError(f"server {server!r} failed in the middle of an answer")
    return _REASONS.get(written, "stop")


def _usage(written: Mapping[str, Any] | None) -> Usage | None:
    if written is None:
        return None
    return Usage(
        prompt_tokens=written["prompt_tokens"], completion_tokens=written["completion_tokens"]
    )


def _logprobs(written: Mapping[str, Any] | None, count: int | None) -> tuple[TokenLogprob, ...]:
    """Of a chat's choice, or of a completion's, whose alternatives also hold the drawn token."""
    if written is None or count is None:
        return ()
    if written.get("content") is not None:
        return tuple(
            TokenLogprob(
                token=entry["token"],
                logprob=entry["logprob"],
                top=tuple((t["token"], t["logprob"]) for t in entry["top_logprobs"][:count]),
            )
            for entry in written["content"]
        )
    if written.get("tokens") is None:
        return ()
    tops = written.get("top_logprobs") or [None] * len(written["tokens"])
    return tuple(
        TokenLogprob(
            token=token,
            logprob=logprob,
            top=tuple(sorted((top or {}).items(), key=lambda pair: -pair[1])[:count]),
        )
        for token, logprob, top in zip(
            written["tokens"], written["token_logprobs"], tops, strict=True
        )
    )


def _rest(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a message or delta says beside its text."""
    return {
        key: value
        for key, value in message.items()
        if value is not None and key not in ("role", "content") and value != []
    }
