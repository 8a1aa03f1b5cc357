"""Vectors of texts that were embedded before, on disk: training embeds a table once. Knows no
outcome."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np

from composer.errors import SettingsError
from composer.types import FloatArray
from router_training.progress import Progress, silent

CHUNK = 64
"""Texts embedded between two commits: what a stopped run loses at most."""

LOOKED_UP = 500
"""Keys of one query, below SQLite's limit of variables."""


class Model(Protocol):
    """What makes vectors: `TextEmbedder`, or an `Encoder` alone."""

    id: str
    digest: str
    dim: int

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """(n,) texts → (n, d) float32 unit rows."""
        ...


class KeptVectors:
    """An embedder whose `encode` asks the model only for texts it has not seen in any run. One
    SQLite file for each model in `folder`, keyed by the texts' SHA-256; several processes may
    write to it at once. Raises SettingsError for a file that is damaged."""

    def __init__(self, embedder: Model, folder: Path, progress: Progress = silent) -> None:
        self.id, self.digest, self.dim = embedder.id, embedder.digest, embedder.dim
        self._embedder, self._progress = embedder, progress
        self.path = folder / f"{embedder.digest[:16]}.db"

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """(n,) texts → (n, d) unit rows."""
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as file:
                file.execute(
                    "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, row BLOB NOT NULL)"
                )
                return self._encoded(file, keys, texts)
        except sqlite3.Error as error:
            raise SettingsError(
                f"the kept vectors in {self.path} cannot be used ({error}); delete the file, and "
                "they are made anew"
            ) from error

    def _encoded(
        self, file: sqlite3.Connection, keys: Sequence[bytes], texts: Sequence[str]
    ) -> FloatArray:
        wanted = dict(zip(keys, texts, strict=True))
        known: dict[bytes, FloatArray] = {}
        asked = list(wanted)
        for start in range(0, len(asked), LOOKED_UP):
            some = asked[start : start + LOOKED_UP]
            marks = ",".join("?" * len(some))
            for key, row in file.execute(
                f"SELECT key, row FROM vectors WHERE key IN ({marks})", some
            ):
                known[key] = np.frombuffer(row, np.float32)
        missing = [key for key in asked if key not in known]
        for start in range(0, len(missing), CHUNK):
            self._progress("embedding", start, len(missing))
            some = missing[start : start + CHUNK]
            rows = self._embedder.encode([wanted[key] for key in some])
            known.update(zip(some, rows, strict=True))
            with file:
                file.executemany(
                    "INSERT OR IGNORE INTO vectors VALUES (?, ?)",
                    [(key, np.asarray(known[key], np.float32).tobytes()) for key in some],
                )
            self._progress("embedding", start + len(some), len(missing))
        return (
            np.stack([known[key] for key in keys]) if keys else np.empty((0, self.dim), np.float32)
        )
