"""The whole service over the tiny experts, through a real server and the unmodified client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from api.app import create_app
from composer.build import make_service
from composer.settings import Settings
from tests.api.conftest import Serving

ROOT = Path(__file__).parents[2]
FOX = [{"role": "user", "content": "please write fox in capital letters"}]


@pytest.fixture(autouse=True)
def no_files_to_watch() -> None:
    """Here the registry file is real, and so is the watch."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("service")
    settings = Settings(
        experts=ROOT / "experts.yaml",
        database_url=f"sqlite+aiosqlite:///{folder}/composer.db",
        journal=folder / "journal",
        cache_dir=ROOT / ".cache" / "composer",
        api_key=None,
    )
    with Serving(create_app(make_service(settings)), start_timeout_s=300) as url:
        yield url


@pytest.fixture(scope="module")
def ai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as ai:
        yield ai


def test_the_main_job(url: str) -> None:
    response = httpx.post(
        f"{url}/v1/chat/completions", json={"model": "auto", "messages": FOX}, timeout=60
    )
    answer = response.json()
    assert answer["choices"][0]["message"]["content"] == "FOX"
    assert "upper" in answer["composer"]["expert"]
    assert response.headers["x-composer-expert"] == answer["composer"]["expert"]
    assert answer["composer"]["scores"][answer["composer"]["expert"]] > 0.5
    assert answer["usage"]["prompt_tokens"] > 0
    assert answer["usage"]["completion_tokens"] > 0


def test_a_stream_has_the_same_text(ai: openai.OpenAI) -> None:
    whole = ai.chat.completions.create(model="auto", messages=FOX, temperature=0)  # type: ignore[call-overload]
    chunks = list(
        ai.chat.completions.create(model="auto", messages=FOX, temperature=0, stream=True)  # type: ignore[call-overload]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content == "FOX"
    assert chunks[-1].composer["expert"] == whole.composer["expert"]


def test_n_and_logprobs(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(
        model="auto",
        messages=FOX,  # type: ignore[arg-type]
        temperature=0,
        n=2,
        logprobs=True,
        top_logprobs=3,
    )
    assert [choice.message.content for choice in answer.choices] == ["FOX", "FOX"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    for entry in logprobs.content:
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token
        assert len(entry.top_logprobs) == 3


def test_embeddings_are_of_unit_length(ai: openai.OpenAI, url: str) -> None:
    name = ai.models.list().data[-1].id
    answer = ai.embeddings.create(model=name, input=["a cat", "a dog", "tax law"])
    rows = [row.embedding for row in answer.data]
    dot = [[sum(a * b for a, b in zip(x, y, strict=True)) for x in rows] for y in rows]
    assert [dot[i][i] for i in range(3)] == pytest.approx([1, 1, 1], abs=1e-4)
    assert dot[0][1] > dot[0][2]
    assert answer.usage.total_tokens >= 6


def test_models_list_names_auto_and_every_expert(ai: openai.OpenAI, url: str) -> None:
    ids = {model.id for model in ai.models.list()}
    experts = {e["id"] for e in httpx.get(f"{url}/v1/experts").json()["data"]}
    assert "auto" in ids
    assert experts
    assert experts < ids


def test_errors(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        ai.chat.completions.create(model="gpt-4o", messages=FOX)  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError):
        ai.chat.completions.create(model="auto", messages=[])
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(
            model="auto",
            messages=FOX,  # type: ignore[arg-type]
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    assert caught.value.param == "tools"


def test_feedback_is_durable_right_after_the_answer(ai: openai.OpenAI, url: str) -> None:
    answer = ai.chat.completions.create(model="auto", messages=FOX)  # type: ignore[call-overload]
    body = {"response_id": answer.id, "score": 1.0}
    response = httpx.post(f"{url}/v1/feedback", json=body, timeout=30)
    assert response.status_code == 201, response.text
    assert response.json()["stored"] == "database"
    response = httpx.post(f"{url}/v1/feedback", json={**body, "response_id": "nobody"}, timeout=30)
    assert response.status_code == 404


def test_an_adapter_is_added_answers_and_is_taken_away(ai: openai.OpenAI, url: str) -> None:
    folder = "./examples/tiny/experts/large/uppercase"
    spec = {"id": "again", "server": "tiny-large", "adapter": folder}
    added = httpx.post(f"{url}/v1/experts", json=spec, timeout=60)
    assert added.status_code == 201, added.text
    answer = ai.chat.completions.create(model="again", messages=FOX, temperature=0)  # type: ignore[call-overload]
    assert answer.choices[0].message.content == "FOX"
    assert httpx.delete(f"{url}/v1/experts/again", timeout=60).status_code == 200
    with pytest.raises(openai.NotFoundError):
        ai.chat.completions.create(model="again", messages=FOX)  # type: ignore[call-overload]


@pytest.mark.parametrize("adapter", ["../../etc", "/etc/passwd", "/nowhere", "./nowhere"])
def test_a_wrong_adapter_tells_no_paths(url: str, adapter: str) -> None:
    spec = {"id": "wrong", "server": "tiny-large", "adapter": adapter}
    response = httpx.post(f"{url}/v1/experts", json=spec, timeout=60)
    assert response.status_code == 400
    [problem] = response.json()["error"]["problems"]
    assert problem["path"] == "experts.wrong.adapter"
    assert str(ROOT) not in response.text
    assert "/etc" not in response.text
    assert httpx.get(f"{url}/v1/experts/wrong").status_code == 404


def test_leaving_early_leaves_nothing_running(ai: openai.OpenAI, url: str) -> None:
    stream = ai.chat.completions.create(model="auto", messages=FOX, stream=True)  # type: ignore[call-overload]
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 30
    while httpx.get(f"{url}/health").json()["requests"]["running"]:
        assert time.monotonic() < until
        time.sleep(0.05)
    health = httpx.get(f"{url}/health").json()
    assert health["status"] == "ok"
    assert all(load["running"] == 0 for load in health["scheduler"].values())
