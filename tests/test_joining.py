"""A LoRA that is added while the service runs gets the traffic that it is for, without training."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.test_families import train_on_examples
from tests.tiny import ASKED, chat, registry, serving


@pytest.mark.slow
async def test_an_expert_added_at_run_time_joins_the_trained_router(tmp_path: Path) -> None:
    config = yaml.safe_load(registry("uppercase", "reverse", "plural", "sort-digits"))
    added = {"id": "reverse", **config["experts"].pop("reverse")}
    train_on_examples(config["experts"], tmp_path / "router")
    learned = {"name": "learned", "artefact": "./router", "unknown": "join"}
    config["policies"]["auto"]["router"] = learned
    async with serving(tmp_path, yaml.safe_dump(config)) as (client, _):

        async def asked(skill: str) -> dict[str, object]:
            response = await client.post("/v1/chat/completions", json=chat(ASKED[skill][0]))
            assert response.status_code == 200, response.text
            found: dict[str, object] = response.json()["composer"]
            return found

        skills = ("uppercase", "plural", "sort-digits")
        before = {skill: await asked(skill) for skill in skills}
        assert (await client.post("/v1/experts", json=added)).status_code == 201
        assert (await asked("reverse"))["expert"] == "reverse"
        for skill in skills:
            after = await asked(skill)
            assert after["expert"] == before[skill]["expert"] == skill
            scores = dict(after["scores"])  # type: ignore[call-overload]
            scores.pop("reverse")
            assert scores == before[skill]["scores"]
        assert (await client.delete("/v1/experts/reverse")).status_code == 200
        assert (await asked("plural"))["scores"] == before["plural"]["scores"]
