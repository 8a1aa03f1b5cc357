"""An artefact in shadow beside the one that serves: recorded, compared, promoted, undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sqlalchemy import text

from composer.embedder import load_embedder
from composer.routing.artefact import EmbedderStamp
from composer.routing.outcomes import Outcomes
from composer.service import Service
from composer.store import Feedback
from router_training.train import train
from tests.tiny import ASKED, ROOT, chat, registry, serving

EXPERTS = ("plural", "uppercase")
QUESTION = ASKED["plural"][0]


def artefact(folder: Path, good: str) -> None:
    """One that knows one expert to be good at everything."""
    embedder = load_embedder("all-MiniLM-L6-v2", cache_dir=ROOT / ".cache" / "composer")
    words = ("fox", "hen", "cat", "box", "tree", "bird")
    texts = [form.replace("fox", word) for form, _ in ASKED.values() for word in words]
    n = len(texts)
    rng = np.random.default_rng(0)
    rates = np.array([0.9 if expert == good else 0.2 for expert in EXPERTS])
    blank = ("",) * n
    outcomes = Outcomes(
        EXPERTS,
        tuple(texts),
        (rng.random((n, 2)) < rates).astype(np.float32),
        np.full((n, 2), np.nan, np.float32),
        blank,
        blank,
        np.arange(n),
    )
    stamp = EmbedderStamp(id=embedder.id, digest=embedder.digest, dim=embedder.dim)
    train(outcomes, "clusters", embedder.encode, stamp).artefact().save(folder)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefacts")
    artefact(folder / "old", "plural")
    artefact(folder / "new", "uppercase")
    return folder


def shadowed(artefacts: Path) -> str:
    config = yaml.safe_load(registry("uppercase", "plural"))
    config["policies"]["auto"]["router"] = {
        "name": "learned",
        "artefact": str(artefacts / "old"),
        "shadow": {"artefact": str(artefacts / "new"), "explore": 0.5},
    }
    return yaml.safe_dump(config)


async def answered(client: Any, n: int) -> list[dict[str, Any]]:
    answers = [await client.post("/v1/chat/completions", json=chat(QUESTION)) for _ in range(n)]
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    return [answer.json() for answer in answers]


async def settled(service: Service) -> None:
    """What the background tasks do, now."""
    while await service.promotions.step():
        pass
    await service.recorder.flush()


async def judge(service: Service, answers: list[dict[str, Any]], good: str) -> None:
    for answer in answers:
        score = float(answer["composer"]["expert"] == good)
        await service.recorder.add_feedback(Feedback.checked(answer["id"], score))


async def post(client: Any, action: str) -> Any:
    return await client.post("/v1/policies/auto/promotion", json={"action": action})


async def greedy(client: Any) -> str:
    body = chat(QUESTION) | {"composer": {"explore": False}}
    answer = await client.post("/v1/chat/completions", json=body)
    return str(answer.json()["composer"]["expert"])


async def test_a_shadow_that_proved_better_is_promoted_kept_and_undone(
    tmp_path: Path, artefacts: Path
) -> None:
    async with serving(tmp_path, shadowed(artefacts)) as (client, service):
        empty = (await client.get("/v1/policies/auto/promotion")).json()
        assert (empty["comparison"], empty["better"], empty["promotion"]) == (None, False, None)
        assert (await post(client, "promote")).status_code == 409
        answers = await answered(client, 40)
        assert {a["composer"]["reasons"]["exploration"]["greedy"] for a in answers} == {"plural"}
        await settled(service)
        await judge(service, answers, "uppercase")
        shown = (await client.get("/v1/policies/auto/promotion")).json()
        found = shown["comparison"]
        assert found["requests"] == 40
        assert (found["unsupported"], shown["better"]) == (0.0, True)
        assert 0 < found["low"] < found["difference"] < found["high"]
        assert 0 < found["effective"] < 40
        done = await post(client, "promote")
        assert done.status_code == 200, done.text
        assert done.json()["artefact"] == shown["shadow"]
        assert done.json()["promotion"]["estimate"] == found
        assert await greedy(client) == "uppercase"
        assert (await post(client, "promote")).status_code == 409
    async with serving(tmp_path, shadowed(artefacts)) as (client, _):
        assert await greedy(client) == "uppercase"
        undone = await post(client, "undo")
        assert undone.json()["artefact"] == shown["artefact"]
        assert await greedy(client) == "plural"
    async with serving(tmp_path, shadowed(artefacts)) as (client, _):
        assert await greedy(client) == "plural"


async def test_one_that_proved_nothing_stays_in_shadow(tmp_path: Path, artefacts: Path) -> None:
    async with serving(tmp_path, shadowed(artefacts)) as (client, service):
        answers = await answered(client, 12)
        await settled(service)
        await judge(service, answers, "plural")
        refused = await post(client, "promote")
        assert refused.status_code == 409
        assert "not better with 95 % confidence" in refused.json()["error"]["message"]
        assert await greedy(client) == "plural"


async def test_a_promotion_that_cannot_be_kept_changes_nothing(
    tmp_path: Path, artefacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, shadowed(artefacts)) as (client, service):
        answers = await answered(client, 40)
        await settled(service)
        await judge(service, answers, "uppercase")
        async with service.store._engine.begin() as connection:  # type: ignore[union-attr]
            await connection.execute(text("DROP TABLE promotions"))
        version = service.generations.current.catalog.version
        assert (await post(client, "promote")).status_code >= 500
        assert service.promotions.wanted == {}
        assert service.generations.current.catalog.version == version
        assert await greedy(client) == "plural"


async def test_a_policy_without_a_shadow_says_so(tmp_path: Path) -> None:
    async with serving(tmp_path, registry("uppercase", "plural")) as (client, _):
        refused = await client.get("/v1/policies/auto/promotion")
        assert refused.status_code == 409
        assert "no router runs in the shadow" in refused.json()["error"]["message"]
        assert (await client.get("/v1/policies/none/promotion")).status_code == 404
