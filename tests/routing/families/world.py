"""Questions on four topics, and four experts of whom each masters one: what is right is known."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from composer.routing.outcomes import Outcomes
from composer.routing.views import Features, Views
from composer.types import FloatArray

TOPICS = ("rivers", "bread", "engines", "chess")
EXPERTS = tuple(f"expert of {topic}" for topic in TOPICS)
OWN, OTHER = 0.85, 0.35
"""Chance of an expert to be right on its own topic, and on another."""

DIM = 24


def encode(texts: Sequence[str]) -> FloatArray:
    """Sums a fixed vector per word, of which half is that of the word without its number: so words
    of a topic lie together. A text without words points along the first axis."""
    rows = np.zeros((len(texts), DIM), np.float32)
    for row, text in zip(rows, texts, strict=True):
        row[0] = 0.1
        for word in text.split():
            row += _vector(word) + _vector(word.rstrip("0123456789?"))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


@cache
def _vector(word: str) -> FloatArray:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big")
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


def questions(n: int, seed: int) -> tuple[list[str], FloatArray]:
    """Texts, and (n, 4) the true chance of each expert."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(len(TOPICS), size=n)
    texts = []
    for t in topic:
        words = [f"{TOPICS[t]}{i}" for i in rng.integers(12, size=5)]
        words += [f"common{i}" for i in rng.integers(20, size=4)]
        rng.shuffle(words)
        options = "\nA. one\nB. two" if rng.random() < 0.3 else ""
        texts.append(" ".join(words) + "?" + options)
    chance = np.where(topic[:, None] == np.arange(len(TOPICS)), OWN, OTHER)
    return texts, chance.astype(np.float32)


@dataclass(frozen=True)
class World:
    views: Views
    features: Features
    outcomes: Outcomes
    new: Features
    chance: FloatArray
    """(m, E) of the new questions."""


def outcomes_of(
    texts: Sequence[str], chance: FloatArray, *, seed: int = 0, missing: float = 0.0
) -> Outcomes:
    rng = np.random.default_rng(seed)
    quality = (rng.random(chance.shape) < chance).astype(np.float32)
    quality[rng.random(chance.shape) < missing] = np.nan
    category = tuple(TOPICS[t] for t in chance.argmax(axis=1))
    return Outcomes(
        experts=EXPERTS[: chance.shape[1]],
        text=tuple(texts),
        quality=quality,
        cost=np.full_like(quality, 0.001),
        category=category,
        benchmark=("made up",) * len(texts),
        group=np.arange(len(texts)),
    )


def world(n: int = 300, *, missing: float = 0.0, seed: int = 0) -> World:
    texts, chance = questions(n, seed)
    new, new_chance = questions(200, seed + 1)
    views = Views.fit(texts)
    return World(
        views,
        views.transform(texts, encode),
        outcomes_of(texts, chance, seed=seed + 2, missing=missing),
        views.transform(new, encode),
        new_chance,
    )
