"""A composed adapter among plain experts, chosen by the router, through the API on both engines."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from composer.adapters.factors import read_lora
from composer.adapters.merging.base import Weights
from composer.adapters.merging.twin import Twin, TwinSettings
from composer.types import Mix
from tests.tiny import ASKED, TINY, chat, registry, serving
from tests.vllm import ENVIRONMENT, python, requires_vllm

PLURAL = yaml.safe_load(registry("plural"))["experts"]["plural"]

SHOUT = "uppercase winter"
"""In the words that the adapter itself was trained on: a composition has no prompt template where
its members' differ."""


def with_composition(**server: Any) -> str:
    """The tiny experts and one composed of two, for questions of its own."""
    file = yaml.safe_load(registry("uppercase", "reverse", "plural"))
    file["servers"]["tiny"] |= server
    file["experts"]["shout"] = {
        "server": "tiny",
        "composition": {"members": {"uppercase": 0.7, "reverse": 0.3}},
        "description": "Reads commands such as `uppercase winter`.",
        "examples": ["uppercase winter", "uppercase summer", "uppercase spring"],
        "sampling": {"temperature": 0, "max_tokens": 24},
    }
    file["policies"]["mixed"] = {
        "router": {"name": "neighbours"},
        "strategy": {"name": "compose", "steps": 4},
        "experts": ["uppercase", "reverse", "plural"],
        "k": 2,
    }
    return yaml.safe_dump(file)


async def asked(client: httpx.AsyncClient, text: str, model: str = "auto") -> tuple[str, str]:
    """Who answered, and what."""
    answer = (await client.post("/v1/chat/completions", json=chat(text, model))).json()
    return answer["composer"]["expert"], answer["choices"][0]["message"]["content"]


async def check(client: httpx.AsyncClient) -> None:
    for skill in ("uppercase", "reverse", "plural"):
        question, right = ASKED[skill]
        assert await asked(client, question) == (skill, right)
    assert await asked(client, SHOUT) == ("shout", "WINTER")
    body = chat(SHOUT) | {"composer": {"exclude": ["reverse"]}}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert "shout" not in answer["composer"]["scores"]  # with a member it is excluded itself
    # By itself it is neither of its members.
    assert await asked(client, "reverse winter", "reverse") == ("reverse", "retniw")
    assert (await asked(client, "reverse winter", "shout"))[1] != "retniw"


async def mix(client: httpx.AsyncClient, text: str, **more: Any) -> dict[str, Any]:
    """The `composer` field, with the answer."""
    body = chat(text, "mixed") | ({"composer": more} if more else {})
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    return answer["composer"] | {"said": answer["choices"][0]["message"]["content"]}


QUESTION = "write fox in capital letters and backwards"
"""Of two skills, so that no expert has all of the weight."""


async def check_mixes(client: httpx.AsyncClient, folder: Path) -> str:
    """An adapter for one query: built, reused, left out where a member is excluded."""
    first = await mix(client, QUESTION)
    told = first["details"]["composition"]
    assert (told["built"], "failed" in told) == (True, False), told
    assert set(told["members"]) == {"uppercase", "reverse"}
    assert sum(told["members"].values()) == 1
    assert first["expert"] == "+".join(f"{w:g}*{e}" for e, w in told["members"].items())
    again = await mix(client, f"please {QUESTION}")
    assert again["details"]["composition"]["built"] is False
    assert again["expert"] == first["expert"]
    assert first["said"]
    without = await mix(client, QUESTION, exclude=["reverse"])
    assert "reverse" not in without["details"]["composition"]["members"]
    alone = await mix(client, ASKED["plural"][0], exclude=["reverse", "uppercase"])
    assert (alone["expert"], alone["said"]) == ("plural", ASKED["plural"][1])
    made = [f for f in (folder / "compositions" / "queries").iterdir() if f.is_dir()]
    assert 1 <= len(made) <= 2
    return str(first["said"])


def compositions(folder: Path) -> list[Path]:
    """Those of the registry."""
    return [one for one in (folder / "compositions").iterdir() if one.name != "queries"]


