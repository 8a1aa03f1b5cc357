"""Outcomes and files that are known exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from composer.routing.outcomes import Outcomes

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
"""Real outcomes, where they stand beside the checkout."""

NAN = float("nan")


def outcomes(
    quality: Any,
    cost: Any = None,
    *,
    category: Sequence[str] | None = None,
    benchmark: Sequence[str] | None = None,
    group: Sequence[int] | None = None,
    experts: Sequence[str] | None = None,
) -> Outcomes:
    """`quality` (n, E); without `cost` none is known."""
    q = np.asarray(quality, np.float32)
    n, e = q.shape
    return Outcomes(
        experts=tuple(experts or [f"e{i}" for i in range(e)]),
        text=tuple(f"question {i}" for i in range(n)),
        quality=q,
        cost=np.full_like(q, NAN) if cost is None else np.asarray(cost, np.float32),
        category=tuple(category or [""] * n),
        benchmark=tuple(benchmark or [""] * n),
        group=np.asarray(range(n) if group is None else group, np.int64),
    )


def logged(whole: Outcomes, seed: int = 1000) -> Outcomes:
    """As a service's log has them: of each question one expert's outcome, drawn at random.
    `seed` is another than the table's, or who is asked would follow from the kind of question."""
    rng = np.random.default_rng(seed)
    asked = rng.integers(len(whole.experts), size=len(whole))
    gone = asked[:, None] != np.arange(len(whole.experts))
    quality, cost = (np.where(gone, np.float32(NAN), v) for v in (whole.quality, whole.cost))
    return replace(whole, quality=quality, cost=cost)


def write_csv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_jsonl(path: Path, *rows: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
