"""Server-sent events, and answers out of them: decoded, and handed on as bytes."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from composer.engines.openai_wire import StreamReader, body_of, whole
from composer.engines.sse import EventSplitter, TooLong
from composer.errors import ContextTooLong, EngineError, EngineUnavailable
from composer.types import Call, Chunk, Forward, Sampling, Usage

THEIRS = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "lora-ab"}
OURS = Forward(id='chatcmpl-"ours"', model="auto\\é")


def call(**changes: Any) -> Call:
    plain = Call(
        id="chatcmpl-7/0",
        expert="e",
        server="s",
        adapter=None,
        messages=({"role": "user", "content": "hi"},),
        prompt=None,
        sampling=Sampling(),
        context_window=100,
        stream=True,
    )
    return dataclasses.replace(plain, **changes)


def split(*parts: bytes) -> list[bytes]:
    splitter = EventSplitter()
    return [data for part in parts for data in splitter.feed(part)]


# --- splitting ---------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)
ends = st.sampled_from(["\n", "\r\n", "\r"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream in any mixture of line ends, and what it says."""
    written, said = "", []
    for _ in range(draw(st.integers(0, 6))):
        lines = draw(st.lists(texts, max_size=3))
        if draw(st.booleans()):
            written += ": keep-alive" + draw(ends)
        if draw(st.booleans()):
            written += "event: message" + draw(ends)
        for line in lines:
            written += "data: " + line + draw(ends)
        end = draw(ends)
        # CR LF is one line end: a CR cannot be followed by an LF that ends an empty line.
        written += "\r\n" if written.endswith("\r") and end == "\n" else end
        if lines:
            said.append("\n".join(lines).encode())
    return written.encode(), said


@given(streams(), st.data())
@example((b"data: a\r\n\r\ndata: b\r\r", [b"a", b"b"]), None)
@example((b"data: a\n\ndata: b\n\n", [b"a", b"b"]), None)
def test_any_cut_of_a_stream_gives_the_same_events(
    stream: tuple[bytes, list[bytes]], data: st.DataObject | None
) -> None:
    written, said = stream
    assert split(written) == said
    assert split(*(bytes([byte]) for byte in written)) == said
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=8)))
        assert split(*(written[a:b] for a, b in pairwise([0, *cuts, len(written)]))) == said


def test_a_field_without_a_space_and_a_cut_off_end() -> None:
    assert split(b"data:a\ndata:  b\n\ndata: never ended\n") == [b"a\n b"]


def test_an_event_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composer.engines.sse.MOST_BYTES", 100)
    splitter = EventSplitter()
    with pytest.raises(TooLong):
        splitter.feed(b"data: " + b"x" * 100)


# --- answers -----------------------------------------------------------------------------------


def piece(text: str, index: int = 0, end: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": end}
    return THEIRS | {"choices": [choice | more]}


USAGE = THEIRS | {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}


def read(reader: StreamReader, *events: Any, dumps: Any = orjson.dumps) -> list[Chunk]:
    datas = [event if isinstance(event, bytes) else dumps(event) for event in events]
    return [chunk for data in datas for chunk in reader.read(data)] + reader.last()


def spaced(event: Any) -> bytes:
    return json.dumps(event).encode()


def bare(chunk: Chunk) -> dict[str, Any]:
    """The JSON of a chunk that is handed on."""
    assert chunk.raw is not None
    assert chunk.raw.startswith(b"data: ")
    assert chunk.raw.endswith(b"\n\n")
    assert (chunk.text, chunk.logprobs, chunk.delta) == ("", (), {})
    return orjson.loads(chunk.raw[6:])


sayings = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ['"id":"chatcmpl-1"', '"model":"lora-ab"', '"finish_reason":"stop"', "[DONE]", '"usage":{']
)


@given(
    st.lists(st.tuples(sayings, st.integers(0, 2)), max_size=12),
    st.sampled_from([orjson.dumps, spaced]),
)
def test_handed_on_is_what_was_sent_but_for_id_and_model(
    sent: list[tuple[str, int]], dumps: Any
) -> None:
    events = [piece(text, index) for text, index in sent]
    events += [piece("", index, "stop") for index in range(3)]
    sampling = Sampling(n=3)
    decoded = read(
        StreamReader("s", call(sampling=sampling)), *events, USAGE, b"[DONE]", dumps=dumps
    )
    reader = StreamReader("s", call(sampling=sampling, forward=OURS))
    handed = read(reader, *events, USAGE, b"[DONE]", dumps=dumps)
    assert reader.done
    assert not reader.unfinished
    assert decoded[-1] == handed[-1] == Chunk(usage=Usage(3, 5))
    assert [(c.text, c.index) for c in decoded[:-4]] == sent
    ours = {"id": OURS.id, "model": OURS.model}
    assert [bare(chunk) for chunk in handed[:-1]] == [event | ours for event in events]
    assert [(c.finish_reason, c.index) for c in handed[-4:-1]] == [("stop", i) for i in range(3)]


