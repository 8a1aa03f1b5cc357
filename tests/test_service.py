"""The service's own life: runtime experts over restarts, failing starts, closing half-way."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from composer.build import load
from composer.errors import CatalogError, StoreError
from composer.settings import Settings
from tests.tiny import ASKED, TINY, chat, registry, serving


def spec(folder: Path, id_: str = "mine") -> dict[str, Any]:
    """A runtime expert with an adapter of its own in `folder`."""
    shutil.copytree(TINY / "experts" / "large" / "reverse", folder)
    card = next(yaml.safe_load_all((folder / "README.md").read_text()))
    return {"id": id_, "server": "tiny", "adapter": str(folder), **card["composer"]}


async def test_a_runtime_expert_that_a_policy_names_survives_a_restart(tmp_path: Path) -> None:
    roots = {"adapter_roots": (TINY, tmp_path)}
    config = yaml.safe_load(registry("uppercase"))
    async with serving(tmp_path, yaml.safe_dump(config), **roots) as (client, _):
        added = await client.post("/v1/experts", json=spec(tmp_path / "mine"))
        assert added.status_code == 201, added.text
    config["policies"]["narrow"] = config["policies"]["auto"] | {"experts": ["mine"]}
    async with serving(tmp_path, yaml.safe_dump(config), **roots) as (client, _):
        answer = await client.post("/v1/chat/completions", json=chat(ASKED["reverse"][0], "narrow"))
        assert answer.json()["choices"][0]["message"]["content"] == ASKED["reverse"][1]


async def test_a_runtime_expert_gone_wrong_is_left_out_at_boot_and_can_be_deleted(
    tmp_path: Path,
) -> None:
    roots = {"adapter_roots": (TINY, tmp_path)}
    async with serving(tmp_path, registry("uppercase"), **roots) as (client, _):
        await client.post("/v1/experts", json=spec(tmp_path / "mine"))
    shutil.rmtree(tmp_path / "mine")
    async with serving(tmp_path, registry("uppercase"), **roots) as (client, _):
        health = (await client.get("/health")).json()
        assert health["status"] == "degraded"
        assert list(health["catalog"]["left_out"]) == ["mine"]
        assert str(tmp_path) not in health["catalog"]["left_out"]["mine"]
        answer = await client.post("/v1/chat/completions", json=chat(ASKED["uppercase"][0]))
        assert answer.json()["choices"][0]["message"]["content"] == ASKED["uppercase"][1]
        assert (await client.delete("/v1/experts/mine")).status_code == 200
        assert (await client.get("/health")).json()["status"] == "ok"


async def test_a_runtime_expert_left_out_may_be_named_by_a_key_and_asked_by_a_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANN_KEY", "ann")
    roots = {"adapter_roots": (TINY, tmp_path)}
    config = yaml.safe_load(registry("uppercase", "reverse"))
    async with serving(tmp_path, yaml.safe_dump(config), **roots) as (client, _):
        await client.post("/v1/experts", json=spec(tmp_path / "mine"))
    shutil.rmtree(tmp_path / "mine")
    config["keys"] = {"ann": {"key_env": "ANN_KEY", "exclude": ["mine"], "admin": True}}
    config["policies"]["auto"]["router"] = {"name": "llm", "expert": "mine"}
    async with serving(tmp_path, yaml.safe_dump(config), **roots) as (client, _):
        client.headers["authorization"] = "Bearer ann"
        health = (await client.get("/health")).json()
        assert list(health["catalog"]["left_out"]) == ["mine"]
        body = chat(ASKED["uppercase"][0])
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        assert answer["choices"][0]["message"]["content"] == ASKED["uppercase"][1]
        assert answer["composer"]["reasons"]["asked"]["failed"] == "not_asked"
        # Without its row the names would be mistakes, and the next start would fail.
        kept = await client.delete("/v1/experts/mine")
        assert kept.status_code == 409
        assert "the registry file names expert 'mine'" in kept.text
    async with serving(tmp_path, yaml.safe_dump(config), **roots) as (client, _):
        client.headers["authorization"] = "Bearer ann"
        assert list((await client.get("/health")).json()["catalog"]["left_out"]) == ["mine"]


async def test_while_the_file_is_broken_no_expert_is_added_and_the_caller_is_not_blamed(
    tmp_path: Path,
) -> None:
    roots = {"adapter_roots": (TINY, tmp_path)}
    async with serving(tmp_path, registry("uppercase"), **roots) as (client, _):
        (tmp_path / "experts.yaml").write_text("version: 1\nservers: {x: {engine: nothing}}\n")
        refused = await client.post("/v1/experts", json=spec(tmp_path / "mine"))
        assert refused.status_code == 409
        assert "the registry file is wrong at present" in refused.json()["error"]["message"]
        assert "nothing" not in refused.json()["error"]["message"]


def test_a_router_that_cannot_score_its_experts_is_a_problem_of_the_registry(
    tmp_path: Path,
) -> None:
    config = yaml.safe_load(registry())
    config["experts"] = {id_: {"server": "tiny", "description": id_} for id_ in ("one", "two")}
    config["policies"]["auto"]["router"]["sources"] = ["examples"]
    file = tmp_path / "experts.yaml"
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(CatalogError) as refused:
        load(Settings(experts=file, adapter_roots=(TINY,)))
    [problem] = refused.value.problems
    assert problem.path == "policies.auto.router"
    assert problem.message == "none of the experts has any of examples to be found by"
    assert problem.remedy.startswith("Add examples or a description")


async def test_a_start_that_fails_leaves_nothing_running(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(StoreError):
        async with serving(
            tmp_path, registry("uppercase"), database_url="postgresql://nobody@127.0.0.1:1/none"
        ):
            raise AssertionError("it started")
    assert {t.name for t in set(threading.enumerate()) - before if "asyncio" not in t.name} == set()


@pytest.mark.parametrize("fails", ["_build", "take_up"])
async def test_of_a_reload_that_fails_nothing_is_kept_for_what_was_coming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    async with serving(tmp_path, registry("uppercase")) as (_, service):
        dropped: list[None] = []

        async def away(*_: object) -> None:
            raise StoreError("it is away")

        monkeypatch.setattr(service.mixer, "dropped", lambda: dropped.append(None))
        owner = service.changes if fails == "_build" else service.learning
        monkeypatch.setattr(owner, fails, away)
        (tmp_path / "experts.yaml").write_text(registry("uppercase", "plural"))
        await service.changes.reload()
        assert service.changes.state.problems == ("it is away",)
        assert len(dropped) == 1


async def test_closing_during_a_reload_leaves_no_engine_behind(tmp_path: Path) -> None:
    async with serving(tmp_path, registry("uppercase")) as (_, service):
        config = yaml.safe_load(registry("uppercase", "plural"))
        config["servers"]["tiny"]["max_batch"] = 3  # another engine, so the reload builds one
        (tmp_path / "experts.yaml").write_text(yaml.safe_dump(config))
        reloading = asyncio.create_task(service.changes.reload())
        await asyncio.sleep(0.05)
        await service.close()
        await reloading
        assert service.generations.live == ()
    names = [thread.name for thread in threading.enumerate()]
    assert [name for name in names if name.startswith("embedded")] == []
