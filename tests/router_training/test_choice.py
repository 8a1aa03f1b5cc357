"""The family that is chosen: near to the highest mean, and of these the best calibrated."""

from __future__ import annotations

import numpy as np

from composer.routing.families.category import CategorySettings
from router_training.choice import earned_apart, ranking
from router_training.crossfit import Chosen
from tests.router_training.helpers import outcomes as made


def said(name: str, quality: np.ndarray, values: np.ndarray) -> Chosen:
    return Chosen(name, CategorySettings(), quality, quality, values.astype(np.float64), ())


def test_of_those_near_the_highest_the_lowest_brier_score_wins() -> None:
    rng = np.random.default_rng(0)
    right = (rng.random((400, 2)) < 0.6).astype(np.float32)
    table = made(right)
    loud = said("loud", np.where(right == 1, 1.0, 0.9).astype(np.float32), right[:, 0])
    calm = said(
        "calm", (0.2 + 0.6 * right).astype(np.float32), right[:, 0] * (rng.random(400) < 0.999)
    )
    poor = said("poor", right, right[:, 0] * 0.5)  # never wrong about quality, and far behind
    found = ranking([loud, calm, poor], table)
    assert found.best == "calm"
    assert found.near == 2
    assert [row.family for row in found.rows][-1] == "poor"
    assert ranking([loud, poor], table).best == "loud"


def test_each_fold_is_earned_by_who_is_best_on_the_others() -> None:
    table = made(np.ones((4, 2)))
    quality = np.full((4, 2), 0.5, np.float32)
    fold = np.array([0, 0, 1, 1])
    first = said("first", quality, np.array([1, 1, 0, 0]))
    second = said("second", quality, np.array([0, 0, 1, 1]))
    # On fold 1 `second` is better, so it is asked on fold 0, where it earns nothing.
    np.testing.assert_array_equal(earned_apart([first, second], table, fold), np.zeros(4))
