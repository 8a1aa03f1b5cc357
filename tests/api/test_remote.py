"""What only remote servers can do: tool calls, extra parameters, events that come ready made."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from typing import Any

import httpx
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.app import create_app
from api.parameters import CHAT_FIELDS, FIELDS
from api.responses import event, with_field
from api.schemas import ChatBody, CompletionBody
from api.wire import ChatWire, add_delta, collect
from composer.build import families
from composer.settings import Settings
from composer.types import SAFE_PARAMETERS, Chunk, Usage
from tests.api.conftest import InProcess, Serving
from tests.api.fakes import RelayEngine, World, make_remote
from tests.api.test_chat import events

HELLO = [{"role": "user", "content": "hello caller"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLS: list[dict[str, Any]] = [
    {"role": "assistant", "content": ""},
    {"reasoning_content": "I ought "},
    {"reasoning_content": "to call."},
    {
        "tool_calls": [
            {"index": 0, "id": "c0", "type": "function", "function": {"name": "f", "arguments": ""}}
        ]
    },
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
    {
        "tool_calls": [
            {
                "index": 1,
                "id": "c1",
                "type": "function",
                "function": {"name": "g", "arguments": "{"},
            }
        ]
    },
    {"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]},
    {"tool_calls": [{"index": 1, "function": {"arguments": "}"}}]},
]
MADE = [
    {"id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
    {"id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
]


@pytest.fixture
def world() -> World:
    return make_remote()


def engine(world: World) -> RelayEngine:
    assert isinstance(world.engine, RelayEngine)
    return world.engine


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with InProcess(world) as client:
        yield client


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"model": "auto", "messages": HELLO, **fields}
    return await client.post("/v1/chat/completions", json=body)


# --- extra parameters ------------------------------------------------------------------------

ASKED: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "presence_penalty": -2,
    "logit_bias": {"50256": -100},
    "top_k": -1,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "stop_token_ids": [0, 2],
    "min_tokens": 0,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": True,
    "reasoning_effort": "low",
    "verbosity": "high",
}


@pytest.mark.parametrize("field", sorted(ASKED))
async def test_a_parameter_reaches_an_engine_that_understands_it(
    field: str, client: httpx.AsyncClient, world: World
) -> None:
    response = await post(client, **{field: ASKED[field]})
    assert response.status_code == 200, response.text
    [call] = world.engine.calls
    assert call.extra == {field: ASKED[field]}
    assert call.expert == "caller"


def test_every_parameter_that_policies_allow_by_default_is_tried_here() -> None:
    assert ASKED.keys() == SAFE_PARAMETERS


NOT_ASKED = {"echo", "logprob_token_ids", "return_token_ids"}
"""What vLLM understands and an answer in OpenAI's shape could not carry."""


def test_what_engines_understand_can_be_asked_for_and_the_other_way_round() -> None:
    understood = {name for family in families().engines.values() for name in family.parameters}
    assert understood - NOT_ASKED == CHAT_FIELDS


async def test_completions_have_their_parameters_too(
    client: httpx.AsyncClient, world: World
) -> None:
    fields = {name: value for name, value in ASKED.items() if name in FIELDS}
    response = await client.post("/v1/completions", json={"prompt": "caller", **fields})
    assert response.status_code == 200, response.text
    assert world.engine.calls[0].extra == fields


