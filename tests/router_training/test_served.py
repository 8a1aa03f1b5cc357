"""Every family, trained, named by a policy and served through the API over replayed models."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from composer.build import load, make_embedder
from composer.errors import CatalogError
from composer.routing.artefact import EmbedderStamp
from composer.routing.families import FAMILIES
from composer.routing.outcomes import Outcomes
from composer.settings import Settings
from router_training import load_router
from router_training.train import train
from tests.replayed import TOPICS, WAITS, Recorded, registry
from tests.router_training.intent_tables import INTENTS, intents
from tests.tiny import ROOT, chat, serving

pytestmark = pytest.mark.usefixtures("short_grids")

EXPERTS = tuple(TOPICS)
PRICES = dict(zip(EXPERTS, (1e-4, 2e-4, 4e-4, 8e-4), strict=True))
"""US dollars a call."""


@pytest.fixture(scope="module")
def embedder() -> Any:
    return make_embedder(Settings(cache_dir=ROOT / ".cache" / "composer"))


def topic(text: str) -> str:
    return next(name for name, words in TOPICS.items() if any(word in text for word in words))


def outcomes(recorded: Recorded, *, priced: bool = True) -> Outcomes:
    quality = np.array(
        [[a == g for a, g in zip(recorded.answer[e], recorded.gold, strict=True)] for e in EXPERTS],
        np.float32,
    ).T
    price = np.array([PRICES[e] if priced else np.nan for e in EXPERTS], np.float32)
    n = len(recorded.query)
    return Outcomes(
        experts=EXPERTS,
        text=tuple(recorded.query),
        quality=quality,
        cost=np.broadcast_to(price, quality.shape).copy(),
        category=tuple(topic(text) for text in recorded.query),
        benchmark=("exam",) * n,
        group=np.arange(n),
    )


def trained(recorded: Recorded, family: str, embedder: Any, folder: Path, **how: Any) -> None:
    stamp = EmbedderStamp(id=embedder.id, digest=embedder.digest, dim=embedder.dim)
    train(outcomes(recorded, **how), family, embedder.encode, stamp).artefact().save(folder)


def served(recorded: Recorded, **policy: Any) -> str:
    config = yaml.safe_load(registry(recorded.path))
    for expert in config["experts"].values():  # an artefact needs no texts
        del expert["description"], expert["examples"]
    router = {"name": "learned", "artefact": "./router"}
    config["policies"] = {"auto": {"router": router, "strategy": {"name": "single"}, **policy}}
    return yaml.safe_dump(config)


async def answer(client: httpx.AsyncClient, text: str, **composer: Any) -> Any:
    response = await client.post("/v1/chat/completions", json=chat(text) | {"composer": composer})
    assert response.status_code == 200, response.text
    return response.json()["composer"]


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_policy_serves_what_was_trained(
    family: str, tmp_path: Path, recorded: Recorded, embedder: Any
) -> None:
    trained(recorded, family, embedder, tmp_path / "router")
    offline = load_router(tmp_path / "router", embedder)
    asked = recorded.query[:6]
    expected = offline.score(asked)
    cheapest = EXPERTS[0]
    async with serving(tmp_path, served(recorded), **WAITS) as (client, _):
        for text, quality in zip(asked, expected.quality, strict=True):
            told = await answer(client, text)
            best = EXPERTS[int(quality.argmax())]
            assert told["expert"] == best
            assert told["scores"] == pytest.approx(
                dict(zip(EXPERTS, quality.tolist(), strict=True)), abs=1e-4
            )
            assert told["reasons"]["evidence"][best]["family"] == family
            without = await answer(client, text, exclude=[best])
            rest = np.where(np.array(EXPERTS) == best, -1, quality)
            assert without["expert"] == EXPERTS[int(rest.argmax())]
        frugal = await answer(client, asked[0], max_cost=PRICES[cheapest])
        assert frugal["expert"] == cheapest
        modest = await answer(client, asked[0], quality=0.5)
        assert modest["expert"] == cheapest
        assert modest["reasons"]["rule"] == "aim_quality"
        aim = modest["reasons"]["aim"]
        assert aim["quality"] == 0.5
        assert aim["expected_cost"] == pytest.approx([PRICES[cheapest]] * 2, rel=0.05)


async def test_an_aim_counts_every_call_of_a_vote(
    tmp_path: Path, recorded: Recorded, embedder: Any
) -> None:
    trained(recorded, "category", embedder, tmp_path / "router")
    vote = {"name": "vote", "extractor": "exact", "first": 2}
    asked, dearest = recorded.query[:4], max(PRICES.values())
    async with serving(tmp_path, served(recorded, strategy=vote, k=3), **WAITS) as (client, _):
        for text in asked:
            rich = await answer(client, text, max_cost=4 * dearest)
            assert rich["reasons"]["rule"] == "aim_max_cost"
            least, most = rich["reasons"]["aim"]["expected_cost"]
            assert 0 < least < most
            poor = await answer(client, text, max_cost=2.5 * min(PRICES.values()))
            assert poor["reasons"]["over_budget"]
            assert poor["reasons"]["aim"]["expected_cost"][1] <= 2.5 * min(PRICES.values()) * 1.05
        for wish, says in ((2, "quality 2 is out of reach"), (90, "quality 90 is out of reach")):
            body = chat(asked[0]) | {"composer": {"quality": wish}}
            refused = await client.post("/v1/chat/completions", json=body)
            error = refused.json()["error"]
            assert (refused.status_code, error["param"]) == (400, "composer.quality")
            assert says in error["message"]


def test_a_policys_quality_beyond_the_curve_is_a_problem_of_the_registry(
    tmp_path: Path, recorded: Recorded, embedder: Any
) -> None:
    trained(recorded, "category", embedder, tmp_path / "router")
    file = tmp_path / "experts.yaml"
    file.write_text(served(recorded, quality=1.0))
    load(Settings(experts=file), embedder=lambda: embedder)
    file.write_text(served(recorded, quality=1.9))
    with pytest.raises(CatalogError, match=r"quality 1\.9 is out of reach") as refused:
        load(Settings(experts=file), embedder=lambda: embedder)
    [problem] = refused.value.problems
    assert problem.path == "policies.auto.router"


async def test_intents_go_to_their_experts_and_what_is_nobodys_to_the_default(
    tmp_path: Path, embedder: Any
) -> None:
    asked, strange = intents(12, 6, seed=4), 0
    recorded = Recorded(tmp_path / "asked.csv", [*asked.text], [], {})
    with recorded.path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["query", "in_chars", *(f"answer|{model}" for model in EXPERTS)])
        rows.writerows([text, len(text), *EXPERTS] for text in asked.text)
    stamp = EmbedderStamp(id=embedder.id, digest=embedder.digest, dim=embedder.dim)
    model = train(intents(120, 30), "margin", embedder.encode, stamp)
    model.artefact().save(tmp_path / "router")
    threshold = model.manifest.metrics["threshold"]
    config = yaml.safe_load(served(recorded))
    *specialists, general = EXPERTS
    names = dict(zip(specialists, INTENTS, strict=False)) | {general: None}
    router = config["policies"]["auto"]["router"] | {"names": names}
    rejecting = {"threshold": threshold, "default_expert": general}
    config["policies"]["auto"] |= {"router": router, **rejecting}
    offline = load_router(tmp_path / "router", embedder)
    quality = offline.score(asked.text).quality[:, : len(specialists)]
    async with serving(tmp_path, yaml.safe_dump(config), **WAITS) as (client, _):
        for text, row in zip(asked.text, quality, strict=True):
            told = await answer(client, text)
            if row.max() < threshold:
                assert told["expert"] == general
                assert told["reasons"]["rule"] == "below_threshold"
                strange += 1
            else:
                assert told["expert"] == specialists[int(row.argmax())]
                assert told["scores"][told["expert"]] == pytest.approx(row.max(), abs=1e-4)
    assert 4 <= strange <= 12  # those that are nobody's, and perhaps the intent without an expert


async def test_aims_need_costs(tmp_path: Path, recorded: Recorded, embedder: Any) -> None:
    trained(recorded, "category", embedder, tmp_path / "router", priced=False)
    async with serving(tmp_path, served(recorded), **WAITS) as (client, _):
        body = chat(recorded.query[0]) | {"composer": {"quality": 0.9}}
        response = await client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "composer.quality")
    assert "needs a router trained on outcomes with their costs" in error["message"]
