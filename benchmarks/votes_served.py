"""Recorded experts behind the replay engine, and every policy of votes asked all questions. Prints
no table and trains nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import yaml

from benchmarks.common import progress
from composer.build import make_service
from composer.embedder import TextEmbedder
from composer.routing.model import LearnedModel
from composer.settings import Settings
from composer.strategies.voting.learnt import HeadFile
from composer.types import FloatArray, Request
from router_training.data import Dataset
from router_training.embedding import Embedding
from router_training.vectors import KeptVectors
from router_training.votes import MOST

Float64 = npt.NDArray[np.float64]

FIRST = 2
"""Asked at once: one alone is seldom the last, and waiting for it is time lost."""

REPORTED = 3.0
"""Calls wanted on average, of the policy that stops."""

OPTIONS = 10
"""Of a question, for the log-odds that no head was trained for."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A router, and what its like says of the questions it was fitted on."""

    model: LearnedModel
    quality: FloatArray
    data: Dataset


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """One way of answering: `score` and `calls` (n,)."""

    score: Float64
    calls: Float64


class KeptEmbedder:
    """Vectors that were made before, as far as deciding asks a service's embedder for them."""

    def __init__(self, kept: KeptVectors) -> None:
        self.id, self.digest, self.dim = kept.id, kept.digest, kept.dim
        self.encode = kept.encode

    async def embed(self, text: str) -> FloatArray:
        return np.asarray(self.encode([text])[0], np.float32)

    async def close(self) -> None:
        """Nothing is held."""


async def serve(
    embedding: Embedding,
    name: str,
    extractor: str,
    own: Prepared,
    file: HeadFile,
    judged_file: Path,
    judged: Dataset,
) -> tuple[dict[str, Judged], FloatArray]:
    """Each policy asked all questions, one plan for all policies of a question; and the expected
    quality of the experts in these plans (n, E), −1 for the others."""
    experts = own.model.experts
    ids = {f"e{number}": expert for number, expert in enumerate(experts)}
    column = {id_: number for number, id_ in enumerate(ids)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own.model.artefact().save(folder / "router")
        (folder / "head.json").write_text(file.text())
        policies = _policies(extractor, ids)
        config = {
            "version": 1,
            "servers": {
                id_: {
                    "engine": "replay",
                    "table": str(judged_file),
                    "model": expert,
                    "time_scale": 0,
                }
                for id_, expert in ids.items()
            },
            "experts": {id_: {"server": id_, "context_window": 1_000_000} for id_ in ids},
            "policies": policies,
        }
        (folder / "experts.yaml").write_text(yaml.safe_dump(config))
        settings = Settings(
            experts=folder / "experts.yaml",
            database_url=f"sqlite+aiosqlite:///{folder}/composer.db",
            journal=folder / "journal",
        )
        service = make_service(settings, cast(TextEmbedder, KeptEmbedder(embedding.kept)))
        await service.start()
        found: dict[str, list[tuple[float, int]]] = {policy: [] for policy in policies}
        quality = np.full(judged.outcomes.quality.shape, -1, np.float32)
        try:
            with progress(f"{name}: served", len(judged)) as step:
                for row, text in enumerate(judged.outcomes.text):
                    asked = partial(Request, prompt=text, explore=False)
                    planned = await service.pipeline.plan(asked(id=f"{row}", model="head"))
                    assert planned is not None
                    order = [column[choice.expert] for choice in planned.plan.choices]
                    quality[row, order] = [choice.quality for choice in planned.plan.choices]
                    for policy, so_far in found.items():
                        request = asked(id=f"{row}-{policy}", model=policy)
                        async with await service.pipeline.answer(request, planned) as answer:
                            async for _ in answer:
                                pass
                        outcome = answer.outcome
                        score = judged.outcomes.quality[row, column[outcome.experts[0]]]
                        so_far.append((float(score), len(outcome.timings.calls)))
                    step()
        finally:
            await service.close()
    alone = own.model.score(judged.outcomes.text, embedding.kept.encode).quality
    asked_of = quality >= 0
    assert np.allclose(quality[asked_of], alone[asked_of], atol=1e-4), f"{name}: scores differ"
    return {policy: Judged(*np.array(rows).T) for policy, rows in found.items()}, quality


def _policies(extractor: str, ids: Mapping[str, str]) -> dict[str, Any]:
    router = {"name": "learned", "artefact": "./router", "names": dict(ids)}
    vote = {"name": "vote", "extractor": extractor}
    head = {**vote, "head": "./head.json", "names": dict(ids)}
    odds = {**vote, "weights": "log_odds", "options": OPTIONS}
    strategies: dict[str, dict[str, Any]] = {
        "single": {"name": "single"},
        "majority": {**vote, "weights": "majority"},
        "log_odds_waves": {**odds, "first": FIRST},
        "head": head,
        "head_stops": {**head, "first": FIRST, "mean_calls": REPORTED},
    }
    k = min(MOST, len(ids))
    return {id_: {"router": router, "strategy": own, "k": k} for id_, own in strategies.items()} | {
        "auto": {"router": router, "strategy": {"name": "single"}}
    }


def same(served: Judged, arrays: Judged, name: str, *, calls: bool = True) -> None:
    """What is served is what the arrays say; `calls` False: these do not say how many."""
    assert np.array_equal(served.score, arrays.score), f"{name}: served answers differ"
    if calls:
        assert np.array_equal(served.calls, arrays.calls), f"{name}: served calls differ"
