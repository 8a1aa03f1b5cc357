"""An artefact in shadow beside the one that serves: recorded, compared, promoted, undone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sqlalchemy import text

from composer.embedder import load_embedder
from composer.errors import Conflict, Unsupported
from composer.routing.aims import aim_of
from composer.routing.artefact import EmbedderStamp
from composer.routing.outcomes import Outcomes
from composer.service import Service
from composer.store import Feedback, Promotion, Shadows
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


def shadowed(artefacts: Path, policy: str = "auto") -> str:
    config = yaml.safe_load(registry("uppercase", "plural"))
    config["policies"]["auto"]["router"] = {
        "name": "learned",
        "artefact": str(artefacts / "old"),
        "shadow": {"artefact": str(artefacts / "new"), "explore": 0.5},
    }
    config["policies"] = {policy: config["policies"]["auto"]}
    config["default_policy"] = policy
    return yaml.safe_dump(config)


def promotion_of(digest: str) -> Promotion:
    return Promotion("auto", digest, datetime.now(UTC), {})


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
        assert found["always_low"] < found["difference"]
        assert shown["always_better"] is (found["always_low"] > 0)
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
        assert "not better with 95 % confidence;" in refused.json()["error"]["message"]
        strict = {"action": "promote", "any_look": True}
        refused = await client.post("/v1/policies/auto/promotion", json=strict)
        assert refused.status_code == 409
        assert "95 % confidence, however often one looks;" in refused.json()["error"]["message"]
        assert await greedy(client) == "plural"


async def test_the_bound_for_every_look_counts_from_a_fixed_start(
    tmp_path: Path, artefacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest requests are for the shadow, the first against it: one look sees the former, and
    however many follow, what holds at every look rests on the latter."""
    async with serving(tmp_path, shadowed(artefacts)) as (client, service):
        answers = await answered(client, 40)
        await settled(service)
        await judge(service, answers[:20], "plural")
        shown = (await client.get("/v1/policies/auto/promotion")).json()
        assert shown["series_ended"] is False
        always_low = shown["comparison"]["always_low"]
        await judge(service, answers[20:], "uppercase")
        monkeypatch.setattr("composer.store.shadows.MOST", 20)
        shown = (await client.get("/v1/policies/auto/promotion")).json()
        assert (shown["series_ended"], shown["comparison"]["requests"]) == (True, 20)
        assert shown["comparison"]["difference"] > 0
        assert shown["comparison"]["always_low"] == always_low
        strict = {"action": "promote", "any_look": True}
        refused = await client.post("/v1/policies/auto/promotion", json=strict)
        assert refused.status_code == 409
        message = refused.json()["error"]["message"]
        assert "at the first 20 judged requests, which that bound counts" in message
        assert "judge by one look, planned beforehand" in message


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


async def test_a_promotion_whose_shadow_has_gone_is_undone_for_good(
    tmp_path: Path, artefacts: Path
) -> None:
    async with serving(tmp_path, shadowed(artefacts)) as (client, service):
        shown = (await client.get("/v1/policies/auto/promotion")).json()
        await service.changes.promote("auto", promotion_of(shown["shadow"]))
        assert await greedy(client) == "uppercase"
    async with serving(tmp_path, registry("uppercase", "plural")) as (client, service):
        digest = service.generations.current.catalog.digest
        undone = await post(client, "undo")
        assert undone.status_code == 200, undone.text
        assert undone.json() == {"object": "promotion", "policy": "auto", "promotion": None}
        assert service.generations.current.catalog.digest == digest
        assert (await post(client, "undo")).status_code == 409  # nothing to undo any more
    async with serving(tmp_path, shadowed(artefacts)) as (client, _):
        assert await greedy(client) == "plural"


async def test_an_undo_that_cannot_be_kept_is_not_done(tmp_path: Path, artefacts: Path) -> None:
    async with serving(tmp_path, shadowed(artefacts)) as (client, service):
        await Shadows(service.store).promote(promotion_of("sha256:gone"))
    async with serving(tmp_path, shadowed(artefacts)) as (client, service):
        async with service.store._engine.begin() as connection:  # type: ignore[union-attr]
            await connection.execute(text("DROP TABLE promotions"))
        assert (await post(client, "undo")).status_code >= 500
        assert list(service.promotions.wanted) == ["auto"]


async def test_a_promotion_that_is_passed_over_is_not_shown_as_in_force(
    tmp_path: Path, artefacts: Path
) -> None:
    async with serving(tmp_path, shadowed(artefacts)) as (_, service):
        await Shadows(service.store).promote(promotion_of("sha256:gone"))
    async with serving(tmp_path, shadowed(artefacts)) as (client, service):
        assert list(service.promotions.wanted) == ["auto"]
        shown = (await client.get("/v1/policies/auto/promotion")).json()
        assert (shown["promotion"], shown["left_out"]) == (None, 0)


async def test_what_does_not_run_in_shadow_is_not_promoted(tmp_path: Path, artefacts: Path) -> None:
    async with serving(tmp_path, shadowed(artefacts)) as (client, service):
        version = service.generations.current.catalog.version
        with pytest.raises(Conflict, match="does not run in the shadow of policy 'auto'"):
            await service.changes.promote("auto", promotion_of("sha256:gone"))
        assert service.promotions.wanted == {}
        assert await Shadows(service.store).promotions() == {}
        assert service.generations.current.catalog.version == version
        assert await greedy(client) == "plural"


async def test_a_request_the_shadow_cannot_choose_for_leaves_the_others_of_its_page(
    tmp_path: Path, artefacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Exception] = [Unsupported("quality needs costs"), ZeroDivisionError()]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if faults:
            raise faults.pop()
        return aim_of(*args, **kwargs)

    async with serving(tmp_path, shadowed(artefacts)) as (client, service):
        monkeypatch.setattr("composer.promotion.aim_of", failing)
        answers = await answered(client, 5)
        await settled(service)
        await judge(service, answers, "uppercase")
        shown = (await client.get("/v1/policies/auto/promotion")).json()
        assert (shown["comparison"]["requests"], shown["left_out"]) == (3, 2)


async def test_the_shadow_chooses_among_those_the_callers_key_leaves(
    tmp_path: Path, artefacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIET_KEY", "quiet")
    config = yaml.safe_load(shadowed(artefacts))
    config["keys"] = {"quiet": {"key_env": "QUIET_KEY", "exclude": ["uppercase"]}}
    async with serving(tmp_path, yaml.safe_dump(config)) as (client, service):
        client.headers["authorization"] = "Bearer quiet"
        answers = await answered(client, 4)
        await settled(service)
        await judge(service, answers, "plural")
        compared = await service.promotions._shadows.compared(
            "auto",
            service.generations.current.ways["auto"].router.shadow.artefact,  # type: ignore
        )
        assert [one.choice for one in compared] == ["plural"] * 4


async def test_a_policy_may_have_a_slash_in_its_id(tmp_path: Path, artefacts: Path) -> None:
    async with serving(tmp_path, shadowed(artefacts, "team/auto")) as (client, _):
        for path in ("team/auto", "team%2Fauto"):
            shown = await client.get(f"/v1/policies/{path}/promotion")
            assert (shown.status_code, shown.json()["policy"]) == (200, "team/auto")
        refused = await client.post("/v1/policies/team/auto/promotion", json={"action": "promote"})
        assert "not better with 95 % confidence" in refused.json()["error"]["message"]
