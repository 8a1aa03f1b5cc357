"""A gated expert of tiny adapters among plain ones: chosen by the router, asked through the API,
added and taken away by a change of the file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
import yaml

from composer.adapters.factors import read_lora
from composer.adapters.gates.files import read_gate, write_gate
from composer.adapters.gates.hooks import Installed
from composer.adapters.gates.untrained import arrow
from examples.tiny import experts
from examples.tiny.tasks import SKILLS, sample_composites
from tests.test_reload import until
from tests.tiny import ASKED, TINY, chat, registry, serving

PAIR = ("uppercase", "reverse")
QUERY = "uppercase fox ; reverse naai"


def with_gate(folder: Path) -> str:
    """The registry of the plain experts and, if its folder is there, the gated one's."""
    data = yaml.safe_load(registry(*PAIR, "sort-digits"))
    if (folder / "both").is_dir():
        data["experts"]["both"] = {
            "server": "tiny",
            "gate": str(folder / "both"),
            "description": "Writes one word in capital letters and another backwards, at once.",
            "examples": [item.prompt for item in sample_composites("train", 40, 0, pairs=(PAIR,))],
            "sampling": {"temperature": 0.0, "max_tokens": 24},
        }
    return yaml.safe_dump(data)


def write_both(folder: Path) -> Path:
    members = {skill: read_lora(TINY / "experts" / "large" / skill) for skill in PAIR}
    (folder / "both").mkdir()
    write_gate(folder / "both", arrow(members, top_k=2))
    return folder / "both"


@pytest_asyncio.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    write_both(tmp_path)
    text = with_gate(tmp_path)
    async with serving(tmp_path, text, adapter_roots=(TINY, tmp_path)) as (client, _):
        yield client


def ask(text: str, model: str = "auto", **more: Any) -> dict[str, Any]:
    return {**chat(text, model), **more}


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of a stream, and the `composer` field of its end."""
    response = await client.post("/v1/chat/completions", json={**body, "stream": True})
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    parts = [json.loads(event) for event in events]
    text = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts)
    return text, parts[-1]["composer"]


def expected(folder: Path, prompt: str) -> str:
    """Greedy, by hooks on the base model, the whole text read anew for each token."""
    model, tokenizer = experts.load_base("large")
    ids = tokenizer(f"{prompt}<|answer|>", return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.inference_mode(), Installed(model, read_gate(folder).layers):
        while ids.shape[1] < start + 24:
            token = model(ids).logits[0, -1].argmax()
            if int(token) == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token[None, None]], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


async def test_the_router_sends_it_what_is_its(client: httpx.AsyncClient, tmp_path: Path) -> None:
    queries = [QUERY, *(ASKED[skill][0] for skill in ("uppercase", "sort-digits"))]
    answers = await asyncio.gather(
        *(client.post("/v1/chat/completions", json=ask(query)) for query in queries)
    )
    bodies = [answer.json() for answer in answers]
    assert [body["composer"]["expert"] for body in bodies] == ["both", "uppercase", "sort-digits"]
    texts = [body["choices"][0]["message"]["content"] for body in bodies]
    assert texts == [expected(tmp_path / "both", QUERY), "FOX", "1234"]
    assert all("gates" not in body["composer"] for body in bodies)

    text, told = await streamed(client, ask(QUERY))
    assert (text, told["expert"]) == (texts[0], "both")


async def test_gates_are_told_when_asked_for(client: httpx.AsyncClient) -> None:
    body = (
        await client.post("/v1/chat/completions", json=ask(QUERY, composer={"gates": True}))
    ).json()
    told = body["composer"]["gates"]["both"]
    assert told["members"] == list(PAIR)
    assert "".join(one["token"] for one in told["prompt"]) == f"<s>{QUERY}<|answer|>"
    (answer,) = told["answers"]
    assert "".join(one["token"] for one in answer) == body["choices"][0]["message"]["content"]
    shares = [one["weights"]["all"] for one in told["prompt"]]
    assert all(sum(share.values()) == pytest.approx(1, abs=1e-3) for share in shares)

    text, streamed_told = await streamed(
        client, ask(QUERY, "both", composer={"gates": "layers"}, max_tokens=4)
    )
    trace = streamed_told["gates"]["both"]
    assert "".join(one["token"] for one in trace["answers"][0]) == text
    assert {"layer 0, attention", "layer 0, mlp"} <= trace["prompt"][0]["weights"].keys()

    # Whom the router chooses may have none; a name that has none is a mistake.
    plain = ask(ASKED["sort-digits"][0], composer={"gates": True})
    body = (await client.post("/v1/chat/completions", json=plain)).json()
    assert body["composer"]["gates"] == {"sort-digits": None}
    named = await client.post(
        "/v1/chat/completions", json=ask("reverse fox", "reverse", composer={"gates": True})
    )
    assert named.status_code == 400
    assert named.json()["error"]["param"] == "composer.gates"
    assert "no expert of model 'reverse' has a gate" in named.json()["error"]["message"]


async def test_it_comes_and_goes_with_the_file(client: httpx.AsyncClient, tmp_path: Path) -> None:
    file = tmp_path / "experts.yaml"
    running = [
        asyncio.create_task(client.post("/v1/chat/completions", json=ask(QUERY, "both")))
        for _ in range(6)
    ]
    await asyncio.sleep(0)
    (tmp_path / "both").rename(tmp_path / "aside")
    file.write_text(with_gate(tmp_path))
    await until(client, lambda health: health["catalog"]["experts"] == 3)
    assert {(await one).status_code for one in running} <= {200, 404}
    gone = await client.post("/v1/chat/completions", json=ask(QUERY, "both"))
    assert gone.status_code == 404

    (tmp_path / "aside").rename(tmp_path / "both")
    file.write_text(with_gate(tmp_path))
    await until(client, lambda health: health["catalog"]["experts"] == 4)
    again = (await client.post("/v1/chat/completions", json=ask(QUERY))).json()
    assert again["composer"]["expert"] == "both"
    shown = (await client.get("/v1/experts/both")).json()["adapter"]
    assert [one["name"] for one in shown["gate"]["members"]] == list(PAIR)
    assert set(PAIR) <= SKILLS.keys()
