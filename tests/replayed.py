"""Recorded answers of made-up models for tests: questions of four topics, one master of each."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOM = 2
"""Of the four models that the device holds."""

WAITS = {"max_wait_s": 60, "patience": 0.01}
"""Nobody is refused, and a swap is put off for half a second or so."""

TOPICS = {
    "algebra": ("equation", "polynomial", "matrix", "root", "fraction"),
    "cells": ("enzyme", "membrane", "protein", "mitochondrion", "gene"),
    "courts": ("contract", "verdict", "lawsuit", "statute", "appeal"),
    "markets": ("price", "inflation", "demand", "interest rate", "tariff"),
}
ASKS = ("Which is true of a {}?", "What does a {} need?", "What follows from every {}?")
OPTIONS = "\nA. the first\nB. the second\nC. the third\nD. none of these"


@dataclass(frozen=True, slots=True)
class Recorded:
    """Rows of a table: questions, right letters, and answers by model."""

    path: Path
    query: list[str]
    gold: list[str]
    answer: Mapping[str, list[str]]

    def right(self, letters: Sequence[str | None]) -> float:
        return float(np.mean([a == b for a, b in zip(letters, self.gold, strict=True)]))


def record(folder: Path) -> Recorded:
    """60 questions of four topics, and four models of which each masters one."""
    rng = np.random.default_rng(0)
    asked = list(product(TOPICS.items(), range(5), ASKS))
    asked = [asked[i] for i in rng.permutation(len(asked))]
    query = [ask.format(words[n]) + OPTIONS for (_, words), n, ask in asked]
    gold = rng.choice(list("ABCD"), len(asked)).tolist()

    def answers(model: str) -> list[str]:
        masters = np.array([topic == model for (topic, _), _, _ in asked])
        right = rng.random(len(asked)) < np.where(masters, 0.9, 0.4)
        return np.where(right, gold, rng.choice([*"ABCD", ""], len(asked))).tolist()

    answer = {model: answers(model) for model in TOPICS}
    path = folder / "table.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["query", "in_chars", *(f"answer|{model}" for model in TOPICS)])
        for i, text in enumerate(query):
            rows.writerow([text, len(text), *(answer[model][i] for model in TOPICS)])
    return Recorded(path, query, gold, answer)


def registry(path: Path) -> str:
    def expert(topic: str) -> dict[str, Any]:
        words = TOPICS[topic]
        examples = [f"Explain what a {word} is, and what belongs to it." for word in words]
        known_by = {"description": topic, "examples": examples}
        return {"server": f"{topic}-server", "context_window": 4096, **known_by}

    def server(topic: str) -> dict[str, Any]:
        placement = {"device": "gpu", "memory_gb": 10, "start_s": 0.02, "stop_s": 0.01}
        own = {"engine": "replay", "table": str(path), "model": topic, "time_scale": 0}
        return {**own, "placement": placement}

    neighbours = {"router": {"name": "neighbours"}}
    vote = {"name": "vote", "extractor": "choice", "weights": "majority"}
    waves = {"name": "vote", "extractor": "choice", "weights": "log_odds", "options": 4, "first": 1}
    return yaml.safe_dump(
        {
            "version": 1,
            "devices": {"gpu": {"memory_gb": 10 * ROOM}},
            "servers": {f"{topic}-server": server(topic) for topic in TOPICS},
            "experts": {topic: expert(topic) for topic in TOPICS},
            "policies": {
                "auto": {**neighbours, "strategy": {"name": "single"}},
                "near": {**neighbours, "strategy": {"name": "single"}, "tolerance": 1.0},
                "vote": {**neighbours, "strategy": vote, "k": 3},
                "waves": {**neighbours, "strategy": waves, "k": 4},
            },
        }
    )
