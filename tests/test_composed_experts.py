"""A composed adapter among plain experts, chosen by the router, through the API on both engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.tiny import ASKED, TINY, chat, registry, serving
from tests.vllm import ENVIRONMENT, python, requires_vllm

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
    # By itself it is neither of its members.
    assert await asked(client, "reverse winter", "reverse") == ("reverse", "retniw")
    assert (await asked(client, "reverse winter", "shout"))[1] != "retniw"


async def test_the_router_chooses_a_composed_expert_on_the_embedded_engine(tmp_path: Path) -> None:
    cache = tmp_path / "compositions"
    text = with_composition()
    async with serving(tmp_path, text, cache_dir=tmp_path) as (client, _):
        await check(client)
    (folder,) = cache.iterdir()
    assert (folder / "composition.json").is_file()


async def test_a_member_that_changes_or_goes_reaches_the_composition(tmp_path: Path) -> None:
    text = with_composition()
    async with serving(tmp_path, text, cache_dir=tmp_path) as (client, service):
        assert await asked(client, SHOUT) == ("shout", "WINTER")
        file = yaml.safe_load(text)
        file["experts"]["uppercase"]["adapter"] = str(TINY / "experts" / "large" / "plural")
        del file["experts"]["uppercase"]["prompt"]
        (tmp_path / "experts.yaml").write_text(yaml.safe_dump(file))
        await service.reload()
        assert service.reload_state.ok
        who, said = await asked(client, SHOUT)
        assert (who, said == "WINTER") == ("shout", False)

        del file["experts"]["uppercase"]
        (tmp_path / "experts.yaml").write_text(yaml.safe_dump(file))
        await service.reload()
        assert "no expert is called 'uppercase'" in str(service.reload_state.problems)
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
            "start_timeout_s": 300,
        },
    )
    file = yaml.safe_load(text)
    file["servers"]["tiny"].pop("queue")
    async with serving(tmp_path, yaml.safe_dump(file), cache_dir=tmp_path) as (client, _):
        await check(client)
