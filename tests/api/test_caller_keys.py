"""Callers with keys of their own: who may come in, and whom their keys keep from answering."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from composer.settings import Settings
from composer.types import ApiKey, Policy
from tests.api import fakes
from tests.api.conftest import InProcess, Live
from tests.api.fakes import World, make_world
from tests.batch.helpers import content, line

CHAT = "/v1/chat/completions"
WAIT_S = 60
"""Only ends a test that has failed."""


def key(name: str, *exclude: str, admin: bool = False) -> ApiKey:
    digest = hashlib.sha256(f"{name}'s key".encode()).digest()
    return ApiKey(name, f"{name.upper()}_KEY", digest, frozenset(exclude), admin)


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}'s key"}


@pytest.fixture
def world() -> World:
    world = make_world()
    world.keys = (key("quiet", "shout"), key("open"), key("ops", admin=True))
    return world


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with InProcess(world) as client:
        yield client


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Fields of every policy of the world that a test sets."""
    wanted: dict[str, Any] = {}
    made = fakes.policies

    def changed(experts: Sequence[str], allowed: frozenset[str] | None) -> dict[str, Policy]:
        found = made(experts, allowed).items()
        return {id_: dataclasses.replace(policy, **wanted) for id_, policy in found}

    monkeypatch.setattr(fakes, "policies", changed)
    return wanted


async def ask(
    client: httpx.AsyncClient, text: str, name: str = "quiet", **fields: Any
) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return await client.post(CHAT, json=body, headers=bearer(name))


def asked(world: World) -> list[str]:
    return [call.expert for call in world.engine.calls]


# --- who may come in ----------------------------------------------------------------------


