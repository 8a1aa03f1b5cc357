"""The curve: its promises hold on questions that nobody had seen."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from router_training.knob import ASKED, curve_of, kept_promises
from router_training.train import train
from tests.router_training.helpers import outcomes
from tests.router_training.synthetic import stamp, table
from tests.routing.helpers import WordEmbedder


def test_promises_hold_on_held_out_questions() -> None:
    encode = WordEmbedder().encode
    model = train(table(600), "category", encode, stamp())
    curve = model.manifest.curve
    assert curve is not None
    held_out = table(3000, seed=4)
    scored = model.score(held_out.text, encode)
    assert scored.cost is not None
    best = int(np.argmax([e.quality for e in model.manifest.experts]))
    kept = kept_promises(curve, scored.quality, scored.cost, held_out, best)
    assert kept is not None
    for share, promise in zip(ASKED, kept, strict=True):
        assert promise["within_interval"], promise
        assert promise["promised"] >= share * curve.best_single - 1e-6
        assert promise["achieved_cost"] == pytest.approx(promise["promised_cost"], rel=0.25)
    costs = [promise["achieved_cost"] for promise in kept]
    assert costs == sorted(costs)
    assert costs[0] < 0.6 * curve.best_single_cost


def test_the_curve_runs_from_quality_alone_to_the_cheapest() -> None:
    rng = np.random.default_rng(0)
    cost = np.tile(np.array([[1.0, 0.1]]), (50, 1))
    both = outcomes(np.stack([np.ones(50), rng.random(50) < 0.4], axis=1), cost)
    predicted = np.stack([np.full(50, 0.9), rng.uniform(0.1, 0.8, 50)], axis=1)
    curve = curve_of(predicted, cost, both, 0)
    assert curve is not None
    first, last = curve.points[0], curve.points[-1]
    assert (first.weight, first.quality) == (0.0, 1.0)
    assert (first.cost, last.cost) == (pytest.approx(1.0), pytest.approx(0.1))
    assert (curve.best_single, curve.best_single_cost) == (1.0, pytest.approx(1.0))
    assert all(a.cost > b.cost for a, b in pairwise(curve.points))  # no point decides as another
    assert all(p.low <= p.quality <= p.high for p in curve.points)
    assert all(p.cost_low <= p.cost <= p.cost_high for p in curve.points)


def test_without_costs_there_is_none() -> None:
    free = outcomes([[1, 0], [0, 1]])
    assert curve_of(free.quality, None, free, 0) is None
    assert curve_of(free.quality, free.quality, free, 0) is None


def test_the_curve_is_of_questions_with_a_choice() -> None:
    quality, cost = np.array([[1.0, 0.0], [1.0, 1.0]] * 20), np.tile([[1.0, 0.1]], (40, 1))
    predicted = np.tile([[0.9, 0.5]], (40, 1))
    both = outcomes(quality, cost)
    once = outcomes(np.vstack([quality, [[0, np.nan]] * 30]), np.vstack([cost, cost[:30]]))
    wider = [np.vstack([a, a[:30]]) for a in (predicted, cost)]
    assert curve_of(*wider, once, 0, seed=1) == curve_of(predicted, cost, both, 0, seed=1)
    alone = once.rows(np.arange(40, 70))
    assert curve_of(wider[0][40:], wider[1][40:], alone, 0) is None
    curve = curve_of(predicted, cost, both, 0)
    assert curve is not None
    assert kept_promises(curve, wider[0][40:], wider[1][40:], alone, 0) is None
