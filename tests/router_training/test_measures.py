"""Each measure against a figure worked out by hand, and None where something is missing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from router_training import measures
from tests.router_training.helpers import NAN, outcomes

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def test_two_means() -> None:
    quality, names = np.array([1, 1, 1, 0]), ["a", "a", "a", "b"]
    assert measures.avg_acc(quality) == 0.75
    assert measures.per_benchmark(quality, names) == {"a": 1.0, "b": 0.0}
    assert measures.mean_of_benchmarks(quality, names) == 0.5
    unknown = np.array([1, NAN, 1, 0])
    assert measures.avg_acc(unknown) is None
    assert measures.per_benchmark(unknown, names) == {"a": None, "b": 0.0}
    assert measures.mean_of_benchmarks(unknown, names) is None
    assert measures.avg_acc(np.array([])) is None


def test_earned() -> None:
    assert measures.earned(np.array([[1.0, 2], [3, 4]]), np.array([1, 0])).tolist() == [2, 3]


def test_gains_and_gaps() -> None:
    assert measures.gain_at_best(0.66, 0.6) == pytest.approx(0.1)
    assert measures.gap_at_oracle(0.66, 0.88) == pytest.approx(0.25)
    assert measures.gap_closed(0.7, 0.6, 0.8) == pytest.approx(0.5)
    assert measures.gap_closed(0.5, 0.6, 0.8) == pytest.approx(-0.5)
    assert measures.gap_closed(0.6, 0.6, 0.6) is None
    assert measures.gain_at_best(None, 0.6) is measures.gain_at_best(0.6, 0.0) is None
    assert measures.gap_at_oracle(0.6, None) is measures.gap_closed(0.6, None, 0.8) is None


def test_arena_score() -> None:
    # $0.2 a question is the dear end: nothing for cheapness. The cheap end: C = 1
    assert measures.arena_score(0.8, 0.2) == 0
    assert measures.arena_score(0.8, 4.4e-6) == pytest.approx(1.1 * 0.8 / (0.08 + 1))
    middle = (200 * 0.0044) ** 0.5 / 1000  # C = 1/2
    assert measures.arena_score(0.8, middle) == pytest.approx(1.1 * 0.4 / (0.08 + 0.5))
    assert measures.arena_score(0.8, 0.0) == measures.arena_score(0.8, 4.4e-6)
    assert measures.arena_score(0.0, 9.0) == 0
    assert measures.arena_score(None, 1.0) is measures.arena_score(0.5, None) is None


def test_brier_over_known_outcomes() -> None:
    data = outcomes([[1, 0.5], [0, NAN]])
    predicted = np.array([[0.8, 0.5], [0.4, 0.9]])
    assert measures.brier(predicted, data) == pytest.approx((0.04 + 0 + 0.16) / 3)
    np.testing.assert_array_equal(measures.base_rates(data), [0.5, 0.5])
    assert measures.brier(measures.base_rates(data), data) == pytest.approx((0.25 + 0 + 0.25) / 3)
    assert measures.brier(np.array([[NAN, 0.5], [0.4, 0.9]]), data) is None
    assert np.isnan(measures.base_rates(outcomes([[1, NAN]]))).tolist() == [False, True]


def test_ece_by_hand() -> None:
    # two bins: predictions .2 and .4 of outcomes 0 and 1, and .5 of outcome 0 (edges belong above)
    data = outcomes([[0, 1, 0]])
    found = measures.reliability(np.array([[0.2, 0.4, 0.5]]), data, bins=2)
    assert found is not None
    assert found.pairs.tolist() == [2, 1]
    np.testing.assert_allclose(found.predicted, [0.3, 0.5])
    np.testing.assert_allclose(found.quality, [0.5, 0])
    expected = 2 / 3 * 0.2 + 1 / 3 * 0.5
    assert measures.ece(np.array([[0.2, 0.4, 0.5]]), data, bins=2) == pytest.approx(expected)
    assert measures.ece(np.array([[0.2, NAN, 0.5]]), data) is None
    assert measures.ece(np.array([[1.0, 1, 1]]), outcomes([[1, 1, 1]])) == 0


@settings(deadline=None)
@given(
    quality=hnp.arrays(np.float64, (30, 2), elements=st.sampled_from([0.0, 1.0])),
    bins=st.integers(1, 20),
)
def test_base_rates_of_the_same_questions_are_calibrated(quality: Array, bins: int) -> None:
    data = outcomes(quality)
    rates = measures.base_rates(data)
    assert measures.ece(rates, data, bins) == pytest.approx(0, abs=1e-6)
    best, moved = measures.brier(rates, data), measures.brier(rates + 0.1, data)
    assert best is not None
    assert moved == pytest.approx(best + 0.01)


def test_selective_by_hand() -> None:
    quality, confidence = np.array([1, 1, 0, 0.5, 0]), np.array([0.9, 0.8, 0.8, 0.8, 0.1])
    assert measures.selective(quality, confidence, 1.0) == pytest.approx(0.5)
    assert measures.selective(quality, confidence, 0.8) == pytest.approx(2.5 / 4)
    assert measures.selective(quality, confidence, 0.6) == pytest.approx((1 + 2 * 0.5) / 3)
    assert measures.selective(quality, confidence, 0.5) == pytest.approx((1 + 2 * 0.5) / 3)
    assert measures.selective(quality, confidence, 0.0) == 1
    assert measures.selective(quality, np.array([NAN] * 5), 0.5) is None
    assert measures.selective(np.array([]), np.array([]), 0.5) is None


@settings(deadline=None)
@given(st.data())
def test_selective_does_not_depend_on_the_order(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 20))
    quality = data.draw(hnp.arrays(np.float64, n, elements=st.sampled_from([0, 0.5, 1])))
    confidence = data.draw(hnp.arrays(np.float64, n, elements=st.sampled_from([0, 0.5, 1])))
    coverage = data.draw(st.floats(0, 1))
    order = np.array(data.draw(st.permutations(range(n))))
    assert measures.selective(quality[order], confidence[order], coverage) == pytest.approx(
        measures.selective(quality, confidence, coverage)
    )
    assert measures.selective(quality, np.zeros(n), coverage) == pytest.approx(quality.mean())


def test_auroc_by_hand() -> None:
    positive = np.array([True, True, False, False])
    # pairs: .9 > .5, .9 > .1, .5 = .5, .5 > .1
    assert measures.auroc(np.array([0.9, 0.5, 0.5, 0.1]), positive) == pytest.approx(3.5 / 4)
    assert measures.auroc(np.array([1.0, 2.0]), np.array([True, True])) is None
    assert measures.auroc(np.array([1.0, NAN]), np.array([True, False])) is None
