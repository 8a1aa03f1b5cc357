"""What routers are held against, on outcomes small enough to see through."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from router_training import baselines as base
from tests.router_training.helpers import NAN, outcomes

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

TRAIN = outcomes(
    [[1, 0, 0.5], [1, 0, 0], [0, 1, 0], [0, 1, 1], [0.5, 0.5, 1]],
    [[1, 2, 4]] * 5,
    category=["x", "x", "y", "y", "y"],
)


def test_best_single_of_equals_the_cheapest() -> None:
    assert base.best_single(TRAIN) == 0  # all have 0.5
    assert base.best_single(TRAIN.of(["e2", "e1"])) == 1
    assert base.best_single(outcomes([[0, NAN, 0.5], [1, 0.9, 0.5]])) == 1
    assert base.best_single(outcomes([[NAN, 0.1]])) == 1
    assert base.best_single(outcomes([[1, 1]])) == 0


def test_random_draws_from_the_known() -> None:
    quality, cost = base.random_choice(outcomes([[1, 0], [NAN, 0.5], [NAN, NAN]], [[1, 3]] * 3))
    np.testing.assert_array_equal(quality, [0.5, 0.5, NAN])
    np.testing.assert_array_equal(cost, [2, 3, NAN])


def test_best_by_category_told_which() -> None:
    fitted = base.CategoryBest.fit(TRAIN)
    seen = outcomes(np.ones((3, 3)), category=["x", "y", "z"])
    # y: e1 2.5/3 of e0 .5/3 and e2 2/3; z was never seen: the first of the best over all
    assert fitted.choose(seen).tolist() == [0, 1, 0]
    unknown = outcomes([[1, NAN, 1], [NAN, 1, 1]], category=["y", "x"])
    assert fitted.choose(unknown).tolist() == [2, 2]


def test_oracle_of_equals_the_cheapest() -> None:
    data = outcomes([[1, 1, 0], [0, 0.5, NAN], [1, 1, 1]], [[9, 2, 1], [9, 9, 1], [NAN, 5, 4]])
    assert base.oracle(data).tolist() == [1, 1, 2]
    assert base.oracle(outcomes([[0, 1, 1]])).tolist() == [1]


def test_random_mix_by_hand() -> None:
    data = outcomes([[0, 1, 1, 0], [0.5, 0, 1, 0.75]], [[1, 4, 5, 3], [1, 4, 5, 3]])
    mix = base.random_mix(data)
    assert mix is not None
    # means (1, .25), (4, .5), (5, 1), (3, .375): the two inside lie below the line from 1 to 5
    assert mix.cost.tolist() == [1, 5]
    assert mix.within(3) == pytest.approx(0.625)
    assert base.dearest_cost(data) == 5
    assert base.random_mix(outcomes([[1, 0]])) is None
    assert base.random_mix(outcomes([[1, NAN]], [[1, 1]])) is None
    assert base.dearest_cost(outcomes([[1, 0]], [[1, NAN]])) is None


@settings(deadline=None)
@given(quality=hnp.arrays(np.float64, (12, 3), elements=st.sampled_from([0, 0.5, 1])))
def test_in_their_order(quality: Array) -> None:
    """On what they were fitted on: random ≤ best single ≤ best by category ≤ oracle."""
    data = outcomes(quality, category=list("aabbccaabbcc"))
    means = [
        base.random_choice(data)[0].mean(),
        base.single(data, base.best_single(data))[0].mean(),
        base.chosen_by(data, base.CategoryBest.fit(data).choose(data))[0].mean(),
        base.chosen_by(data, base.oracle(data))[0].mean(),
    ]
    assert all(a <= b + 1e-9 for a, b in pairwise(means))


def test_equals_that_costs_do_not_tell_apart_share_a_question() -> None:
    unpriced = outcomes([[1, 1, 0], [1, 0, 0]])
    assert base.oracle_shares(unpriced).tolist() == [0.75, 0.25, 0]
    priced = outcomes([[1, 1, 0], [1, 1, 1]], [[9, 2, 1], [5, 5, 7]])
    assert base.oracle_shares(priced).tolist() == [0.25, 0.75, 0]
