"""A table whose answer is known: three kinds of question, an expert who is best single, another
for one kind, and a cheap one that is middling at everything."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from composer.routing.artefact import EmbedderStamp
from composer.routing.outcomes import Outcomes
from router_training.groups import groups_of
from tests.routing.helpers import WordEmbedder

EXPERTS = ("algebra", "poems", "cheap")
COSTS = (0.01, 0.008, 0.001)

KINDS = {
    "maths": ("sum root prime integral angle fraction matrix vector", (0.95, 0.15, 0.45)),
    "verse": ("sonnet rhyme stanza ballad metre elegy couplet haiku", (0.3, 0.9, 0.4)),
    "small talk": ("hello weather tea garden holiday music lunch friend", (0.85, 0.5, 0.75)),
}


def table(n: int = 300, seed: int = 0, *, priced: bool = True, missing: float = 0.0) -> Outcomes:
    """`missing` is the share of outcomes that nobody has."""
    rng = np.random.default_rng(seed)
    names = list(KINDS)
    kind = rng.integers(len(names), size=n)
    texts = tuple(
        f"{' '.join(rng.choice(KINDS[names[k]][0].split(), 4, replace=False))} number {seed}-{i}"
        for i, k in enumerate(kind)
    )
    chance = np.array([KINDS[names[k]][1] for k in kind])
    quality = (rng.random(chance.shape) < chance).astype(np.float32)
    lengths = rng.uniform(0.5, 1.5, chance.shape) * np.where(kind == 0, 2.0, 1.0)[:, None]
    cost = np.asarray(lengths * np.array(COSTS), np.float32)
    gone = rng.random(chance.shape) < missing
    gone[:, 2] = False
    quality[gone], cost[gone] = np.nan, np.nan
    return Outcomes(
        experts=EXPERTS,
        text=texts,
        quality=quality,
        cost=cost if priced else np.full_like(cost, np.nan),
        category=tuple(names[k] for k in kind),
        benchmark=("synthetic",) * n,
        group=groups_of(texts, [None] * n),
    )


def write_table(path: Path, outcomes: Outcomes) -> Path:
    """As the CSV that `data.py` reads."""
    priced = not np.isnan(outcomes.cost).all()
    heads = ["query", "benchmark", "category", *(f"score|{e}" for e in outcomes.experts)]
    if priced:
        heads += [f"cost|{e}" for e in outcomes.experts]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        for i, text in enumerate(outcomes.text):
            row = [text, outcomes.benchmark[i], outcomes.category[i], *_cells(outcomes.quality[i])]
            writer.writerow(row + (_cells(outcomes.cost[i]) if priced else []))
    return path


def _cells(values: Sequence[float]) -> list[str]:
    return ["" if np.isnan(v) else repr(float(v)) for v in values]


def stamp() -> EmbedderStamp:
    return EmbedderStamp(id=WordEmbedder.id, digest=WordEmbedder.digest, dim=WordEmbedder.dim)
