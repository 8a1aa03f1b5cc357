"""Models, runtime experts, feedback, embeddings, health: everything that is not an answer."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from composer.engines.base import Health
from composer.errors import StoreError
from tests.api.fakes import SECRET, World

CHAT = "/v1/chat/completions"


async def ask(client: httpx.AsyncClient, text: str = "hello", **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return await client.post(CHAT, json=body)


# --- models --------------------------------------------------------------------------------


async def test_models_are_policies_experts_and_the_embedder(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    kinds = [(model["id"], model["composer"]["kind"]) for model in listed["data"]]
    assert kinds == [
        ("auto", "policy"),
        ("panel", "policy"),
        ("shout", "expert"),
        ("team/sort", "expert"),
        ("fake-embedder", "embedder"),
    ]
    for model in listed["data"]:
        assert model["object"] == "model"
        assert isinstance(model["created"], int)
        assert model["owned_by"]
    shout = listed["data"][2]["composer"]
    assert shout["description"] == "Shouts."
    assert shout["skills"] == ["shouting"]
    assert shout["context_window"] == 100
    assert shout["server"] == "box"
    revisions = {m["composer"]["revision"] for m in listed["data"][2:4]}
    assert {len(revision) for revision in revisions} == {16}
    assert SECRET not in str(listed)


@pytest.mark.parametrize("id_", ["auto", "team/sort", "fake-embedder"])
async def test_one_model(client: httpx.AsyncClient, id_: str) -> None:
    assert (await client.get(f"/v1/models/{id_}")).json()["id"] == id_


async def test_a_model_that_is_not_there(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models/nobody")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


# --- runtime experts -------------------------------------------------------------------------

NEW = {"id": "added", "server": "box", "description": "New."}


async def test_an_expert_comes_answers_and_goes(client: httpx.AsyncClient, world: World) -> None:
    response = await client.post("/v1/experts", json=NEW)
    assert response.status_code == 201
    assert response.headers["location"] == "/v1/experts/added"
    assert response.json()["source"] == "runtime"
    assert world.store.rows == {"added": NEW}

    answer = (await ask(client, "added please")).json()
    assert answer["composer"]["expert"] == "added"
    assert answer["composer"]["catalog_version"] == 2
    assert (await client.get("/v1/experts/added")).json() == response.json()

    deleted = await client.delete("/v1/experts/added")
    assert deleted.json() == {"id": "added", "object": "expert", "deleted": True}
    assert world.store.rows == {}
    assert (await client.get("/v1/experts/added")).status_code == 404
    assert (await ask(client, model="added")).status_code == 404


async def test_experts_are_listed_without_paths(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/experts")).json()
    assert [(e["id"], e["source"]) for e in listed["data"]] == [
        ("shout", "file"),
        ("team/sort", "file"),
    ]
    assert listed["data"][1]["adapter"] == {
        "digest": "sha256:1",
        "rank": 8,
        "alpha": 16.0,
        "target_modules": ["q_proj"],
        "gate": None,
    }
    assert SECRET not in str(listed)
    one = await client.get("/v1/experts/team/sort")
    assert one.json() == listed["data"][1]


async def test_an_id_that_is_taken_is_a_conflict(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/experts", json={**NEW, "id": "shout"})
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "conflict"


async def test_an_expert_of_the_file_is_not_deleted_here(client: httpx.AsyncClient) -> None:
    assert (await client.delete("/v1/experts/shout")).status_code == 409
    assert (await client.delete("/v1/experts/nobody")).status_code == 404


async def test_a_wrong_expert_is_a_400_with_all_problems(
    client: httpx.AsyncClient, world: World
) -> None:
    response = await client.post("/v1/experts", json={**NEW, "skils": ["x"], "sever": "box"})
    assert response.status_code == 400
    assert [p["path"] for p in response.json()["error"]["problems"]] == ["sever", "skils"]
    assert SECRET not in response.text
    assert world.store.rows == {}
    assert (await client.get("/v1/experts/added")).status_code == 404


@pytest.mark.parametrize("id_", [None, 3, "", ["x"], {}])
async def test_an_expert_needs_an_id(client: httpx.AsyncClient, id_: Any) -> None:
    response = await client.post("/v1/experts", json={**NEW, "id": id_})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "id"


async def test_an_expert_that_cannot_be_kept_is_not_served(
    client: httpx.AsyncClient, world: World
) -> None:
    world.store.fail = StoreError(SECRET)
    response = await client.post("/v1/experts", json=NEW)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert SECRET not in response.text
    assert (await client.get("/v1/experts/added")).status_code == 404


# --- feedback --------------------------------------------------------------------------------


async def test_feedback_is_kept_for_the_answers_id(client: httpx.AsyncClient, world: World) -> None:
    id_ = (await ask(client)).json()["id"]
    body = {"response_id": id_, "score": 1, "id": "f1", "comment": "good", "labels": {"a": [1]}}
    response = await client.post("/v1/feedback", json=body)
    assert response.status_code == 201
    assert response.json() == {
        "id": "f1",
        "object": "feedback",
        "response_id": id_,
        "score": 1.0,
        "stored": "database",
    }
    kept = world.recorder.feedback["f1"]
    assert (kept.score, kept.comment, kept.labels) == (1.0, "good", {"a": [1]})


async def test_feedback_without_an_id_is_given_one(client: httpx.AsyncClient) -> None:
    id_ = (await ask(client)).json()["id"]
    response = await client.post("/v1/feedback", json={"response_id": id_, "score": 0.5})
    assert response.json()["id"].startswith("fb-")


async def test_feedback_for_an_unknown_answer_is_a_404(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/feedback", json={"response_id": "nobody", "score": 0.5})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "response_not_found"


async def test_feedback_that_contradicts_itself_is_a_409(client: httpx.AsyncClient) -> None:
    id_ = (await ask(client)).json()["id"]
    body = {"response_id": id_, "score": 0.5, "id": "f1"}
    assert (await client.post("/v1/feedback", json=body)).status_code == 201
    assert (await client.post("/v1/feedback", json=body)).status_code == 201
    response = await client.post("/v1/feedback", json={**body, "score": 0.4})
    assert response.status_code == 409


async def test_feedback_that_is_not_durable_is_not_acknowledged(
    client: httpx.AsyncClient, world: World
) -> None:
    id_ = (await ask(client)).json()["id"]
    world.recorder.fail = StoreError(SECRET)
    response = await client.post("/v1/feedback", json={"response_id": id_, "score": 1})
    assert response.status_code == 503
    assert SECRET not in response.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"score": 1.1}, "score"),
        ({"score": -0.1}, "score"),
        ({"score": True}, "score"),
        ({"score": "1"}, "score"),
        ({"score": None}, "score"),
        ({"response_id": ""}, "response_id"),
        ({"response_id": 3}, "response_id"),
        ({"id": ""}, "id"),
        ({"labels": []}, "labels"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_wrong_feedback_is_a_400(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    body = {"response_id": "x", "score": 1, **fields}
    response = await client.post("/v1/feedback", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


# --- embeddings ------------------------------------------------------------------------------


async def embed(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"model": "fake-embedder", "input": "a b", **fields}
    return await client.post("/v1/embeddings", json=body)


async def test_an_embedding_in_openais_shape(client: httpx.AsyncClient, world: World) -> None:
    answer = (await embed(client, input=["a b", "c"])).json()
    assert answer["object"] == "list"
    assert answer["model"] == "fake-embedder"
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [row["index"] for row in answer["data"]] == [0, 1]
    expected = world.service.embedder.encode(["a b", "c"])
    got = np.array([row["embedding"] for row in answer["data"]])
    np.testing.assert_allclose(got, expected, atol=1e-6)


async def test_base64_is_little_endian_float32(client: httpx.AsyncClient) -> None:
    plain = (await embed(client)).json()["data"][0]["embedding"]
    coded = (await embed(client, encoding_format="base64")).json()["data"][0]["embedding"]
    decoded = np.frombuffer(base64.b64decode(coded), "<f4")
    np.testing.assert_allclose(decoded, plain, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "auto"}, 404, "model"),
        ({"model": "text-embedding-3-small"}, 404, "model"),
        ({"dimensions": 2}, 400, "dimensions"),
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input.1"),
        ({"input": [1, 2]}, 400, "input.0"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": ["a"] * 2049}, 400, "input"),
    ],
)
async def test_embeddings_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str
) -> None:
    response = await embed(client, **fields)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


async def test_a_text_beyond_the_models_window_is_refused_not_cut(
    client: httpx.AsyncClient,
) -> None:
    response = await embed(client, input=["a", "a " * 51])
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input.1")


async def test_many_texts_keep_their_order(client: httpx.AsyncClient, world: World) -> None:
    texts = ["x" * i for i in range(1, 40)]
    rows = (await embed(client, input=texts)).json()["data"]
    expected = world.service.embedder.encode(texts)
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)


async def test_the_own_number_of_dimensions_may_be_named(client: httpx.AsyncClient) -> None:
    assert (await embed(client, dimensions=3)).status_code == 200


# --- health ----------------------------------------------------------------------------------


async def test_health_and_ready_while_serving(client: httpx.AsyncClient) -> None:
    health = await client.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    assert health.json()["servers"] == {"box": {"state": "ready"}}
    assert health.json()["scheduler"]["box"]["in_flight"] == 64
    ready = await client.get("/ready")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "catalog_version": 1})


async def test_health_is_200_with_details_when_degraded(
    client: httpx.AsyncClient, world: World
) -> None:
    world.recorder.up = False
    health = await client.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "degraded"
    assert (await client.get("/ready")).status_code == 200


@pytest.mark.parametrize(
    ("health", "status", "shown"),
    [
        (Health("off"), "ok", {"state": "off"}),
        (Health("starting"), "ok", {"state": "starting"}),
        (
            Health("failed", f"it ended; see {SECRET}/a.log"),
            "degraded",
            {"state": "failed", "reason": "it ended; see …"},
        ),
    ],
)
async def test_health_says_what_each_server_does_and_why(
    client: httpx.AsyncClient,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    health: Health,
    status: str,
    shown: dict[str, str],
) -> None:
    async def told() -> Health:
        return health

    monkeypatch.setattr(world.service.generations.current.engines["box"], "health", told)
    said = (await client.get("/health")).json()
    assert (said["status"], said["servers"]) == (status, {"box": shown})


async def test_before_the_start_nothing_is_ready(client: httpx.AsyncClient, world: World) -> None:
    await world.service.close()
    assert (await client.get("/health")).json()["status"] == "starting"
    ready = await client.get("/ready")
    assert ready.status_code == 503
    assert ready.json()["ready"] is False
    for path in ("/v1/models", "/v1/experts"):
        response = await client.get(path)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
