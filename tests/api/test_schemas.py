"""What is honoured, what is ignored, and what is refused: every field of the wire, by name."""

from __future__ import annotations

from typing import Any

import httpx
import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as completion_params
import pytest

from api.schemas import ChatBody, CompletionBody
from tests.api.fakes import World

HELLO = {"model": "auto", "messages": [{"role": "user", "content": "hello"}]}
PLAIN = {"model": "auto", "prompt": "hello"}
PATHS = {"chat": ("/v1/chat/completions", HELLO), "plain": ("/v1/completions", PLAIN)}


async def post(client: httpx.AsyncClient, kind: str, fields: dict[str, Any]) -> httpx.Response:
    path, base = PATHS[kind]
    return await client.post(path, json={**base, **fields})


def assert_refused(response: httpx.Response, param: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert error["message"]


# --- every field OpenAI has is known ------------------------------------------------------


def names(params: type) -> set[str]:
    return set(params.__annotations__)


def test_no_field_of_openais_chat_is_unknown() -> None:
    theirs = names(chat_params.CompletionCreateParamsBase) | {"stream"}
    assert theirs - set(ChatBody.model_fields) == set()


def test_no_field_of_openais_completions_is_unknown() -> None:
    theirs = names(completion_params.CompletionCreateParamsBase) | {"stream"}
    assert theirs - set(CompletionBody.model_fields) == set()


# --- refused rather than ignored -----------------------------------------------------------

BOTH_REFUSE = [
    ("stream_options", {"include_obfuscation": True}),
]
CHAT_REFUSES = [
    *BOTH_REFUSE,
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("function_call", "auto"),
    ("functions", [{"name": "f"}]),
    ("modalities", ["text", "audio"]),
    ("moderation", {"model": "x"}),
    ("prediction", {"type": "content", "content": "x"}),
    ("web_search_options", {}),
]
PLAIN_REFUSES = [*BOTH_REFUSE, ("best_of", 2), ("echo", True), ("suffix", "end")]
REFUSED = [("chat", *row) for row in CHAT_REFUSES] + [("plain", *row) for row in PLAIN_REFUSES]


@pytest.mark.parametrize(("kind", "field", "value"), REFUSED)
async def test_what_would_change_the_answer_is_refused(
    client: httpx.AsyncClient, kind: str, field: str, value: Any
) -> None:
    stream = {"stream": True} if field == "stream_options" else {}
    response = await post(client, kind, {field: value, **stream})
    inner = ".include_obfuscation" if field == "stream_options" else ""
    assert_refused(response, field + inner)
    assert response.json()["error"]["code"] == "unsupported"


NEUTRAL = [
    ("chat", {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}),
    ("chat", {"modalities": ["text"], "functions": [], "function_call": "none"}),
    ("chat", {"response_format": {"type": "text"}, "parallel_tool_calls": True}),
    ("plain", {"best_of": 1, "echo": False, "suffix": "", "logit_bias": None}),
    ("chat", {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}),
    ("plain", {"user": "u"}),
    ("chat", dict.fromkeys(set(ChatBody.model_fields) - {"messages"})),
    ("plain", dict.fromkeys(set(CompletionBody.model_fields) - {"prompt"})),
]


@pytest.mark.parametrize(("kind", "fields"), NEUTRAL)
async def test_what_asks_for_nothing_passes(
    client: httpx.AsyncClient, kind: str, fields: dict[str, Any]
) -> None:
    response = await post(client, kind, fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("kind", ["chat", "plain"])
@pytest.mark.parametrize("field", ["top_K", "n_probs", "guided_json", "temprature"])
async def test_an_unknown_field_is_refused_by_name(
    client: httpx.AsyncClient, kind: str, field: str
) -> None:
    assert_refused(await post(client, kind, {field: 1}), field)


# --- bounds --------------------------------------------------------------------------------

BAD = [
    ("n", 0), ("n", 9), ("n", 1.5), ("n", True), ("n", "1"),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2.5),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"),
    ("top_p", 0), ("top_p", 1.1),
    ("seed", 2**63), ("seed", 0.5), ("seed", "7"),
    ("stop", ["a", "b", "c", "d", "e"]), ("stop", [""]), ("stop", ""), ("stop", 3),
    ("stream", "true"), ("stream", 1),
    ("composer", {"exlude": ["x"]}), ("composer", {"exclude": ["nobody"]}),
    ("composer", {"exclude": "x"}), ("composer", []),
    ("model", 3), ("model", "x" * 513), ("user", 3),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["chat", "plain"])
@pytest.mark.parametrize(("field", "value"), BAD)
async def test_out_of_bounds_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, kind: str, field: str, value: Any
) -> None:
    response = await post(client, kind, {field: value})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].split(".")[0] == field


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("chat", {"top_logprobs": 2}, "top_logprobs"),
        ("chat", {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ("chat", {"logprobs": 2}, "logprobs"),
        ("plain", {"logprobs": 21}, "logprobs"),
        ("plain", {"logprobs": True}, "logprobs"),
        ("chat", {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ("chat", {"tool_choice": "auto"}, "tool_choice"),
        ("chat", {"tools": []}, "tools"),
        ("chat", {"tools": [{"type": "function"}]}, "tools.0.function"),
        ("chat", {"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ("chat", {"response_format": {"type": "xml"}}, "response_format.type"),
        (
            "chat",
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
        ),
        ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("plain", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("plain", {"prompt": ""}, "prompt"),
        ("plain", {"prompt": []}, "prompt"),
        ("plain", {"prompt": ["a", "b"]}, "prompt"),
        ("plain", {"prompt": [1, 2, 3]}, "prompt"),
        ("plain", {"prompt": [[1, 2, 3]]}, "prompt"),
        ("plain", {"prompt": None}, "prompt"),
    ],
)
async def test_contradictions_and_shapes(
    client: httpx.AsyncClient, kind: str, fields: dict[str, Any], param: str
) -> None:
    assert_refused(await post(client, kind, fields), param)


# --- messages ------------------------------------------------------------------------------

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hello", "messages"),
        ([3], "messages.0"),
        ([{}], "messages.0.role"),
        ([{"role": "robot", "content": "x"}], "messages.0.role"),
        ([{"role": "function", "name": "f", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([USER, {"role": "user", "content": None}], "messages.1.content"),
        ([{"role": "user", "content": 3}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([{"role": "user", "content": ["x"]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
            "messages.0.content.0.type",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc"}}]}],
            "messages.0.content.0.image_url.url",
        ),
        (
            [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages.0.content.0.type",
        ),
        ([USER, {"role": "assistant"}], "messages.1"),
        ([USER, {"role": "assistant", "content": None}], "messages.1"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": []}], "messages.1.tool_calls"),
        ([USER, {"role": "tool", "content": "x"}], "messages.1.tool_call_id"),
        ([{"role": "user", "content": "x", "colour": "red"}], "messages.0.colour"),
    ],
)
async def test_wrong_messages_are_refused_where_they_are_wrong(
    client: httpx.AsyncClient, messages: Any, param: str
) -> None:
    assert_refused(await client.post(PATHS["chat"][0], json={"messages": messages}), param)


async def test_missing_messages_are_named(client: httpx.AsyncClient) -> None:
    assert_refused(await client.post(PATHS["chat"][0], json={"model": "auto"}), "messages")


async def test_messages_reach_the_engine_as_experts_read_them(
    client: httpx.AsyncClient, world: World
) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        # As the openai client sends an earlier answer back.
        {
            "role": "assistant",
            "content": "c",
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        },
        {"role": "user", "content": "hello", "name": "ann"},
    ]
    response = await client.post(PATHS["chat"][0], json={"messages": messages})
    assert response.status_code == 200, response.text
    [call] = world.engine.calls
    assert call.messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "hello", "name": "ann"},
    )


def test_tools_json_and_images_are_needs_and_pass_through_untouched() -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"a": 1}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}}
    body = ChatBody.model_validate(
        {
            "messages": [{"role": "user", "content": [image, {"type": "text", "text": "what?"}]}],
            "tools": [tool],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "response_format": wanted,
            "logprobs": True,
            "top_logprobs": 3,
        }
    )
    request = body.request("r")
    assert request.needs == {"tools", "json", "vision", "logprobs"}
    assert request.extra == {
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "response_format": wanted,
    }
    assert request.sampling.logprobs == 3
    assert request.messages[0]["content"][0] == image  # type: ignore[index]
    assert request.text == "what?"


def test_the_trace_of_a_tool_call_needs_an_expert_that_reads_it() -> None:
    body = ChatBody.model_validate(
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
            ]
        }
    )
    request = body.request("r")
    assert request.needs == {"tools"}
    assert request.messages[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_logprobs_zero_asks_for_the_drawn_token_alone() -> None:
    chat = ChatBody.model_validate({**HELLO, "logprobs": True}).request("r")
    plain = CompletionBody.model_validate({**PLAIN, "logprobs": 0}).request("r")
    assert chat.sampling.logprobs == plain.sampling.logprobs == 0
    assert chat.needs == plain.needs == {"logprobs"}
    assert ChatBody.model_validate({**HELLO, "logprobs": False}).request("r").needs == frozenset()


async def test_many_problems_are_one_message(client: httpx.AsyncClient) -> None:
    fields = {"n": 0, "top_p": 2, "seed": "x", "temperature": 3, "max_tokens": 0}
    message = (await post(client, "chat", fields)).json()["error"]["message"]
    assert message.endswith("and 2 more")
    assert message.count(";") == 3


def test_completions_take_openais_default_of_sixteen_tokens() -> None:
    assert CompletionBody.model_validate(PLAIN).request("r").sampling.max_tokens == 16
    assert ChatBody.model_validate(HELLO).request("r").sampling.max_tokens is None
