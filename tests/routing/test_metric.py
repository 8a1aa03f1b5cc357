"""The learnt metric: the identity where there is nothing to learn, else better than cosine."""

from __future__ import annotations

import numpy as np
import pytest

from composer.routing.metric import apply_metric, fit_metric
from tests.routing.helpers import clustered, unit


def test_one_row_each_gives_exactly_the_cosine() -> None:
    rows, _ = clustered([1] * 10)
    w = fit_metric(rows, np.arange(10), strength=1.0, seed=0)
    assert np.array_equal(w, np.eye(rows.shape[1]))
    assert apply_metric(rows, w) == pytest.approx(rows, abs=1e-6)


def test_one_expert_gives_exactly_the_cosine() -> None:
    rows, _ = clustered([50])
    w = fit_metric(rows, np.zeros(50, np.int64), strength=1.0, seed=0)
    assert np.array_equal(w, np.eye(rows.shape[1]))


def test_no_strength_gives_exactly_the_cosine() -> None:
    rows, _ = clustered([9] * 5)
    w = fit_metric(rows, np.repeat(np.arange(5), 9), strength=0.0, seed=0)
    assert np.array_equal(w, np.eye(rows.shape[1]))


@pytest.mark.parametrize("identical", [True, False])
def test_experts_with_the_same_texts(identical: bool) -> None:
    """Nothing tells them apart; the metric must stay finite all the same."""
    rows, _ = clustered([6])
    rows = np.repeat(rows[:1], 6, axis=0) if identical else rows
    w = fit_metric(np.concatenate([rows, rows]), np.repeat([0, 1], 6), strength=1.0, seed=0)
    assert np.isfinite(w).all()


def test_more_rows_depart_further_from_the_cosine() -> None:
    departures = []
    for n in (3, 30, 300):
        rows, _ = clustered([n] * 5)
        w = fit_metric(rows, np.repeat(np.arange(5), n), strength=0.5, seed=0)
        departures.append(np.linalg.norm(w - np.eye(len(w))))
    assert departures == sorted(departures)


def test_directions_that_vary_within_experts_count_for_less() -> None:
    """Experts differ in a few directions; in the others their rows vary a lot, all alike."""
    rng = np.random.default_rng(0)
    d, n_experts, n = 24, 12, 40
    centres = np.zeros((n_experts, d))
    centres[:, :4] = rng.standard_normal((n_experts, 4))
    scale = np.r_[np.full(4, 0.35), np.full(d - 4, 0.8)]

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        owner = np.repeat(np.arange(n_experts), n)
        return unit(centres[owner] + rng.standard_normal((len(owner), d)) * scale), owner

    rows, owner = draw(n)
    asked, expected = draw(50)
    w = fit_metric(rows, owner, strength=1.0, seed=0)

    def accuracy(x: np.ndarray, y: np.ndarray) -> float:
        return float((owner[(x @ y.T).argmax(axis=1)] == expected).mean())

    plain = accuracy(asked, rows)
    learnt = accuracy(apply_metric(asked, w), apply_metric(rows, w))
    assert learnt > plain + 0.05
    assert np.allclose(w, w.T, atol=1e-4)


def test_the_seed_decides() -> None:
    rows, _ = clustered([20] * 6)
    owner = np.repeat(np.arange(6), 20)
    first, again = (fit_metric(rows, owner, strength=0.5, seed=4) for _ in range(2))
    assert np.array_equal(first, again)