@pytest.mark.parametrize(
    "fields",
    [{"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}, dict.fromkeys(ASKED)],
)
async def test_what_asks_for_nothing_needs_nobody_who_understands_it(
    fields: dict[str, Any], client: httpx.AsyncClient, world: World
) -> None:
    assert (await post(client, model="plain", **fields)).status_code == 200
    assert world.engine.calls[0].extra == {}


@pytest.mark.parametrize("field", sorted(ASKED))
async def test_an_expert_that_does_not_understand_a_parameter_is_not_asked(
    field: str, client: httpx.AsyncClient, world: World
) -> None:
    refused = await post(client, model="plain", **{field: ASKED[field]})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == field
    assert refused.json()["error"]["code"] == "unsupported"
    answer = await post(client, messages=[{"role": "user", "content": "plain"}], top_k=3)
    assert answer.json()["composer"]["expert"] == "caller"
    assert [call.expert for call in world.engine.calls] == ["caller"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache_salt", "x"),
        ("prompt_logprobs", 3),
        ("priority", -1),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
async def test_what_reaches_beyond_the_answer_has_to_be_allowed_by_the_policy(
    field: str, value: Any, client: httpx.AsyncClient, world: World
) -> None:
    refused = await post(client, **{field: value})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported")
    assert error["message"].startswith(f"{field!r} is not allowed for model 'auto'; leave it out")
    assert world.engine.calls == []


async def test_what_a_policy_allows_by_name_is_passed_on(world: World) -> None:
    world.allowed = frozenset({"cache_salt"})
    async with InProcess(world) as client:
        assert (await post(client, model="open", cache_salt="x")).status_code == 200
        refused = await post(client, model="open", top_k=1)  # the default is replaced
        assert refused.json()["error"]["param"] == "top_k"
    assert [call.extra for call in world.engine.calls] == [{"cache_salt": "x"}]


async def test_what_a_server_says_of_the_prompt_stands_beside_the_choices(world: World) -> None:
    world.allowed = frozenset({"prompt_logprobs"})
    said = [None, {"7": {"logprob": -0.5}}]
    engine(world).deltas = [{"content": "one", "prompt_logprobs": said}]
    async with InProcess(world) as client:
        chat = (await post(client, model="open", prompt_logprobs=1)).json()
        body = {"model": "open", "prompt": "hello caller", "prompt_logprobs": 1}
        plain = (await client.post("/v1/completions", json=body)).json()
    assert chat["prompt_logprobs"] == said
    assert "prompt_logprobs" not in chat["choices"][0]["message"]
    assert plain["choices"][0]["prompt_logprobs"] == said


BAD: list[tuple[str, Any]] = [
    ("frequency_penalty", 2.1), ("presence_penalty", "1"), ("presence_penalty", True),
    ("logit_bias", {"the": 1}), ("logit_bias", {"1": 101}), ("logit_bias", [1]),
    ("top_k", -2), ("top_k", 1.5), ("min_p", 1.1), ("min_p", -0.1),
    ("repetition_penalty", 0), ("repetition_penalty", 11),
    ("stop_token_ids", [-1]), ("stop_token_ids", 3), ("stop_token_ids", [0] * 1025),
    ("min_tokens", -1), ("ignore_eos", 1), ("skip_special_tokens", "yes"),
    ("prompt_logprobs", 21), ("prompt_logprobs", -1), ("cache_salt", ""), ("priority", 2**31),
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(("field", "value"), BAD)
async def test_a_parameter_out_of_bounds_is_a_400_that_names_it(
    field: str, value: Any, path: str, client: httpx.AsyncClient
) -> None:
    base = {"messages": HELLO} if "chat" in path else {"prompt": "x"}
    refused = await client.post(path, json={**base, field: value})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].split(".")[0] == field
    assert refused.json()["error"]["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reasoning_effort", "much"),
        ("verbosity", 3),
        ("chat_template", ""),
        ("chat_template", "x" * 65_537),
        ("chat_template_kwargs", []),
    ],
)
async def test_a_chats_parameter_out_of_bounds(
    field: str, value: Any, client: httpx.AsyncClient
) -> None:
    refused = await post(client, **{field: value})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == field
    plain = await client.post("/v1/completions", json={"prompt": "x", field: value})
    assert "this field is not known here" in plain.json()["error"]["message"]


async def test_more_tokens_at_least_than_at_most(client: httpx.AsyncClient) -> None:
    refused = await post(client, min_tokens=5, max_tokens=4)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "min_tokens"


def test_parameters_are_told_apart_from_openais_core() -> None:
    body = {"messages": HELLO, "tools": TOOLS, "top_k": 5, "presence_penalty": 0}
    request = ChatBody.model_validate(body).request("r")
    assert request.parameters == {"top_k"}
    assert request.extra == {"tools": TOOLS, "top_k": 5}


# --- the composer field ----------------------------------------------------------------------


def test_priority_and_the_longest_wait_are_the_requests() -> None:
    ours = {"priority": "batch", "max_wait_s": 30}
    request = CompletionBody.model_validate({"prompt": "x", "composer": ours}).request("r")
    assert (request.priority, request.max_wait_s) == ("batch", 30)
    request = CompletionBody.model_validate({"prompt": "x"}).request("r")
    assert (request.priority, request.max_wait_s) == ("interactive", None)


@pytest.mark.parametrize(
    ("ours", "param"),
    [
        ({"priority": "urgent"}, "composer.priority"),
        ({"max_wait_s": 0}, "composer.max_wait_s"),
        ({"max_wait_s": 86_401}, "composer.max_wait_s"),
        ({"max_wait_s": "30"}, "composer.max_wait_s"),
        ({"exclude": ["caler"]}, "composer.exclude"),
        ({"exclude": ["auto"]}, "composer.exclude"),
    ],
)
async def test_what_the_composer_field_cannot_hold(
    ours: dict[str, Any], param: str, client: httpx.AsyncClient, world: World
) -> None:
    refused = await post(client, composer=ours)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param
    assert world.engine.calls == []


async def test_an_unknown_expert_to_exclude_is_named(client: httpx.AsyncClient) -> None:
    """Misspelt, the opt-out would exclude nobody, and nobody would notice."""
    refused = await post(client, composer={"exclude": ["plain", "caler"]})
    message = refused.json()["error"]["message"]
    assert message == "there is no expert 'caler' to exclude; GET /v1/experts lists them"


# --- tool calls and other fields -------------------------------------------------------------


async def test_a_whole_answer_of_tool_calls(client: httpx.AsyncClient, world: World) -> None:
    engine(world).deltas, engine(world).reason = CALLS[1:], "tool_calls"
    [choice] = (await post(client, tools=TOOLS)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "I ought to call.",
        "tool_calls": MADE,
    }


async def test_an_answer_with_text_and_tool_calls(client: httpx.AsyncClient, world: World) -> None:
    engine(world).deltas = [{"content": "Let me see."}, {"tool_calls": [dict(MADE[0])]}]
    [choice] = (await post(client, tools=TOOLS)).json()["choices"]
    assert choice["message"]["content"] == "Let me see."
    assert choice["message"]["tool_calls"] == [MADE[0]]


async def test_the_trace_of_a_tool_call_reaches_the_engine(
    client: httpx.AsyncClient, world: World
) -> None:
    engine(world).deltas, engine(world).reason = CALLS[1:], "tool_calls"
    answer = (await post(client, tools=TOOLS)).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": "c0", "content": "42"}
    again = await post(client, messages=[*HELLO, answer, result], tools=TOOLS)
    assert again.status_code == 200, again.text
    sent = world.engine.calls[1].messages[1:]
    assert sent == ({"role": "assistant", "content": None, "tool_calls": MADE}, result)


def test_whole_tool_calls_of_one_chunk_stay_apart() -> None:
    [choice] = collect([Chunk(delta={"tool_calls": MADE}, finish_reason="tool_calls")], 1)
    assert ChatWire(logprobs=False).choice(0, choice)["message"]["tool_calls"] == MADE


def test_whole_tool_calls_are_numbered_when_they_are_streamed() -> None:
    piece = ChatWire(logprobs=False).piece(Chunk(delta={"tool_calls": MADE}))
    assert [call["index"] for call in piece["delta"]["tool_calls"]] == [0, 1]
    assert "content" not in piece["delta"]


def test_parts_that_repeat_what_is_known_do_not_double_it() -> None:
    part = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
    message: dict[str, Any] = {}
    add_delta(message, {"tool_calls": [part]})
    add_delta(message, {"tool_calls": [{**part, "function": {"name": "f", "arguments": "}"}}]})
    [call] = message["tool_calls"]
    assert (call["id"], call["type"]) == ("c", "function")
    assert call["function"] == {"name": "f", "arguments": "{}"}


@given(cuts=st.lists(st.integers(0, 30), max_size=8), text=st.text(min_size=1, max_size=30))
def test_arguments_are_whole_however_they_are_cut(cuts: list[int], text: str) -> None:
    message: dict[str, Any] = {}
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    for number, (start, end) in enumerate(pairwise(places)):
        name = {"name": "f"} if number == 0 else {}
        part = {"index": 3, "function": {**name, "arguments": text[start:end]}}
        add_delta(message, {"tool_calls": [part], "reasoning_content": text[start:end]})
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": text}
    assert message["reasoning_content"] == text


# --- events that come ready made -------------------------------------------------------------


async def stream(client: httpx.AsyncClient, **fields: Any) -> tuple[httpx.Response, list[Any]]:
    response = await post(client, stream=True, **fields)
    assert response.status_code == 200, response.text
    return response, events(response.text)


async def test_ready_events_are_passed_on_and_the_last_has_composer(
    client: httpx.AsyncClient, world: World
) -> None:
    response, (*chunks, last, done) = await stream(client)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == engine(world).deltas
    assert {chunk["created"] for chunk in (*chunks, last)} == {1}  # the server's own, not ours
    assert {chunk["id"] for chunk in (*chunks, last)} == {world.recorder.records[0].id}
    assert {chunk["model"] for chunk in (*chunks, last)} == {"auto"}
    assert all("composer" not in chunk for chunk in chunks)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["composer"]["expert"] == "caller"
    assert last["composer"]["run_ms"] > 0
    assert response.headers["x-composer-expert"] == "caller"
    assert world.recorder.records[0].usage == Usage(7, 2)


async def test_of_n_choices_the_one_that_ends_last_has_composer(
    client: httpx.AsyncClient,
) -> None:
    _, (*chunks, done) = await stream(client, n=3)
    assert done == "[DONE]"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 6 + ["stop"] * 3
    assert ["composer" in chunk for chunk in chunks] == [False] * 8 + [True]


async def test_usage_of_ready_events_comes_from_us(client: httpx.AsyncClient) -> None:
    _, (*chunks, usage, done) = await stream(client, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert usage["composer"] == chunks[-1]["composer"]


async def test_ready_events_of_a_completion(client: httpx.AsyncClient) -> None:
    body = {"prompt": "hello caller", "stream": True}
    response = await client.post("/v1/completions", json=body)
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two"
    assert chunks[-1]["composer"]["expert"] == "caller"


async def test_where_answers_are_kept_events_are_made_here(world: World) -> None:
    """A text that nobody reads on its way cannot be stored."""
    keeping = make_remote(Settings(api_key=None, log_content=True))
    async with InProcess(keeping) as client:
        _, (*chunks, _) = await stream(client)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "one two"
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"fp_caller-plain"}
    assert keeping.recorder.records[0].answer == "one two"


async def test_an_error_in_the_middle_of_ready_events_is_the_last_event(
    client: httpx.AsyncClient, world: World
) -> None:
    world.engine.fail_at = 1
    _, (*chunks, last) = await stream(client)
    assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["one"]
    assert last["error"]["type"] == "server_error"


async def test_ready_events_without_an_end_say_so(client: httpx.AsyncClient, world: World) -> None:
    engine(world).ends = False
    _, (*_, last) = await stream(client)
    assert last["error"]["code"] == "engine_error"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    data=st.dictionaries(st.text(max_size=5), JSON, min_size=1, max_size=4),
    more=JSON,
    end=st.sampled_from(["\n\n", "\r\n\r\n", " \n\n"]),
    indent=st.sampled_from([None, 0]),
)
def test_a_field_is_added_by_bytes_alone(
    data: dict[str, Any], more: Any, end: str, indent: int | None
) -> None:
    data.pop("composer", None)
    data["choices"] = []
    text = json.dumps(data, indent=indent).replace("\n", " ")
    added = with_field(f"data: {text}{end}".encode(), "composer", more)
    assert added.endswith(end.encode())
    found = orjson.loads(added.removeprefix(b"data: "))
    assert found == {**data, "composer": more}
    assert with_field(event(data), "composer", more) == event({**data, "composer": more})


