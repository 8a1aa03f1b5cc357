"""How a conversation is known at the edge, and that its expert is kept from turn to turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from api.schemas import Caller, ChatBody
from composer.types import Policy
from tests.api import fakes
from tests.api.fakes import World

FIRST = {"role": "user", "content": "please team/sort"}
EVEN = {"role": "user", "content": "shout or team/sort"}
"""Both experts are as good for it, so that shout, which stands first, would be taken."""


@pytest.fixture(autouse=True)
def policies_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fakes.policies

    def staying(experts: Sequence[str], allowed: frozenset[str] | None) -> dict[str, Policy]:
        found = made(experts, allowed).items()
        return {id_: dataclasses.replace(policy, stay=0.05) for id_, policy in found}

    monkeypatch.setattr(fakes, "policies", staying)


async def ask(
    client: httpx.AsyncClient, *messages: Any, headers: dict[str, str] | None = None, **fields: Any
) -> dict[str, Any]:
    """The answer's `composer` field."""
    body = {"messages": messages, **fields}
    response = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["composer"]
    return found


ANSWER = {"role": "assistant", "content": "done"}


async def test_a_conversation_keeps_its_expert_without_being_named(
    client: httpx.AsyncClient,
) -> None:
    assert (await ask(client, FIRST))["expert"] == "team/sort"
    kept = await ask(client, FIRST, ANSWER, EVEN)
    assert kept["expert"] == "team/sort"
    assert kept["reasons"]["rule"] == "session_stay"
    assert kept["reasons"]["instead_of"] == ["shout"]
    assert (await ask(client, EVEN))["expert"] == "shout"


@pytest.mark.parametrize(
    "named",
    [
        {"composer": {"session": "s"}},
        {"headers": {"x-composer-session": "s"}},
    ],
)
async def test_a_conversation_by_its_name(client: httpx.AsyncClient, named: Any) -> None:
    await ask(client, FIRST, **named)
    assert (await ask(client, EVEN, **named))["expert"] == "team/sort"
    assert (await ask(client, EVEN))["expert"] == "shout"


async def test_a_cache_key_holds_no_expert(client: httpx.AsyncClient) -> None:
    """Clients send one key for all that they ask, so it is no conversation."""
    await ask(client, FIRST, prompt_cache_key="always")
    assert (await ask(client, EVEN, prompt_cache_key="always"))["expert"] == "shout"
    kept = await ask(client, FIRST, ANSWER, EVEN, prompt_cache_key="another")
    assert kept["expert"] == "team/sort"  # by how it began, whatever the key


async def test_a_streamed_turn_counts_too(client: httpx.AsyncClient) -> None:
    body = {"messages": [FIRST], "stream": True, "composer": {"session": "s"}}
    streamed = await client.post("/v1/chat/completions", json=body)
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert (await ask(client, EVEN, composer={"session": "s"}))["expert"] == "team/sort"


async def test_plain_completions_have_sessions_by_name(client: httpx.AsyncClient) -> None:
    ours = {"composer": {"session": "s"}}
    for prompt in ("please team/sort", "shout or team/sort"):
        response = await client.post("/v1/completions", json={"prompt": prompt, **ours})
        assert response.json()["composer"]["expert"] == "team/sort"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            {"headers": {"authorization": "Bearer ann"}},
            {"headers": {"authorization": "Bearer bob"}},
        ),
        ({"user": "ann"}, {"user": "bob"}),
        ({"safety_identifier": "ann"}, {"safety_identifier": "bob"}),
    ],
)
async def test_callers_have_sessions_of_their_own(
    client: httpx.AsyncClient, one: Any, other: Any
) -> None:
    await ask(client, FIRST, composer={"session": "s"}, **one)
    assert (await ask(client, EVEN, composer={"session": "s"}, **other))["expert"] == "shout"
    assert (await ask(client, EVEN, composer={"session": "s"}, **one))["expert"] == "team/sort"


async def test_opting_out_goes_before_the_session(client: httpx.AsyncClient, world: World) -> None:
    await ask(client, FIRST, composer={"session": "s"})
    left = await ask(client, EVEN, composer={"session": "s", "exclude": ["team/sort"]})
    assert left["expert"] == "shout"
    assert [call.expert for call in world.engine.calls] == ["team/sort", "shout"]


@pytest.mark.parametrize("session", ["", 5, ["s"], "s" * 513])
async def test_a_wrong_name_is_refused(client: httpx.AsyncClient, session: Any) -> None:
    body = {"messages": [FIRST], "composer": {"session": session}}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "composer.session"


def test_the_nearest_name_counts() -> None:
    body = {"messages": [FIRST], "prompt_cache_key": "key", "composer": {"session": "ours"}}
    caller = Caller("digest", "header")
    assert ChatBody.model_validate(body).request("r", caller).session == "ours"
    del body["composer"]
    assert ChatBody.model_validate(body).request("r", caller).session == "header"
    assert ChatBody.model_validate(body).request("r").session is None
