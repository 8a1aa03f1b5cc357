"""Every registered router and strategy declares itself and answers through the API.

Adding one costs a line in `composer/build.py` and a line here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import pytest_asyncio
import yaml

from composer.build import ENGINES, ROUTERS, STRATEGIES
from composer.types import Tier
from tests.tiny import ASKED, chat, registry, serving

ROUTER_CASES: list[dict[str, Any]] = [
    {"name": "neighbours"},
    {"name": "neighbours", "aggregate": "max", "metric": "cosine"},
    {"name": "neighbours", "aggregate": "top_m", "m": 5},
    {"name": "neighbours", "aggregate": "centroid", "sources": ["examples"]},
]
STRATEGY_CASES: list[dict[str, Any]] = [
    {"name": "single"},
    {"name": "vote"},
    {"name": "vote", "weights": "majority", "extractor": "exact"},
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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """One service with a policy for each pair of cases."""
    config = yaml.safe_load(registry("uppercase", "reverse", "plural"))
    config["policies"] |= {
        _id(r, s): {
            "router": router,
            "strategy": strategy,
            "k": 1 if strategy["name"] == "single" else 3,
        }
        for r, router in enumerate(ROUTER_CASES)
        for s, strategy in enumerate(STRATEGY_CASES)
    }
    folder: Path = tmp_path_factory.mktemp("families")
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
