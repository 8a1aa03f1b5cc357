"""Whatever JSON comes in, out comes a valid answer or a 4xx in OpenAI's shape, never a 5xx."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.schemas import ChatBody, CompletionBody, EmbeddingBody, ExpertBody, FeedbackBody
from tests.api.conftest import InProcess
from tests.api.fakes import make_world

PATHS = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/experts": ExpertBody,
    "/v1/feedback": FeedbackBody,
}
FIELDS = sorted({name for body in PATHS.values() for name in body.model_fields})

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from([0, 1, 2, 0.5, 1.0, -1, 1e308])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(["auto", "panel", "shout", "user", "assistant", "text", "fake-embedder"])
)
WORDS = st.sampled_from(
    ["role", "content", "type", "text", "function", "name", "exclude", "url", "id", "tool_calls"]
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url"])},
    optional={"text": st.text(max_size=9), "image_url": JSON},
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
    optional={
        "content": st.none() | st.text(max_size=20) | st.lists(PARTS, max_size=2),
        "name": st.text(max_size=5),
        "tool_call_id": st.text(max_size=5),
        "tool_calls": JSON,
    },
)
LIKELY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES, min_size=1, max_size=3)},
    optional={
        "model": st.sampled_from(["auto", "panel", "shout", "team/sort", "nobody"]),
        "n": st.integers(0, 9),
        "stream": st.booleans(),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
        "temperature": st.floats(-1, 3),
        "top_p": st.floats(-1, 2),
        "max_tokens": st.integers(-1, 200),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(-1, 21),
        "seed": st.integers(-(2**63), 2**64 - 1),
        "composer": st.fixed_dictionaries(
            {},
            optional={
                "exclude": st.lists(st.sampled_from(["shout", "team/sort", "x"])),
                "priority": st.sampled_from(["interactive", "batch", "now"]),
                "max_wait_s": st.floats(-1, 10, allow_nan=False),
            },
        ),
        "presence_penalty": st.floats(-1, 3),
        "logit_bias": st.dictionaries(st.text("0123456789x", max_size=3), st.floats(-101, 101)),
        "top_k": st.integers(-2, 3),
        "cache_salt": st.text(max_size=3),
        "stream_options": st.none() | st.fixed_dictionaries({"include_usage": st.booleans()}),
        "tools": JSON,
        "response_format": JSON,
    },
)
PLAIN = st.fixed_dictionaries(
    {"prompt": st.text(max_size=20) | st.lists(st.text(max_size=5), max_size=2)},
    optional={
        "logprobs": st.integers(-1, 21),
        "n": st.integers(0, 9),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
        "stream": st.booleans(),
        "max_tokens": st.integers(-1, 200),
        "echo": st.booleans(),
    },
)
ANYTHING = JSON | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5)


class Caller:
    """One world on one loop for all examples: starting one for each would be most of the time."""

    def __init__(self) -> None:
        self.world = make_world()
        self.client = InProcess(self.world)
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.client.__aenter__())

    def close(self) -> None:
        self.loop.run_until_complete(self.client.__aexit__(None, None, None))
        self.loop.close()

    def post(self, path: str, body: Any) -> httpx.Response:
        headers = {"content-type": "application/json"}
        content = orjson.dumps(body)
        return self.loop.run_until_complete(
            self.client.post(path, content=content, headers=headers)
        )


@pytest.fixture(scope="module")
def caller() -> Iterator[Caller]:
    caller = Caller()
    yield caller
    caller.close()


def check(caller: Caller, path: str, body: Any) -> None:
    response = caller.post(path, body)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) >= {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        *events, done = response.content.removesuffix(b"\n\n").split(b"\n\n")
        assert done == b"data: [DONE]"
        last = orjson.loads(events[-1].removeprefix(b"data: "))
        assert last["composer"]["expert"] in ("shout", "team/sort")
    elif path.endswith("completions"):
        answer = orjson.loads(response.content)
        assert answer["composer"]["expert"] in ("shout", "team/sort")
        assert all(choice["finish_reason"] in ("stop", "length") for choice in answer["choices"])
    assert caller.world.service.generations.holds == 0
    assert caller.world.engine.running == 0


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(path=st.sampled_from(sorted(PATHS)), body=ANYTHING)
def test_any_json(caller: Caller, path: str, body: Any) -> None:
    check(caller, path, body)


@FUZZ
@given(body=LIKELY)
def test_likely_chats(caller: Caller, body: Any) -> None:
    check(caller, "/v1/chat/completions", body)


@FUZZ
@given(body=PLAIN)
def test_likely_completions(caller: Caller, body: Any) -> None:
    check(caller, "/v1/completions", body)


@FUZZ
@given(content=st.binary(max_size=60), path=st.sampled_from(sorted(PATHS)))
def test_any_bytes(caller: Caller, content: bytes, path: str) -> None:
    response = caller.loop.run_until_complete(
        caller.client.post(path, content=content, headers={"content-type": "application/json"})
    )
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["message"]
