"""Every registered router and strategy declares itself and answers through the API.

Adding one costs a line in `composer/build.py` and a line here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
import pytest_asyncio
import yaml

from composer.build import ENGINES, ROUTERS, STRATEGIES, make_embedder
from composer.routing.artefact import EmbedderStamp
from composer.routing.outcomes import Outcomes
from composer.settings import Settings
from composer.types import Tier
from router_training.train import train
from tests.engines.scripted import Scripted, chooses, serve
from tests.tiny import ASKED, ROOT, chat, registry, serving

ROUTER_CASES: list[dict[str, Any]] = [
    {"name": "neighbours"},
    {"name": "neighbours", "aggregate": "max", "metric": "cosine"},
    {"name": "neighbours", "aggregate": "top_m", "m": 5},
    {"name": "neighbours", "aggregate": "centroid", "sources": ["examples"]},
    {"name": "learned", "artefact": "./router"},
    {"name": "online", "base": {}},
    {"name": "online", "base": {"artefact": "./router"}, "feedback": "full"},
    {"name": "llm", "expert": "wise"},
    {"name": "llm", "expert": "wise", "method": "elimination", "candidates": 2},
]
STRATEGY_CASES: list[dict[str, Any]] = [
    {"name": "single"},
    {"name": "vote"},
    {"name": "vote", "weights": "majority", "extractor": "exact"},
    {"name": "vote", "weights": "log_odds", "first": 1},
    {"name": "compose", "sharpness": 8},
    {"name": "compose", "method": "twin"},
]


def _id(router: int, strategy: int) -> str:
    return f"r{router}-s{strategy}"


def test_every_family_has_a_case() -> None:
    assert {case["name"] for case in ROUTER_CASES} == set(ROUTERS)
    assert {case["name"] for case in STRATEGY_CASES} == set(STRATEGIES)


@pytest.mark.parametrize("family", [*ROUTERS.values(), *STRATEGIES.values(), *ENGINES.values()])
def test_each_declares_what_it_is(family: Any) -> None:
    assert family.tier in get_args(Tier)
    assert family.__doc__
    assert family.settings.model_config["extra"] == "forbid"
    assert family.settings.model_config["frozen"]


def train_on_examples(experts: dict[str, Any], folder: Path) -> None:
    """An artefact for which each expert was right on its own examples alone."""
    own = [(text, expert) for expert, card in experts.items() for text in card["examples"]]
    right = np.array([[e == expert for e in experts] for _, expert in own], np.float32)
    outcomes = Outcomes(
        experts=tuple(experts),
        text=tuple(text for text, _ in own),
        quality=right,
        cost=np.full_like(right, np.nan),
        category=tuple(expert for _, expert in own),
        benchmark=("examples",) * len(own),
        group=np.arange(len(own)),
    )
    embedder = make_embedder(Settings(cache_dir=ROOT / ".cache" / "composer"))
    stamp = EmbedderStamp(id=embedder.id, digest=embedder.digest, dim=embedder.dim)
    train(outcomes, "neighbours", embedder.encode, stamp).artefact().save(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """One service with a policy for each pair of cases."""
    config = yaml.safe_load(registry("uppercase", "reverse", "plural"))
    config["policies"] |= {
        _id(r, s): {
            "router": router,
            "strategy": strategy,
            "k": 1 if strategy["name"] == "single" else 3,
            "experts": ["*", "!wise"],
        }
        for r, router in enumerate(ROUTER_CASES)
        for s, strategy in enumerate(STRATEGY_CASES)
    }
    config["policies"]["auto"]["experts"] = ["*", "!wise"]
    folder: Path = tmp_path_factory.mktemp("families")
    train_on_examples(config["experts"], folder / "router")
    # What only a capable LLM could write is scripted.
    script = chooses("reverse", instruction="write the word backwards")
    async with serve(Scripted(script=script)) as fake:
        config["servers"]["scripted"] = fake.server
        config["experts"]["wise"] = {"server": "scripted", "context_window": 4096}
        async with serving(folder, yaml.safe_dump(config)) as (client, _):
            yield client


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("strategy", range(len(STRATEGY_CASES)))
@pytest.mark.parametrize("router", range(len(ROUTER_CASES)))
async def test_each_answers_through_the_api(
    client: httpx.AsyncClient, router: int, strategy: int
) -> None:
    asked, _ = ASKED["reverse"]
    response = await client.post(
        "/v1/chat/completions", json=chat(asked, model=_id(router, strategy))
    )
    body = response.json()
    assert response.status_code == 200, body
    assert body["composer"]["strategy"] == STRATEGY_CASES[strategy]["name"]
    assert max(body["composer"]["scores"], key=body["composer"]["scores"].get) == "reverse"
    if STRATEGY_CASES[strategy].get("weights") != "majority":  # three experts, three answers
        assert body["choices"][0]["message"]["content"] == "xof"