def test_only_the_first_event_and_the_ends_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = StreamReader("s", call(forward=OURS))
    decoded: list[bytes] = []
    decode = StreamReader._decoded
    monkeypatch.setattr(
        StreamReader, "_decoded", lambda self, data: (decoded.append(data), decode(self, data))[1]
    )
    events = [piece(str(i)) for i in range(9)] + [piece("", end="stop"), USAGE]
    read(reader, *events, b"[DONE]")
    assert decoded == [orjson.dumps(event) for event in (events[0], events[-2], events[-1])]


def test_a_server_that_changes_its_way_of_writing_is_still_renamed() -> None:
    reader = StreamReader("s", call(forward=OURS))
    events = [orjson.dumps(piece("a")), spaced(piece("b")), orjson.dumps(piece("c", end="stop"))]
    for chunk in read(reader, *events, b"[DONE]"):
        assert (bare(chunk)["id"], bare(chunk)["model"]) == (OURS.id, OURS.model)


def test_a_server_that_names_no_id_is_still_renamed() -> None:
    reader = StreamReader("s", call(forward=OURS))
    events = [{k: v for k, v in piece(t, end=e).items() if k != "id"} for t, e in
              [("a", None), ("b", "stop")]]  # fmt: skip
    for chunk in read(reader, *events, b"[DONE]"):
        assert (bare(chunk)["id"], bare(chunk)["model"]) == (OURS.id, OURS.model)


def test_usage_beside_the_last_text_is_taken_out() -> None:
    reader = StreamReader("s", call(forward=OURS))
    end = piece("b", end="stop") | {"usage": USAGE["usage"]}
    *texts, last = read(reader, piece("a"), end, b"[DONE]")
    assert last == Chunk(usage=Usage(3, 5))
    assert "usage" not in bare(texts[-1])
    assert texts[-1].finish_reason == "stop"


def test_choices_that_end_in_one_event_end_apart() -> None:
    reader = StreamReader("s", call(forward=OURS, sampling=Sampling(n=2)))
    both = piece("a", 0, "stop")
    both["choices"] += piece("b", 1, "length")["choices"]
    first, second = read(reader, both, b"[DONE]")
    assert (first.finish_reason, first.index) == ("stop", 0)
    assert (second.finish_reason, second.index) == ("length", 1)
    assert [c["delta"]["content"] for c in bare(second)["choices"]] == ["b"]


def test_reasons_of_other_servers() -> None:
    reader = StreamReader("s", call(forward=OURS))
    (chunk,) = read(reader, piece("a", end="eos_token"), b"[DONE]")
    assert bare(chunk)["choices"][0]["finish_reason"] == chunk.finish_reason == "stop"
    with pytest.raises(EngineUnavailable, match="stops or sleeps"):
        StreamReader("s", call(forward=OURS)).read(orjson.dumps(piece("a", end="abort")))
    with pytest.raises(EngineError, match="middle"):
        StreamReader("s", call()).read(orjson.dumps(piece("a", end="error")))


def test_other_fields_of_a_delta_are_kept() -> None:
    tool = [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": "{"}}]
    event = THEIRS | {
        "choices": [
            {
                "index": 0,
                "delta": {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": tool,
                    "refusal": None,
                },
                "finish_reason": None,
            }
        ]
    }
    (chunk,) = StreamReader("s", call()).read(orjson.dumps(event))
    assert chunk.delta == {"tool_calls": tool}
    assert chunk.text == ""


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        ({"message": "boom", "code": 500}, EngineError, "boom"),
        ({"message": "busy", "code": 503}, EngineUnavailable, "busy"),
        ({"message": "EngineCore encountered an issue.", "code": 500}, EngineUnavailable, "issue"),
        ({"message": "maximum context length is 5 tokens", "code": 400}, ContextTooLong, "5"),
        ("plain words", EngineError, "plain words"),
    ],
)
def test_an_error_event_is_raised(error: Any, kind: type[Exception], says: str) -> None:
    reader = StreamReader("s", call(forward=OURS))
    reader.read(orjson.dumps(piece("a")))
    with pytest.raises(kind, match=says) as caught:
        reader.read(orjson.dumps({"error": error}))
    assert type(caught.value) is kind


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"id":"x"}', b'{"choices":[{}]}'])
@pytest.mark.parametrize("forward", [None, OURS])
def test_what_is_no_chunk_is_an_error_that_shows_it(data: bytes, forward: Forward | None) -> None:
    with pytest.raises(EngineError, match="server 's' sent"):
        StreamReader("s", call(forward=forward)).read(data)


