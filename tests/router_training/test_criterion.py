"""What settings are chosen by: the decisions' quality, within budgets, or over shares of calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_training.criterion import Criterion, need_decisions, over_shares
from router_training.errors import TrainingError
from tests.router_training.helpers import NAN
from tests.router_training.helpers import outcomes as made


@given(st.integers(0, 1000))
def test_over_shares_is_the_mean_over_every_number_of_calls(seed: int) -> None:
    rng = np.random.default_rng(seed)
    quality = rng.integers(0, 2, (12, 2)).astype(np.float32)
    need = rng.permutation(12).astype(np.float32)  # no two alike
    outcomes = replace(made(quality), benchmark=("one",) * 12)
    predicted = np.stack([np.zeros(12, np.float32), need], axis=1)
    order = np.argsort(-need)
    reached = []
    for calls in range(13):
        strongly = np.isin(np.arange(12), order[:calls])
        reached.append(np.where(strongly, quality[:, 1], quality[:, 0]).mean())
    # The straight lines between the points: the ends count half.
    expected = np.trapezoid(reached, dx=1 / 12)
    found = over_shares(predicted, outcomes, 1)
    np.testing.assert_allclose(found.mean(), expected, atol=1e-6)


def test_questions_are_ranked_within_their_benchmark() -> None:
    quality = np.array([[0, 1], [0, 1], [0, 1], [0, 1]], np.float32)
    outcomes = replace(made(quality), benchmark=("easy", "easy", "hard", "hard"))
    predicted = np.array([[0, 0.1], [0, 0.2], [0, 0.8], [0, 0.9]], np.float32)
    np.testing.assert_allclose(over_shares(predicted, outcomes, 1), [0.25, 0.75, 0.25, 0.75])
    tied = np.zeros((4, 2), np.float32)
    np.testing.assert_allclose(over_shares(tied, outcomes, 1), 0.5)


def test_budgets_need_costs() -> None:
    outcomes = made(np.eye(2))
    with pytest.raises(TrainingError, match="budgets need the cost"):
        Criterion(budgets=(1.0,)).values(np.eye(2, dtype=np.float32), outcomes)


def test_a_question_with_one_outcome_says_nothing_of_a_decision() -> None:
    quality = [[1, NAN, NAN], [0, 1, NAN], [NAN, NAN, 0], [1, 0, 0]]
    cost = np.tile(np.array([1, 2, 3], np.float32), (4, 1))
    some = made(quality, cost)
    predicted = np.tile(np.array([0.2, 0.8, 0.1], np.float32), (4, 1))
    np.testing.assert_array_equal(Criterion().values(predicted, some), [NAN, 1, NAN, 0])
    by_budget = Criterion((2.0,), cost).values(predicted, some)
    np.testing.assert_array_equal(by_budget, [NAN, 1, NAN, 0])
    need_decisions(some, "somebody")
    alone = some.rows(np.array([0, 2]))
    assert np.isnan(Criterion().values(predicted[:2], alone)).all()
    with pytest.raises(TrainingError, match="somebody: none of the 2 questions"):
        need_decisions(alone, "somebody")
