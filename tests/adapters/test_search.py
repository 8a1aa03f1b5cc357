"""Weights by search: near the least loss, within bounds, no more questions than allowed."""

from __future__ import annotations

import numpy as np
import pytest

from composer.adapters.merging.search import BOUND, PENALTY, Weights, search


@pytest.mark.parametrize("want", [(0.7, -0.4, 0.2), (1.0, 0.0, 0.0), (0.3, 0.3, 0.4)])
def test_it_finds_the_least_loss_with_its_penalty(want: tuple[float, ...]) -> None:
    target = np.array(want)

    def loss(weights: Weights) -> float:
        return float(np.square(weights - target).sum())

    found = search(loss, 3, evaluations=120)
    # Of (w − t)² + c/3·|w|, each weight's own minimum is t drawn towards 0 by c/6.
    best = np.sign(target) * np.maximum(np.abs(target) - PENALTY / 6, 0)
    assert found.weights == pytest.approx(best, abs=0.02)
    assert found.loss == pytest.approx(loss(found.weights))
    assert found.evaluations <= 120


def test_weights_stay_within_their_bounds_and_the_allowed_evaluations() -> None:
    asked = []

    def loss(weights: Weights) -> float:
        asked.append(weights.copy())
        return float(-weights.sum())

    found = search(loss, 2, evaluations=30)
    assert len(asked) == found.evaluations <= 30
    assert np.abs(np.array(asked)).max() <= BOUND + 1e-9
    assert found.weights == pytest.approx([BOUND, BOUND], abs=1e-3)
    again = search(loss, 2, evaluations=30)
    assert np.array_equal(again.weights, found.weights)


@pytest.mark.parametrize("evaluations", [0, 1, 2])
def test_with_two_evaluations_or_fewer_the_better_start_is_kept(evaluations: int) -> None:
    found = search(lambda w: float(np.abs(w - 0.5).sum()), 2, evaluations=evaluations)
    assert found.evaluations == 2
    assert found.weights.tolist() == [0.5, 0.5]