async def test_the_router_chooses_a_composed_expert_on_the_embedded_engine(tmp_path: Path) -> None:
    text = with_composition()
    async with serving(tmp_path, text, cache_dir=tmp_path) as (client, _):
        await check(client)
        await check_mixes(client, tmp_path)
        metrics = (await client.get("/metrics")).text
        assert "composer_compositions_reused_total 1.0" in metrics
    assert [(folder / "composition.json").is_file() for folder in compositions(tmp_path)] == [True]


async def test_twin_merging_shares_what_all_experts_of_the_policy_have(tmp_path: Path) -> None:
    """What two of them weigh is their own parts alone; the third is in the shared part."""
    file = yaml.safe_load(with_composition())
    names = ["uppercase", "reverse", "plural"]
    settings = {"shared": 0.25, "rank": 2}
    strategy = {"name": "compose", "steps": 4, "method": "twin", "settings": settings}
    file["policies"]["mixed"]["strategy"] = strategy
    async with serving(tmp_path, yaml.safe_dump(file), cache_dir=tmp_path) as (client, _):
        first = await mix(client, QUESTION)
        told = first["details"]["composition"]
        assert (told["method"], told["built"]) == ("twin", True), told
        assert set(told["members"]) == {"uppercase", "reverse"}
        [folder] = [f for f in (tmp_path / "compositions" / "queries").iterdir() if f.is_dir()]
        report = json.loads((folder / "composition.json").read_text())["report"]
        assert 0 < report["energy"] < 1  # of the own parts, cut to their rank
        loras = [read_lora(TINY / "experts" / "large" / name) for name in names]
        weights = Weights(tuple(told["members"].get(name, 0.0) for name in names))
        want = Twin.merge([lora.modules for lora in loras], weights, TwinSettings(**settings))
        found = read_lora(folder).modules
        assert found.keys() == want.modules.keys()
        for module, factors in found.items():
            assert torch.allclose(factors.delta(), want.modules[module].delta(), atol=1e-5)
        again = await mix(client, f"please {QUESTION}")
        assert again["details"]["composition"]["built"] is False

        # Excluded, it is in no part; and one with all of the weight needs nobody else.
        await mix(client, QUESTION, exclude=["plural"])
        made = [f / "composition.json" for f in folder.parent.iterdir() if f.is_dir()]
        members = sorted(len(json.loads(f.read_text())["members"]) for f in made)
        assert members == [2, 3]


async def test_a_stream_and_a_reload_of_a_composition_for_a_query(tmp_path: Path) -> None:
    text = with_composition()
    async with serving(tmp_path, text, cache_dir=tmp_path) as (client, service):
        whole = await mix(client, QUESTION)
        body = chat(QUESTION, "mixed") | {"stream": True}
        streamed = (await client.post("/v1/chat/completions", json=body)).text
        events = [json.loads(e[6:]) for e in streamed.split("\n\n") if e.startswith("data: {")]
        assert (
            "".join(
                choice["delta"].get("content") or ""
                for event in events
                for choice in event["choices"]
            )
            == whole["said"]
        )
        assert events[-1]["composer"]["details"]["composition"]["built"] is False

        queries = tmp_path / "compositions" / "queries"
        assert len(list(queries.iterdir())) == 1
        file = yaml.safe_load(text)
        del file["experts"]["reverse"], file["experts"]["shout"]
        file["policies"]["mixed"]["experts"] = ["uppercase", "plural"]
        (tmp_path / "experts.yaml").write_text(yaml.safe_dump(file))
        await service.changes.reload()
        assert service.changes.state.ok, service.changes.state
        for _ in range(100):
            if not list(queries.iterdir()):
                break
            await asyncio.sleep(0.02)
        assert list(queries.iterdir()) == []
        rest = await mix(client, QUESTION)
        assert "reverse" not in rest["details"]["composition"]["members"]


