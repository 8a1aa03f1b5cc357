"""What every request passes: ids, the key, the size limit, wrong routes and wrong bytes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from api.app import create_app
from api.edge import MAX_BODY
from composer.errors import SettingsError
from composer.settings import Settings
from tests.api.conftest import InProcess
from tests.api.fakes import SECRET, World, make_world

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
KEY = "a-long-key-with-ümlaut"


def error(response: httpx.Response) -> dict[str, object]:
    body = response.json()
    assert set(body) == {"error"}
    assert {"message", "type", "param", "code"} <= set(body["error"])
    found: dict[str, object] = body["error"]
    return found


# --- ids -----------------------------------------------------------------------------------


async def test_every_response_has_its_own_request_id(client: httpx.AsyncClient) -> None:
    answers = [
        await client.get("/health"),
        await client.get("/nowhere"),
        await client.post(CHAT, json=HELLO),
        await client.post(CHAT, json=HELLO),
        await client.post(CHAT, json={}),
    ]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids)
    assert all(len(id_) == 32 for id_ in ids)


async def test_a_callers_request_id_never_becomes_the_records_id(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post(CHAT, json=HELLO, headers={"x-request-id": "mine"})
    assert response.headers["x-request-id"] != "mine"


# --- the key -------------------------------------------------------------------------------


@pytest.fixture
async def locked() -> AsyncIterator[httpx.AsyncClient]:
    async with InProcess(make_world(settings=Settings(api_key=KEY))) as client:
        yield client


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Basic {KEY}",
        KEY,
    ],
)
async def test_a_wrong_key_is_a_401(locked: httpx.AsyncClient, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode()}
    for path in (CHAT, "/v1/models", "/openapi.json", "/nowhere", "//v1/models"):
        response = await locked.get(path, headers=headers)  # type: ignore[arg-type]
        assert response.status_code == 401
        assert error(response)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert KEY not in response.text


async def test_the_right_key_opens(locked: httpx.AsyncClient) -> None:
    headers = {"authorization": f"Bearer {KEY}".encode()}
    response = await locked.post(CHAT, json=HELLO, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 200


@pytest.mark.parametrize("key", ["", "  "])
def test_a_key_that_locks_nothing_is_refused_at_the_start(key: str) -> None:
    with pytest.raises(SettingsError, match="COMPOSER_API_KEY"):
        create_app(make_world(settings=Settings(api_key=key)).service)


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_health_needs_no_key(locked: httpx.AsyncClient, path: str) -> None:
    assert (await locked.get(path)).status_code == 200


# --- size ----------------------------------------------------------------------------------


async def test_a_declared_body_too_large_is_refused_unread(
    client: httpx.AsyncClient, world: World
) -> None:
    response = await client.post(CHAT, content=b"x" * (MAX_BODY + 1))
    assert response.status_code == 413
    assert error(response)["code"] == "content_too_large"


async def test_a_body_too_large_in_chunks_is_refused_when_it_is(
    client: httpx.AsyncClient,
) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * (MAX_BODY // 10)

    headers = {"content-type": "application/json"}
    response = await client.post(CHAT, content=chunks(), headers=headers)
    assert response.status_code == 413
    assert error(response)["code"] == "content_too_large"
    assert sent == 11


async def test_a_body_of_just_the_limit_is_read(client: httpx.AsyncClient) -> None:
    empty = b'{"messages": [{"role": "user", "content": ""}]}'
    response = await client.post(
        CHAT,
        content=empty.ljust(MAX_BODY),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 200


# --- routes and bytes ------------------------------------------------------------------------


async def test_unknown_routes_and_methods_speak_openai(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/nowhere")
    assert response.status_code == 404
    assert error(response)["code"] == "not_found"
    response = await client.get(CHAT)
    assert response.status_code == 405
    assert error(response)["code"] == "method_not_allowed"
    assert "POST" in response.headers["allow"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "missing"),
        (b"{", "not JSON"),
        (b"{'model': 1}", "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
        (b'{"temperature": NaN}', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "JSON object"),
        (b"null", ""),
        (b'"text"', "JSON object"),
    ],
)
async def test_a_body_that_is_no_json_object(
    client: httpx.AsyncClient, content: bytes, says: str
) -> None:
    headers = {"content-type": "application/json"}
    response = await client.post(CHAT, content=content, headers=headers)
    assert response.status_code == 400
    assert says in str(error(response)["message"])


async def test_json_under_another_type_is_told_the_remedy(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = await client.post(CHAT, content=b'{"model": "auto"}', headers=headers)
    assert response.status_code == 400
    assert "content-type: application/json" in str(error(response)["message"])


async def test_a_bug_is_logged_with_its_trace_and_its_request(
    client: httpx.AsyncClient,
    world: World,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken() -> None:
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr(world.service, "health", broken)
    with caplog.at_level(logging.ERROR):
        response = await client.get("/health")
    assert response.status_code == 500
    assert SECRET not in response.text
    assert error(response)["code"] == "internal_error"
    assert "ZeroDivisionError" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


async def test_no_page_needs_somebody_elses_host(client: httpx.AsyncClient) -> None:
    assert (await client.get("/docs")).status_code == 404
    assert (await client.get("/redoc")).status_code == 404
    schema = (await client.get("/openapi.json")).json()
    assert {CHAT, "/v1/completions", "/v1/embeddings", "/v1/models"} <= set(schema["paths"])
    # FastAPI's own validation status is never sent, so it must not be documented.
    assert all(
        "422" not in op["responses"] for path in schema["paths"].values() for op in path.values()
    )