@pytest.mark.parametrize("colon", [":", " : "])
def test_a_field_of_the_same_name_is_replaced(colon: str) -> None:
    """As where the server is another service like this one."""
    theirs = f'data: {{"a": 1, "composer"{colon}{{"expert": "x"}}}}\n\n'.encode()
    assert with_field(theirs, "composer", {"b": 2}) == event({"a": 1, "composer": {"b": 2}})


def test_a_text_that_names_the_field_is_no_field() -> None:
    theirs = b'data: {"text":"say \\"composer\\": now"}\n\n'
    assert with_field(theirs, "composer", 1) == theirs.replace(b"}", b',"composer":1}')


# --- the unmodified client -------------------------------------------------------------------


@pytest.fixture
def ai(world: World) -> Iterator[openai.OpenAI]:
    with (
        Serving(create_app(world.service)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as ai,
    ):
        yield ai


@pytest.mark.parametrize("include_usage", [False, True])
def test_the_openai_client_reads_ready_events(
    include_usage: bool, ai: openai.OpenAI, world: World
) -> None:
    engine(world).deltas, engine(world).reason = CALLS, "tool_calls"
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    with ai.chat.completions.stream(
        model="auto",
        messages=HELLO,  # type: ignore[arg-type]
        tools=TOOLS,  # type: ignore[arg-type]
        **options,  # type: ignore[arg-type]
    ) as answer:
        for _ in answer:
            pass
        final = answer.get_final_completion()
    [choice] = final.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert [call.id for call in choice.message.tool_calls] == ["c0", "c1"]
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"a": 1}', "{}"]
    assert (final.usage is not None) == include_usage


def test_the_openai_client_gets_the_same_tool_calls_whole(ai: openai.OpenAI, world: World) -> None:
    engine(world).deltas, engine(world).reason = CALLS[1:], "tool_calls"
    answer = ai.chat.completions.create(
        model="auto",
        messages=HELLO,  # type: ignore[arg-type]
        tools=TOOLS,  # type: ignore[arg-type]
        extra_body={"top_k": 3},
        presence_penalty=0.5,
    )
    message = answer.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    assert [call.to_dict() for call in message.tool_calls] == MADE
    result = {"role": "tool", "tool_call_id": "c0", "content": "42"}
    engine(world).deltas, engine(world).reason = [{"content": "It is 42."}], "stop"
    again = ai.chat.completions.create(
        model="auto",
        messages=[*HELLO, message, result],  # type: ignore[list-item]
        tools=TOOLS,  # type: ignore[arg-type]
    )
    assert again.choices[0].message.content == "It is 42."
