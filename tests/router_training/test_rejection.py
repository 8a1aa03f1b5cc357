"""What is nobody's is told apart, turned away at the threshold, and reported."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.routing.families import FAMILIES
from composer.routing.family import decided
from router_training.compare import compare
from router_training.comparison import markdown
from router_training.errors import TrainingError
from router_training.published import PUBLISHED
from router_training.rejection import auroc_interval, rejectable, scope_card, threshold_of
from router_training.suited import grid_of, suited
from router_training.train import train
from tests.router_training.helpers import outcomes as made
from tests.router_training.intent_tables import INTENTS, intents
from tests.router_training.synthetic import stamp, table
from tests.routing.helpers import WordEmbedder

ENCODE = WordEmbedder().encode


def ends_well(
    t: float, p: np.ndarray, right: np.ndarray, inside: np.ndarray, share: float
) -> float:
    kept = p >= t
    found = (~kept[~inside]).mean()
    return float((1 - share) * (right & kept)[inside].mean() + share * found)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.2, 0.5]))
def test_no_threshold_ends_better(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    p = np.round(rng.random(40), 1)  # with ties
    inside = np.arange(40) < rng.integers(1, 40)
    right = inside & (rng.random(40) < 0.8)
    best = ends_well(threshold_of(p, right, inside, share), p, right, inside, share)
    for t in np.linspace(0, 1, 200):
        assert ends_well(float(t), p, right, inside, share) <= best + 1e-9


def test_the_card_of_rejection() -> None:
    data = made([[1, 0], [0, 1], [1, 0], [0, 0], [0, 0]])
    confidence = np.array([0.9, 0.8, 0.3, 0.4, 0.1])
    chosen = np.array([0, 0, 0, 1, 1])
    card = scope_card(data, confidence, chosen, 0.35)
    assert card is not None
    json.dumps(card, allow_nan=False)
    assert card["in_scope_acc"] == pytest.approx(2 / 3)
    assert card["auroc"] == pytest.approx(5 / 6)
    assert card["overall_acc"] == pytest.approx(2 / 5)  # the first, and the last turned away
    assert card["in_scope_kept_acc"] == pytest.approx(1 / 3)
    assert card["out_of_scope_found"] == 0.5
    low, high = card["auroc_ci95"]
    assert 0 <= low <= card["auroc"] <= high <= 1
    without = scope_card(data, confidence, chosen, None)
    assert without is not None
    assert without["auroc"] == card["auroc"]
    assert without["overall_acc"] is None


def test_only_intents_with_strangers_are_to_be_turned_away() -> None:
    ordinary = made([[1, 1], [0, 1], [0, 0], [1, 0]])
    assert not ordinary.of_intents
    assert scope_card(ordinary, np.ones(4), np.zeros(4, int), 0.5) is None
    assert rejectable(intents(20, 5))
    assert not rejectable(intents(20, 0))
    assert intents(20, 0).of_intents
    assert not table(50).of_intents
    assert not made([[1.0, np.nan], [0, 1]]).of_intents


def test_the_interval_of_a_clear_case_is_narrow() -> None:
    rng = np.random.default_rng(0)
    inside = np.arange(400) < 300
    low, high = auroc_interval(rng.normal(size=400) + 3 * inside, inside, np.arange(400))
    assert 0.95 < low < high <= 1


def test_the_interval_of_auroc_draws_groups() -> None:
    """Each question told four times knows no more than told once; taken for four it would seem
    to, and the interval would be half as wide."""
    rng = np.random.default_rng(0)
    inside = np.arange(120) < 80
    confidence = rng.normal(size=120) + 0.7 * inside
    group = np.arange(120)
    once = auroc_interval(confidence, inside, group)
    told = [np.repeat(values, 4) for values in (confidence, inside, group)]
    assert auroc_interval(*told) == pytest.approx(once)
    low, high = auroc_interval(told[0], told[1], np.arange(480))
    assert high - low < 0.65 * (once[1] - once[0])


def test_which_families_are_for_which_table() -> None:
    asked = ["neighbours", "kernel", "category", "margin", "foo"]
    kept, left = suited(intents(20, 5), asked)
    assert kept == ["neighbours", "kernel", "margin", "foo"]
    assert "each question is one expert's alone" in left["category"]
    kept, left = suited(table(50), asked)
    assert kept == ["neighbours", "kernel", "category", "foo"]
    assert "made for tables of intents" in left["margin"]


@pytest.mark.parametrize("family", ["margin", "neighbours"])
def test_strangers_are_told_apart_on_questions_not_seen(family: str) -> None:
    dev = intents(200, 60, seed=3)
    model = train(intents(), family, ENCODE, stamp(), dev=dev)
    card = model.manifest.metrics["dev"]["scope"]
    json.dumps(card, allow_nan=False)
    assert card["threshold"] == model.manifest.metrics["threshold"]
    assert card["auroc"] > 0.6
    if family == "margin":
        assert card["in_scope_acc"] > 0.9
        assert card["auroc"] > 0.9
        assert card["overall_acc"] > 0.9
        quality = model.score(dev.text, ENCODE).quality
        inside = dev.in_scope
        best = quality[np.arange(len(dev)), decided(quality, dev.known)]
        assert best[inside].mean() > best[~inside].mean() + 0.5


def test_a_comparison_has_a_table_of_rejection() -> None:
    few = ("neighbours", "margin", "category")
    c = compare("bank", "all", intents(), intents(60, 20, seed=3), ENCODE, stamp(), families=few)
    assert [m.name for m in c.methods][:2] == ["neighbours", "margin"]
    assert "category" not in {m.name for m in c.methods}
    assert {PUBLISHED[m.name].family for m in c.methods[2:]} <= {"neighbours", "kernel"}
    text = markdown([c])
    assert "| router | in scope, % (95 %) | AUROC (95 %) |" in text
    assert "None" not in text


def test_with_hardly_a_stranger_there_is_nothing_to_learn_of_them() -> None:
    model = train(intents(160, 3), "margin", ENCODE, stamp())
    assert model.calibration.scope is None
    assert np.isfinite(model.score(["rain or a loan"], ENCODE).quality).all()


def test_best_leaves_out_what_is_not_for_intents_and_says_so() -> None:
    model = train(intents(80, 20), "best", ENCODE, stamp())
    choice = model.manifest.metrics["choice"]
    assert set(choice["families"]) == {"neighbours", "kernel", "margin"}
    assert set(choice["left_out"]) >= {"category", "blend", "clusters", "predictor"}
    assert model.experts == INTENTS


def test_a_family_may_have_settings_for_intents() -> None:
    kernel = FAMILIES["kernel"]
    assert list(grid_of(kernel, table(50))) == list(kernel.grid())
    assert all(settings.chars > 0 for settings in grid_of(kernel, intents(20, 5)))  # type: ignore[attr-defined]


def test_one_intent_alone_is_refused() -> None:
    with pytest.raises(TrainingError, match="nothing to choose from"):
        train(intents(40, 0).of(INTENTS[:1]), "margin", ENCODE, stamp())
