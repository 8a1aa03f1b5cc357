"""Conversations under a router that was trained on outcomes: follow-ups go where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.conversations import conversations, outcomes_of
from composer.build import load, make_embedder
from composer.routing import conversation
from composer.routing.artefact import EmbedderStamp
from composer.routing.base import Query
from composer.routing.learned import LearnedRouter, LearnedSettings
from composer.settings import Settings
from composer.types import Expert
from router_training.train import train
from tests.tiny import ROOT

pytestmark = pytest.mark.usefixtures("short_grids")

SHOWN = 15
"""Examples of each expert that the router is trained on."""


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings(experts=ROOT / "experts.yaml", cache_dir=ROOT / ".cache" / "composer")


@pytest.fixture(scope="module")
def experts(settings: Settings) -> list[Expert]:
    catalog = load(settings).catalog
    policy = catalog.policies[catalog.default_policy]
    return [catalog.experts[id_] for id_ in policy.experts if catalog.experts[id_].examples]


@pytest.mark.parametrize("family", ["kernel", "neighbours"])
async def test_follow_ups_are_read_with_what_they_follow(
    family: str, tmp_path: Path, settings: Settings, experts: list[Expert]
) -> None:
    embedder: Any = make_embedder(settings)
    try:
        stamp = EmbedderStamp(id=embedder.id, digest=embedder.digest, dim=embedder.dim)
        model = train(outcomes_of(experts, SHOWN), family, embedder.encode, stamp)
        model.artefact().save(tmp_path / "router")
        made = LearnedSettings(artefact=tmp_path / "router")
        router = LearnedRouter.build(experts, made, embedder)
        eligible = np.ones(len(experts), np.bool_)
        right: dict[str, list[bool]] = {"first": [], "last message": [], "whole": []}
        reach = set()
        for turns in conversations()[::3]:
            for number, (wanted, text) in enumerate(turns):
                earlier = tuple(said for _, said in turns[:number])
                for name, query in (
                    ("whole" if earlier else "first", Query(text, earlier)),
                    ("last message", Query(text)),
                ):
                    if name == "last message" and not earlier:
                        continue
                    scores, read = await conversation.score(router, query, eligible)
                    best = experts[int(np.argmax(scores.quality))].id
                    right[name].append(best == wanted)
                    reach.add(read)
    finally:
        await embedder.close()
    share = {name: float(np.mean(hits)) for name, hits in right.items()}
    assert len(right["whole"]) == len(right["last message"]) == 40
    assert reach == {1, 2, 3}
    assert share["first"] >= 0.9
    assert share["whole"] >= 0.7
    assert share["whole"] >= share["last message"] + 0.15
