"""Rows, experts and embedders that are known exactly."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import numpy as np

from composer.routing.neighbours import NeighboursRouter, NeighboursSettings, Texts
from composer.types import Expert, FloatArray

DIM = 24


def unit(rows: FloatArray) -> FloatArray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float32)


def clustered(
    counts: Sequence[int], *, spread: float = 0.6, seed: int = 0, dim: int = DIM
) -> tuple[FloatArray, Texts]:
    """Unit rows around one random centre per expert, `counts[e]` of them, and their texts."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((len(counts), dim)))
    owner = np.repeat(np.arange(len(counts)), counts)
    noise = rng.standard_normal((len(owner), dim)) * spread / np.sqrt(dim)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    texts = Texts(tuple(f"row {i}" for i in range(len(owner))), ("examples",) * len(owner), start)
    return unit(centres[owner] + noise), texts


def queries(n: int, *, seed: int = 1, dim: int = DIM) -> FloatArray:
    return unit(np.random.default_rng(seed).standard_normal((n, dim)))


def router_of(
    rows: FloatArray, texts: Texts, settings: NeighboursSettings | None = None
) -> NeighboursRouter:
    ids = tuple(f"e{i}" for i in range(len(texts.start) - 1))
    return NeighboursRouter.of_rows(ids, texts, rows, settings or NeighboursSettings())


def expert(id: str, *examples: str, description: str = "", skills: Sequence[str] = ()) -> Expert:
    return Expert(
        id=id, server="s", examples=examples, description=description, skills=tuple(skills)
    )


class WordEmbedder:
    """Sums a fixed random vector per word: texts that share words are near each other.
    Implements `routing.base.Embedder`; `encoded` records every text it was asked for."""

    id = "words"
    digest = "words"
    dim = DIM

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str]) -> FloatArray:
        self.encoded += texts
        rows = np.zeros((len(texts), DIM), np.float32)
        for row, text in zip(rows, texts, strict=True):
            row[0] = 0.1  # a text without words is still a direction
            for word in text.lower().split():
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4])
                row += np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
        return unit(rows)

    async def embed(self, text: str) -> FloatArray:
        return np.asarray(self.encode([text])[0], np.float32)


class GatedEncoder:
    """An `encoders.Encoder` whose batches wait for `gate`; `batches` records them."""

    id = "gated"
    digest = "gated"
    backend = "onnx"
    dim = 3
    max_tokens = 16

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def encode(self, texts: Sequence[str]) -> FloatArray:
        self.batches.append(list(texts))
        self.entered.set()
        assert self.gate.wait(10), "the test never opened the gate"
        if self.error is not None:
            raise self.error
        return unit(np.array([[len(text), 1.0, 2.0] for text in texts], np.float32))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) + 2 for text in texts]
