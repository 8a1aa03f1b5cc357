"""The unmodified `openai` client, sync and async, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from api.app import create_app
from composer.settings import Settings
from tests.api.conftest import Live, Serving
from tests.api.fakes import World, make_world, until


@pytest.fixture
def world() -> World:
    return make_world(settings=Settings(api_key="the-key"))


@pytest.fixture
def ai(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="the-key", max_retries=0) as ai:
        yield ai


HELLO: list[dict[str, str]] = [{"role": "user", "content": "hello shout"}]


def test_chat(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="auto", messages=HELLO)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "SHOUT: HELLO SHOUT"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5
    assert answer.composer["expert"] == "shout"  # type: ignore[attr-defined]


def test_headers_are_there_for_raw_responses(ai: openai.OpenAI) -> None:
    raw = ai.chat.completions.with_raw_response.create(model="auto", messages=HELLO)  # type: ignore[arg-type]
    assert raw.headers["x-composer-expert"] == "shout"
    assert raw.parse().id == f"chatcmpl-{raw.request_id}"


def test_a_stream_has_the_same_text(ai: openai.OpenAI) -> None:
    whole = ai.chat.completions.create(model="auto", messages=HELLO)  # type: ignore[arg-type]
    chunks = list(ai.chat.completions.create(model="auto", messages=HELLO, stream=True))  # type: ignore[call-overload]
    # `choices[0]` of every chunk, as most programs read it.
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].composer["expert"] == "shout"


def test_the_stream_helper_puts_the_answer_together(ai: openai.OpenAI) -> None:
    with ai.chat.completions.stream(
        model="auto",
        messages=HELLO,  # type: ignore[arg-type]
        stream_options={"include_usage": True},
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "SHOUT: HELLO SHOUT"
    assert final.usage is not None
    assert final.usage.completion_tokens == 3


def test_an_answers_message_can_be_sent_back(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="auto", messages=HELLO)  # type: ignore[arg-type]
    more = [*HELLO, answer.choices[0].message, {"role": "user", "content": "again shout"}]
    again = ai.chat.completions.create(model="auto", messages=more)  # type: ignore[arg-type]
    assert again.choices[0].message.content == "SHOUT: AGAIN SHOUT"


def test_n_stop_logprobs_and_the_composer_field(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(
        model="auto",
        messages=HELLO,  # type: ignore[arg-type]
        n=2,
        stop=[" SHOUT"],
        logprobs=True,
        top_logprobs=2,
        seed=1,
        temperature=0,
        max_tokens=50,
        extra_body={"composer": {"exclude": ["team/sort"]}},
    )
    assert [choice.message.content for choice in answer.choices] == ["SHOUT: HELLO"] * 2
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert bytes(b for entry in logprobs.content for b in entry.bytes or ()) == b"SHOUT: HELLO"
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2, 2]


def test_completions_whole_and_streamed(ai: openai.OpenAI) -> None:
    whole = ai.completions.create(model="auto", prompt="hello shout", logprobs=1, n=2)
    assert [choice.text for choice in whole.choices] == ["SHOUT: HELLO SHOUT"] * 2
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.text_offset == [0, 6, 12]
    chunks = list(ai.completions.create(model="auto", prompt="hello shout", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "SHOUT: HELLO SHOUT"


def test_embeddings(ai: openai.OpenAI) -> None:
    coded = ai.embeddings.create(model="fake-embedder", input=["a", "bb"])
    plain = ai.embeddings.create(model="fake-embedder", input=["a", "bb"], encoding_format="float")
    assert [len(row.embedding) for row in coded.data] == [3, 3]
    for one, other in zip(coded.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert coded.usage.total_tokens == 2


def test_models(ai: openai.OpenAI) -> None:
    ids = [model.id for model in ai.models.list()]
    assert ids == ["auto", "panel", "shout", "team/sort", "fake-embedder"]
    assert ai.models.retrieve("team/sort").owned_by == "box"


def test_an_unknown_model_is_a_not_found_error(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ai.chat.completions.create(model="gpt-4o", messages=HELLO)  # type: ignore[arg-type]
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        ai.embeddings.create(model="text-embedding-3-small", input="a")
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("gpt-4o")


def test_empty_messages_are_a_bad_request_error(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(model="auto", messages=[])
    assert caught.value.param == "messages"


def test_a_wrong_key_is_an_authentication_error(live: Live) -> None:
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0) as ai,
        pytest.raises(openai.AuthenticationError),
    ):
        ai.models.list()


def test_an_error_in_mid_stream_is_raised(ai: openai.OpenAI, live: Live) -> None:
    live.world.engine.fail_at = 1
    stream = ai.chat.completions.create(model="auto", messages=HELLO, stream=True)  # type: ignore[call-overload]
    with pytest.raises(openai.APIError, match="x-request-id"):
        list(stream)


async def test_overload_is_retried_by_the_client_after_retry_after() -> None:
    world = make_world(in_flight=1, queue=0)
    world.engine.held = True
    with Serving(create_app(world.service)) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as ai:
            first = asyncio.create_task(ai.chat.completions.create(model="auto", messages=HELLO))  # type: ignore[call-overload]
            await until(lambda: world.engine.running == 1)
            with pytest.raises(openai.InternalServerError) as caught:
                await ai.chat.completions.create(model="auto", messages=HELLO)  # type: ignore[arg-type]
            assert caught.value.status_code == 503
            assert int(caught.value.response.headers["retry-after"]) >= 1
            patient = asyncio.create_task(
                ai.with_options(max_retries=3).chat.completions.create(  # type: ignore[call-overload]
                    model="auto", messages=HELLO
                )
            )
            await until(lambda: len(world.recorder.records) >= 2)
            world.engine.held = False
            assert (await first).choices[0].message.content == "SHOUT: HELLO SHOUT"
            assert (await patient).choices[0].message.content == "SHOUT: HELLO SHOUT"


async def test_closing_a_stream_early_cancels(live: Live) -> None:
    live.world.engine.held, live.world.engine.free = True, 1
    async with openai.AsyncOpenAI(
        base_url=f"{live.url}/v1", api_key="the-key", max_retries=0
    ) as ai:
        stream = await ai.chat.completions.create(model="auto", messages=HELLO, stream=True)  # type: ignore[call-overload]
        async for _ in stream:
            break
        await stream.close()
        await until(lambda: live.world.recorder.records)
    assert live.world.recorder.records[0].status == "cancelled"
    assert live.world.service.generations.holds == 0
