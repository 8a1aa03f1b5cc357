"""One card per router in the words of `evaluate --json`; what is not known is null."""

from __future__ import annotations

import json

import numpy as np
import pytest

from router_training.scorecard import Yardstick, baseline_cards, scorecard
from tests.router_training.helpers import NAN, outcomes

KEYS = {
    "avg_acc", "per_benchmark", "mean_cost", "gain_at_best", "gap_closed", "aiq", "apgr", "cpt50",
    "cpt80", "brier", "brier_base_rate", "ece", "budget_acc", "ci95",
}  # fmt: skip

QUALITY = np.array([[1, 0], [0, 1], [0, 1], [0, 1]])
COST = np.array([[1, 10]] * 4)
PREDICTED = np.array([[0.9, 0.2], [0.1, 0.8], [0.3, 0.6], [0.6, 0.5]])


def test_a_priced_pair() -> None:
    data = outcomes(QUALITY, COST, benchmark=["m", "m", "n", "n"])
    card = scorecard(data, Yardstick.fit(data), PREDICTED, expected_cost=COST)
    assert set(card) >= KEYS
    json.dumps(card, allow_nan=False)
    assert card["avg_acc"] == 0.75  # the last goes to the wrong one
    assert card["per_benchmark"] == {"m": 1.0, "n": 0.5}
    assert card["mean_of_benchmarks"] == 0.75
    assert card["mean_cost"] == 5.5
    assert card["gain_at_best"] == 0
    assert card["gap_closed"] == 0  # best single .75, oracle 1
    assert card["budget_acc"]["0.05"] is None
    # the points are (1, .25), (3.25, .5), (5.5, .75), and the best single costs 10
    assert card["budget_acc"]["0.10"] == pytest.approx(0.25)
    assert card["budget_acc"]["0.25"] == pytest.approx(0.25 + 0.25 * 1.5 / 2.25)
    assert card["budget_acc"]["0.50"] == pytest.approx(0.5 + 0.25 * 1.75 / 2.25)
    area = 2.25 * (0.375 + 0.625) + 4.5 * 0.75
    assert card["aiq"] == pytest.approx(area / 10)
    # the likeliest to need it gains 1 of 4 questions, half of the mean gap of .5
    assert card["cpt50"] == pytest.approx(0.25)
    assert card["brier"] == pytest.approx(np.mean((PREDICTED - QUALITY) ** 2))
    assert card["brier_base_rate"] == pytest.approx(0.25 * 0.75)
    low, high = card["ci95"]
    assert 0 <= low < 0.75 < high <= 1


def test_without_prices_nothing_is_said_of_cost() -> None:
    data = outcomes(np.c_[QUALITY, QUALITY[:, :1]])
    card = scorecard(data, Yardstick.fit(data), np.c_[PREDICTED, [0.0] * 4], expected_cost=None)
    json.dumps(card, allow_nan=False)
    for key in ("mean_cost", "aiq", "budget_acc", "arena_score", "apgr", "cpt50", "cpt80"):
        assert card[key] is None, key
    assert card["avg_acc"] == 0.75


def test_missing_outcomes_are_not_chosen_and_empty_questions_left_out() -> None:
    data = outcomes([[1, 0, NAN], [NAN, NAN, NAN], [0, NAN, 1], [NAN, 1, NAN]])
    told = np.array([[0.1, 0.9, 1], [0.5, 0.5, 0.5], [0.2, 1, 0.9], [0.3, 0.7, 1]])
    card = scorecard(data, Yardstick.fit(data), told)
    # the last question has one outcome: nothing was decided there, and quality was foretold
    assert card["avg_acc"] == 0.5
    assert card["brier"] == pytest.approx((0.81 + 0.81 + 0.04 + 0.01 + 0.09) / 5)
    # of the best expert one outcome is not known, so neither is what is gained over it
    assert card["gain_at_best"] is None
    assert card["gap_closed"] is None


def test_without_a_decision_to_judge_there_is_no_figure_of_one() -> None:
    data = outcomes([[1, NAN], [NAN, 0], [0, NAN]], COST[:3])
    yardstick = Yardstick.fit(data)
    card = scorecard(data, yardstick, PREDICTED[:3], expected_cost=COST[:3])
    json.dumps(card, allow_nan=False)
    known = {"brier", "brier_base_rate", "ece"}
    assert card.pop("per_benchmark") == {}
    assert {key for key, value in card.items() if value is not None} == known
    assert card["brier"] == pytest.approx((0.01 + 0.64 + 0.09) / 3)
    for name, baseline in baseline_cards(data, yardstick).items():
        if name == "random_mix":
            assert baseline is None
        else:
            assert baseline["avg_acc"] is None
            assert baseline["ci95"] is None
            assert baseline["gap_closed"] is None


def test_baselines() -> None:
    data = outcomes(QUALITY, COST, category=["a", "b", "b", "b"])
    cards = baseline_cards(data, Yardstick.fit(data))
    json.dumps(cards, allow_nan=False)
    assert list(cards) == ["random", "best_single", "category_best", "oracle", "random_mix"]
    accuracy = {name: card["avg_acc"] for name, card in cards.items()}
    assert accuracy == {
        "random": 0.5, "best_single": 0.75, "category_best": 1, "oracle": 1, "random_mix": 0.75,
    }  # fmt: skip
    assert cards["best_single"]["expert"] == "e1"
    assert cards["random_mix"]["budget_acc"]["0.50"] == pytest.approx(0.25 + 4 / 9 * 0.5)
    assert baseline_cards(outcomes(QUALITY), Yardstick.fit(data))["random_mix"] is None


def test_other_experts_are_refused() -> None:
    data = outcomes(QUALITY)
    with pytest.raises(ValueError, match="the experts differ"):
        scorecard(data.of(["e1", "e0"]), Yardstick.fit(data), PREDICTED)
    with pytest.raises(ValueError, match="no question has a known outcome"):
        baseline_cards(outcomes([[NAN, NAN]]), Yardstick.fit(data))