async def test_where_there_are_keys_one_is_needed(client: httpx.AsyncClient) -> None:
    for headers in ({}, bearer("nobody"), {"authorization": "Basic quiet's key"}):
        refused = await client.get("/v1/models", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert (await client.get("/v1/models", headers=bearer("quiet"))).status_code == 200
    assert (await client.get("/health")).status_code == 200


async def test_while_no_keys_are_known_a_request_is_told_to_come_back() -> None:
    world = make_world()
    async with InProcess(world) as client:
        await world.service.close()
        refused = await client.get("/v1/models", headers=bearer("quiet"))
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_unavailable"
        assert len(refused.headers["x-request-id"]) == 32


async def test_the_services_own_key_excludes_nobody() -> None:
    world = make_world(settings=Settings(api_key="whole"))
    world.keys = (key("quiet", "shout"), ApiKey("unset", "UNSET_KEY", None, frozenset()))
    async with InProcess(world) as client:
        body = {"messages": [{"role": "user", "content": "please shout"}]}
        whole = await client.post(CHAT, json=body, headers={"authorization": "Bearer whole"})
        assert whole.json()["composer"]["expert"] == "shout"
        # A key whose variable is not set is nobody's, the empty one's neither.
        for given in ("Bearer ", "Bearer None"):
            answer = await client.post(CHAT, json=body, headers={"authorization": given})
            assert answer.status_code == 401


# --- whom a key excludes ------------------------------------------------------------------


async def test_no_request_of_the_key_reaches_whom_it_excludes(
    client: httpx.AsyncClient, world: World
) -> None:
    kept = await ask(client, "please shout")
    assert kept.json()["composer"]["expert"] == "team/sort"
    assert "shout" not in kept.json()["composer"]["scores"]
    other = await ask(client, "please shout", "open")
    assert other.json()["composer"]["expert"] == "shout"
    assert asked(world) == ["team/sort", "shout"]


async def test_the_requests_own_exclusions_come_on_top(
    client: httpx.AsyncClient, world: World
) -> None:
    nobody = await ask(client, "please shout", composer={"exclude": ["team/sort"]})
    assert nobody.status_code == 400
    assert "by the request or by its key" in nobody.json()["error"]["message"]
    assert asked(world) == []


async def test_a_model_that_the_key_excludes_is_refused_by_name(
    client: httpx.AsyncClient, world: World
) -> None:
    refused = await ask(client, "hello", model="shout")
    assert refused.status_code == 404
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "there is no model 'shout' for the key 'quiet'" in refused.text
    assert (await ask(client, "hello", "open", model="shout")).status_code == 200
    assert asked(world) == ["shout"]


async def test_whom_a_key_excludes_is_not_listed_for_it(client: httpx.AsyncClient) -> None:
    async def listed(path: str, name: str) -> dict[str, Any]:
        answer = await client.get(path, headers=bearer(name))
        return {entry["id"]: entry for entry in answer.json()["data"]}

    for path in ("/v1/models", "/v1/experts"):
        assert {"shout", "team/sort"} <= (await listed(path, "open")).keys()
        assert "shout" not in await listed(path, "quiet")
        assert "team/sort" in await listed(path, "quiet")
        one = await client.get(f"{path}/shout", headers=bearer("quiet"))
        assert (one.status_code, one.json()["error"]["code"]) == (404, "model_not_found")
    policy = (await listed("/v1/models", "quiet"))["auto"]["composer"]
    assert policy["experts"] == ["team/sort"]


async def test_a_policy_and_a_default_that_the_key_leaves_nothing_of_are_not_listed(
    client: httpx.AsyncClient, world: World, policies: dict[str, Any]
) -> None:
    policies["default_expert"] = "shout"
    world.keys = (key("quiet", "shout"), key("mute", "shout", "team/sort"))
    await world.service.changes.add_expert({"id": "third", "server": "box", "description": "x"})
    models = (await client.get("/v1/models", headers=bearer("quiet"))).json()["data"]
    (auto,) = (model for model in models if model["id"] == "auto")
    assert auto["composer"]["default_expert"] is None
    world.keys = (key("mute", "shout", "team/sort", "third", "fourth"),)
    await world.service.changes.add_expert({"id": "fourth", "server": "box", "description": "x"})
    models = (await client.get("/v1/models", headers=bearer("mute"))).json()["data"]
    assert [model["id"] for model in models] == ["fake-embedder"]


# --- what a key may do beside asking ------------------------------------------------------


ADMIN_ONLY = [
    ("POST", "/v1/experts"),
    ("DELETE", "/v1/experts/shout"),
    ("GET", "/v1/policies/auto/promotion"),
    ("POST", "/v1/policies/auto/promotion"),
    ("GET", "/v1/scheduler"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(("method", "path"), ADMIN_ONLY)
async def test_only_an_admins_key_changes_or_watches_the_service(
    client: httpx.AsyncClient, world: World, method: str, path: str
) -> None:
    body = {"id": "third", "server": "box", "description": "x"} if path == "/v1/experts" else None
    refused = await client.request(method, path, json=body, headers=bearer("open"))
    assert refused.status_code == 403
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "insufficient_permissions")
    assert "the key 'open' may ask experts and not do this" in error["message"]
    assert "third" not in world.service.generations.current.catalog.experts
    allowed = await client.request(method, path, json=body, headers=bearer("ops"))
    assert allowed.status_code != 403


async def test_without_a_name_a_key_is_an_admins() -> None:
    world = make_world(settings=Settings(api_key="whole"))
    world.keys = (key("open"),)
    async with InProcess(world) as client:
        for name, status in (("whole", 200), ("open's key", 403)):
            headers = {"authorization": f"Bearer {name}"}
            answer = await client.get("/v1/scheduler", headers=headers)
            assert answer.status_code == status


async def test_votes_are_held_without_whom_the_key_excludes(
    client: httpx.AsyncClient, world: World
) -> None:
    answer = await ask(client, "shout and team/sort", model="panel")
    assert answer.status_code == 200
    assert set(asked(world)) == {"team/sort"}


@pytest.mark.parametrize(
    "fields",
    [
        {"default_expert": "shout", "threshold": 1.0},
        {"null_expert": "shout", "null_margin": 1.0},
    ],
)
async def test_an_excluded_default_or_null_expert_does_not_step_in(
    client: httpx.AsyncClient, world: World, policies: dict[str, Any], fields: dict[str, Any]
) -> None:
    policies |= fields
    await world.service.changes.reload()
    for name, expected in (("quiet", "team/sort"), ("open", "shout")):
        answer = await ask(client, "whatever", name)
        assert answer.json()["composer"]["expert"] == expected


async def test_a_session_does_not_keep_an_expert_that_its_key_excludes_by_now(
    client: httpx.AsyncClient, world: World, policies: dict[str, Any]
) -> None:
    policies["stay"] = 0.9
    await world.service.changes.reload()
    named = {"session": "s"}
    first = await ask(client, "please shout", "open", composer=named)
    assert first.json()["composer"]["expert"] == "shout"
    world.keys = (key("open", "shout"),)
    await world.service.changes.add_expert({"id": "third", "server": "box", "description": "x"})
    second = await ask(client, "please shout", "open", composer=named)
    assert second.json()["composer"]["expert"] != "shout"


def test_a_batch_is_answered_as_its_callers_requests_are(live: Live) -> None:
    lines = [line("routed", "please shout"), line("named", "hello", body={"model": "shout"})]
    sent = b"".join(json.dumps(one).encode() + b"\n" for one in lines)
    with httpx.Client(base_url=live.url, headers=bearer("quiet")) as client:
        files = {"file": ("in.jsonl", sent)}
        upload = client.post("/v1/files", files=files, data={"purpose": "batch"}).json()
        made = client.post(
            "/v1/batches",
            json={"input_file_id": upload["id"], "endpoint": CHAT, "completion_window": "24h"},
        ).json()
        assert "key" not in made
        end = time.monotonic() + WAIT_S
        while (batch := client.get(f"/v1/batches/{made['id']}").json())["status"] != "completed":
            assert time.monotonic() < end, batch
            time.sleep(0.01)
        assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        output = client.get(f"/v1/files/{batch['output_file_id']}/content").json()
    assert content(output) == "TEAM/SORT: PLEASE SHOUT"
    assert asked(live.world) == ["team/sort"]
