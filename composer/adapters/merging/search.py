"""Weights of a composition by gradient-free search: a loss in, weights out. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

Weights = npt.NDArray[np.float64]

BOUND = 1.5
PENALTY = 0.05


@dataclass(frozen=True, slots=True)
class Found:
    """`loss` is without the penalty; `evaluations` how often it was asked."""

    weights: Weights
    loss: float
    evaluations: int


class _Enough(Exception):
    pass


def search(loss: Callable[[Weights], float], members: int, *, evaluations: int = 100) -> Found:
    """The weights (M,) in [−1.5, 1.5] of least loss(w) + 0.05 · mean|w| among those tried (LoraHub,
    arXiv 2307.13269, sections 2.3 and 3.2). From 0 (the base alone) or equal shares, whichever is
    better, by COBYQA (a trust region of quadratic models) in place of the paper's CMA-ES. `loss` is
    asked `evaluations` times at most, 2 at least. Deterministic."""
    starts = [np.zeros(members), np.full(members, 1 / members)]
    tried: list[tuple[float, float, Weights]] = []

    def value(weights: Weights) -> float:
        if len(tried) >= max(evaluations, len(starts)):
            raise _Enough
        plain = float(loss(weights))
        total = plain + PENALTY * float(np.abs(weights).mean())
        tried.append((total, plain, weights.copy()))
        return total

    best = min(starts, key=value)
    with suppress(_Enough):
        minimize(
            value,
            best,
            method="COBYQA",
            bounds=[(-BOUND, BOUND)] * members,
            options={"initial_tr_radius": 0.5, "maxfev": max(evaluations, 1)},
        )
    _, plain, weights = min(tried, key=lambda one: one[0])
    return Found(np.clip(weights, -BOUND, BOUND), plain, len(tried))