async def test_on_a_full_server_a_composition_gives_way_to_experts_unless_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At run-time registration and at a reload, which is tried again by itself."""
    monkeypatch.setattr("composer.mixing.AGAIN_S", 0.05)
    text = with_composition(max_adapters=5)  # of which the registry needs four
    digits = yaml.safe_load(registry("sort-digits"))["experts"]["sort-digits"]
    added = {"id": "sort-digits", **digits}
    async with serving(tmp_path, text, cache_dir=tmp_path) as (client, service):
        first = await mix(client, QUESTION)
        assert "failed" not in first["details"]["composition"]
        made = await client.post("/v1/experts", json=added)
        assert made.status_code == 201, made.text
        assert await asked(client, ASKED["sort-digits"][0]) == ("sort-digits", "1234")
        alone = await mix(client, QUESTION)
        assert "max_adapters is 5" in alone["details"]["composition"]["failed"]
        more = await client.post("/v1/experts", json={**PLURAL, "id": "one-more"})
        assert more.status_code == 201  # of the same weights: no further adapter
        assert (await client.delete("/v1/experts/one-more")).status_code == 200
        assert (await client.delete("/v1/experts/sort-digits")).status_code == 200

        hold = service.generations.hold()
        asked_for = Mix((("uppercase", 0.5), ("reverse", 0.5)))
        async with service.mixer.expert(asked_for, hold.generation) as answering:
            assert "failed" not in answering.details["composition"]
            refused = await client.post("/v1/experts", json=added)
            assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
            file = yaml.safe_load(text)
            file["experts"]["sort-digits"] = digits
            (tmp_path / "experts.yaml").write_text(yaml.safe_dump(file))
            await service.changes.reload()
            assert "1 of them were composed" in str(service.changes.state.problems)
        hold.release()
        async with asyncio.timeout(20):
            while "sort-digits" not in service.generations.current.catalog.experts:
                await asyncio.sleep(0.02)
        assert service.changes.state.ok
        assert await asked(client, ASKED["sort-digits"][0]) == ("sort-digits", "1234")


async def test_a_member_that_changes_or_goes_reaches_the_composition(tmp_path: Path) -> None:
    text = with_composition()
    nothing_unnamed = {"cache_dir": tmp_path, "compositions_mb": 0}
    async with serving(tmp_path, text, **nothing_unnamed) as (client, service):
        assert await asked(client, SHOUT) == ("shout", "WINTER")
        assert len(compositions(tmp_path)) == 1
        file = yaml.safe_load(text)
        file["experts"]["uppercase"]["adapter"] = str(TINY / "experts" / "large" / "plural")
        del file["experts"]["uppercase"]["prompt"]
        (tmp_path / "experts.yaml").write_text(yaml.safe_dump(file))
        await service.changes.reload()
        assert service.changes.state.ok
        who, said = await asked(client, SHOUT)
        assert (who, said == "WINTER") == ("shout", False)

        async with asyncio.timeout(20):  # the one before it is named no more
            while len(compositions(tmp_path)) > 1:
                await asyncio.sleep(0.02)

        del file["experts"]["uppercase"]
        (tmp_path / "experts.yaml").write_text(yaml.safe_dump(file))
        await service.changes.reload()
        assert "no expert is called 'uppercase'" in str(service.changes.state.problems)
        assert await asked(client, SHOUT) == ("shout", said)


@requires_vllm
@pytest.mark.slow
async def test_the_router_chooses_a_composed_expert_on_vllm(tmp_path: Path) -> None:
    text = with_composition(
        engine="vllm",
        max_loras=2,
        max_cpu_loras=4,
        max_lora_rank=16,
        context_window=512,
        launch={
            "python": python(),
            "args": {"dtype": "float32", "enforce_eager": True},
            "env": ENVIRONMENT,
            "log": str(tmp_path / "vllm.log"),
            "start_timeout_s": 600,
        },
    )
    file = yaml.safe_load(text)
    file["servers"]["tiny"].pop("queue")
    async with serving(tmp_path, yaml.safe_dump(file), cache_dir=tmp_path) as (client, _):
        await check(client)
        said = await check_mixes(client, tmp_path)
    (tmp_path / "other").mkdir()
    text = with_composition()
    async with serving(tmp_path / "other", text, cache_dir=tmp_path / "other") as (client, _):
        assert (await mix(client, QUESTION))["said"] == said