def test_a_stream_that_ends_too_early() -> None:
    reader = StreamReader("s", call())
    reader.read(orjson.dumps(piece("a")))
    with pytest.raises(EngineUnavailable, match="middle of an answer"):
        reader.last()


def test_log_probabilities_of_both_endpoints() -> None:
    content = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [
        {"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -2.0}]}]  # fmt: skip
    sampling = Sampling(logprobs=2)
    event = piece("a", logprobs={"content": content})
    (chunk,) = StreamReader("s", call(sampling=sampling)).read(orjson.dumps(event))
    (token,) = chunk.logprobs
    assert (token.token, token.logprob, token.top) == ("a", -0.5, (("a", -0.5), ("b", -2.0)))
    drawn = {"tokens": ["c"], "token_logprobs": [-3.0], "text_offset": [0],
             "top_logprobs": [{"c": -3.0, "a": -0.5, "b": -2.0}]}  # fmt: skip
    choice = {"index": 0, "text": "c", "logprobs": drawn, "finish_reason": None}
    plain = call(sampling=sampling, messages=(), prompt="p")
    (chunk,) = StreamReader("s", plain).read(orjson.dumps(THEIRS | {"choices": [choice]}))
    (token,) = chunk.logprobs
    assert (token.token, token.logprob, token.top) == ("c", -3.0, (("a", -0.5), ("b", -2.0)))


def test_whole_answers() -> None:
    def choice(index: int, text: str | None, end: str = "stop", **more: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None} | more
        return {"index": index, "message": message, "finish_reason": end}

    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    tools = [{"id": "c", "function": {"name": "f"}}]
    body = {
        "choices": [choice(0, "a"), choice(1, None, "tool_calls", tool_calls=tools)],
        "usage": usage,
    }
    first, second = whole("s", call(), body)
    assert first == Chunk(text="a", finish_reason="stop")
    assert second.delta == {"tool_calls": tools}
    assert (second.index, second.finish_reason, second.usage) == (1, "tool_calls", Usage(1, 2))
    asked = [None, {"1": {"logprob": -1.0}}]
    assert whole("s", call(), body | {"prompt_logprobs": asked})[0].delta == {
        "prompt_logprobs": asked
    }
    plain = {"index": 0, "text": "a", "finish_reason": "stop", "prompt_logprobs": asked}
    (of_completion,) = whole("s", call(messages=(), prompt="p"), {"choices": [plain]})
    assert of_completion.delta == {"prompt_logprobs": asked}
    with pytest.raises(EngineError, match="no answer"):
        whole("s", call(), {"object": "list"})


def test_a_request_says_what_the_call_says_and_no_more() -> None:
    plain = body_of(call(stream=False), "m")
    assert plain == {"model": "m", "messages": call().messages}
    sampling = Sampling(
        max_tokens=5, temperature=0.0, top_p=0.9, seed=0, stop=("x",), logprobs=0, n=2
    )
    full = body_of(
        call(sampling=sampling, extra={"tools": [1], "model": "theirs"}), "m",
        max_tokens_field="max_completion_tokens",
    )  # fmt: skip
    assert full == {
        "tools": [1], "model": "m", "messages": call().messages, "max_completion_tokens": 5,
        "temperature": 0.0, "top_p": 0.9, "seed": 0, "stop": ("x",), "n": 2, "logprobs": True,
        "top_logprobs": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    raw = call(messages=(), prompt="p", sampling=sampling, stream=False)
    assert body_of(raw, "m", max_tokens_field="max_completion_tokens") == {
        "model": "m", "prompt": "p", "max_tokens": 5, "temperature": 0.0, "top_p": 0.9, "seed": 0,
        "stop": ("x",), "n": 2, "logprobs": 0,
    }  # fmt: skip
