"""A gated expert on vLLM and one on the embedded engine, among plain experts, chosen by the router
and answered through the API. Nothing below the API is replaced."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import yaml

from api.app import create_app
from composer.adapters.gates.vllm_folder import write_vllm_folder
from composer.build import make_service
from composer.settings import Settings
from examples.tiny.experts import base_folder, base_name, expert_folder
from examples.tiny.tasks import SKILLS
from tests.vllm import ENVIRONMENT, ROOT, plugin_environment, python, vllm_marks
from tests.vllm_gates import BASE, folder_of, tiny_gate

pytestmark = vllm_marks

MIXED, PLAIN = ("reverse", "caesar"), ("add", "plural")


def catalog(folder: Path, model: Path, gate: Path) -> str:
    """`mixed` is the gate on vLLM, `mixed-here` the same one on the embedded engine."""
    sampling = {"temperature": 0, "max_tokens": 48}
    examples = {
        skill: [item.prompt for item in SKILLS[skill].sample("train", 4, seed=1)]
        for skill in (*MIXED, *PLAIN)
    }
    launch = {
        "python": python(),
        "args": {"dtype": "float32", "enforce_eager": True},
        "env": ENVIRONMENT | plugin_environment(folder / "plugin"),
        "log": str(folder / "vllm.log"),
        "start_timeout_s": 600,
    }
    plain = {
        skill: {
            "server": "here",
            "adapter": str(expert_folder("large", skill)),
            "examples": examples[skill],
            "sampling": sampling,
        }
        for skill in PLAIN
    }
    mixed = {"examples": [text for skill in MIXED for text in examples[skill]]}
    return yaml.safe_dump(
        {
            "version": 1,
            "servers": {
                "there": {
                    "engine": "vllm",
                    "model": str(model),
                    "context_window": 512,
                    "launch": launch,
                },
                "here": {
                    "engine": "embedded",
                    "model": str(base_folder("large")),
                    "model_name": base_name("large"),
                    "dtype": "float32",
                },
            },
            "experts": plain
            | {
                "mixed": mixed | {"server": "there", "sampling": sampling},
                "mixed-here": {"server": "here", "gate": str(gate), "sampling": sampling} | mixed,
            },
            "policies": {
                "auto": {
                    "router": {"name": "neighbours"},
                    "strategy": {"name": "single"},
                    "experts": ["*", "!mixed-here"],
                },
                "embedded": {
                    "router": {"name": "neighbours"},
                    "strategy": {"name": "single"},
                    "experts": ["*", "!mixed"],
                },
            },
        }
    )


@pytest.mark.slow
async def test_the_router_chooses_the_gated_expert_and_both_engines_answer_alike(
    tmp_path: Path,
) -> None:
    gate = folder_of(tiny_gate("phatgoose", times=3), tmp_path / "gate")
    model = tmp_path / "model"
    write_vllm_folder(gate, base_folder("large"), model, base_name=BASE)
    file = tmp_path / "experts.yaml"
    file.write_text(catalog(tmp_path, model, gate), encoding="utf-8")
    roots = (tmp_path, expert_folder("large", "add").parent)
    settings = Settings(
        experts=file,
        adapter_roots=roots,
        cache_dir=ROOT / ".cache" / "composer",
        journal=tmp_path / "journal",
        files_dir=tmp_path / "files",
        max_wait_s=3600.0,
        database_url=f"sqlite+aiosqlite:///{tmp_path}/composer.db",
    )
    service = make_service(settings)
    asked = [
        (skill, item.prompt)
        for skill in (*MIXED, *PLAIN)
        for item in SKILLS[skill].sample("test", 5, seed=7)
    ]
    await service.start()
    try:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://composer") as client:

            async def answer(policy: str, text: str) -> tuple[str, str]:
                body = {"model": policy, "messages": [{"role": "user", "content": text}]}
                reply = await client.post("/v1/chat/completions", json=body, timeout=None)
                assert reply.status_code == 200, reply.text
                said = reply.json()
                return said["composer"]["expert"], said["choices"][0]["message"]["content"]

            there = [(skill, *await answer("auto", text)) for skill, text in asked]
            here = [(skill, *await answer("embedded", text)) for skill, text in asked]
    finally:
        await service.close()
    chosen = {skill: {expert for own, expert, _ in there if own == skill} for skill, _ in asked}
    assert all(chosen[skill] == {"mixed"} for skill in MIXED)
    assert all(chosen[skill] == {skill} for skill in PLAIN)
    assert [text for _, _, text in there] == [text for _, _, text in here]
    assert len({text for _, _, text in there}) > 10
