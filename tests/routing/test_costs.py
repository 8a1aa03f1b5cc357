"""Expected costs: what is seen in the query, and no more than that."""

from __future__ import annotations

import numpy as np
import pytest

from composer.routing.costs import RANGE, CostModel
from composer.routing.outcomes import Outcomes
from composer.routing.views import Features

RNG = np.random.default_rng(1)


def features(n: int) -> Features:
    x = RNG.normal(size=(n, 12)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return {"embedding": x, "format": RNG.normal(size=(n, 3)).astype(np.float32)}


def outcomes(cost: np.ndarray) -> Outcomes:
    n, n_experts = cost.shape
    return Outcomes(
        experts=tuple(f"e{i}" for i in range(n_experts)),
        text=tuple(str(i) for i in range(n)),
        quality=np.ones_like(cost),
        cost=cost,
        category=("",) * n,
        benchmark=("",) * n,
        group=np.arange(n),
    )


def true_cost(given: Features) -> np.ndarray:
    ratio = 1 + 0.2 * given["format"][:, 0] + 0.5 * given["embedding"][:, 1]
    noisy = ratio[:, None] * np.array([1e-5, 2e-3]) * RNG.gamma(4, 0.25, (len(ratio), 2))
    return np.asarray(np.maximum(noisy, 0), np.float32)


def test_lengths_that_show_in_the_query_are_seen() -> None:
    seen, asked = features(2000), features(500)
    model = CostModel.fit(seen, outcomes(true_cost(seen)))
    truth = true_cost(asked)
    left = truth - model.predict(asked)
    explained = 1 - left.var(axis=0) / truth.var(axis=0)
    assert (explained > 0.1).all()
    assert np.abs(left.mean(axis=0)) / truth.mean(axis=0) == pytest.approx(0, abs=0.05)


def test_what_does_not_show_is_the_mean() -> None:
    seen, asked = features(400), features(200)
    cost = (np.array([1e-4, 1e-2]) * RNG.gamma(2, 0.5, (400, 2))).astype(np.float32)
    model = CostModel.fit(seen, outcomes(cost))
    ratio = model.predict(asked) / cost.mean(axis=0)
    assert ratio.std() < 0.15


def test_never_below_nothing() -> None:
    seen = features(300)
    model = CostModel.fit(seen, outcomes(true_cost(seen)))
    far = {"embedding": 100 * seen["embedding"], "format": -100 * seen["format"]}
    ratio = model.predict(far) / model.mean
    assert ratio.min() >= RANGE[0] * 0.999
    assert ratio.max() <= RANGE[1] * 1.001


def test_missing_costs_are_left_out() -> None:
    seen = features(1500)
    whole = true_cost(seen)
    holes = whole.copy()
    holes[RNG.random(holes.shape) < 0.3] = np.nan
    model, part = CostModel.fit(seen, outcomes(whole)), CostModel.fit(seen, outcomes(holes))
    np.testing.assert_allclose(part.mean, model.mean, rtol=0.1)
    assert np.corrcoef(model.predict(seen)[:, 0], part.predict(seen)[:, 0])[0, 1] > 0.8


def test_free_experts_stay_free() -> None:
    seen = features(50)
    cost = np.zeros((50, 2), np.float32)
    cost[:, 1] = 0.5
    model = CostModel.fit(seen, outcomes(cost))
    np.testing.assert_allclose(model.predict(seen), cost, rtol=1e-3)


def test_an_expert_without_any_cost() -> None:
    cost = np.full((9, 2), np.nan, np.float32)
    cost[:, 0] = 1
    with pytest.raises(ValueError, match="expert 'e1' has no cost; give prices for all"):
        CostModel.fit(features(9), outcomes(cost))


def test_restored_it_predicts_the_same() -> None:
    seen = features(80)
    model = CostModel.fit(seen, outcomes(true_cost(seen)))
    again = CostModel.restore(model.state())
    np.testing.assert_array_equal(again.predict(seen), model.predict(seen))
