"""Training: what is shipped scores as what was trained, is chosen honestly, and says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.routing.artefact import ArtefactError
from composer.routing.families import FAMILIES
from composer.routing.family import decided
from composer.routing.model import LearnedModel
from router_training import load_router
from router_training.errors import TrainingError
from router_training.measures import earned
from router_training.train import train
from tests.router_training.helpers import logged
from tests.router_training.synthetic import EXPERTS, stamp, table
from tests.routing.helpers import WordEmbedder

ENCODE = WordEmbedder().encode

pytestmark = pytest.mark.usefixtures("short_grids")


def trained(router: str = "category", n: int = 300, **changes: Any) -> LearnedModel:
    return train(table(n), router, ENCODE, stamp(), **changes)


@pytest.mark.parametrize("router", FAMILIES)
def test_what_is_loaded_scores_as_what_was_trained_to_the_last_bit(
    router: str, tmp_path: Path
) -> None:
    model = trained(router, 120)
    model.artefact().save(tmp_path / "router")
    loaded = load_router(tmp_path / "router", WordEmbedder())
    texts = [*table(30, seed=9).text, "", "an unknown wording of nothing"]
    before, after = model.score(texts, ENCODE), loaded.score(texts)
    assert loaded.experts == EXPERTS
    np.testing.assert_array_equal(before.quality, after.quality)
    np.testing.assert_array_equal(before.uncertainty, after.uncertainty)
    assert before.cost is not None
    assert after.cost is not None
    np.testing.assert_array_equal(before.cost, after.cost)
    assert np.isfinite(after.quality).all()
    assert (after.cost > 0).all()


@pytest.mark.parametrize("router", ["category", "kernel", "neighbours"])
def test_it_finds_who_is_good_at_what(router: str) -> None:
    held_out = table(600, seed=5)
    quality = trained(router).score(held_out.text, ENCODE).quality
    got = earned(held_out.quality, decided(quality, held_out.known)).mean()
    best_single = held_out.quality.mean(axis=0).max()
    assert got > best_single + 0.15


def test_metrics_are_plain_and_dev_changes_nothing_else() -> None:
    alone, beside = trained(), trained(dev=table(120, seed=3))
    texts = table(20, seed=8).text
    np.testing.assert_array_equal(
        alone.score(texts, ENCODE).quality, beside.score(texts, ENCODE).quality
    )
    metrics = beside.manifest.metrics
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert "dev" not in alone.manifest.metrics
    assert metrics["dev"]["avg_acc"] > metrics["dev"]["mean_of_benchmarks"] - 1e-9
    assert metrics["cross_fitted"]["brier"] < metrics["cross_fitted"]["brier_base_rate"]
    assert [p["asked"] for p in metrics["dev_promises"]] == [0.8, 0.9, 0.95, 1.0]
    assert len(metrics["settings_tried"]) == len(FAMILIES["category"].grid())


def test_without_prices_there_is_no_curve_and_no_budget() -> None:
    outcomes = table(priced=False)
    model = train(outcomes, "category", ENCODE, stamp())
    assert model.costs is None
    assert model.manifest.curve is None
    assert model.score(["hello"], ENCODE).cost is None
    assert model.manifest.experts[0].cost is None
    card = model.manifest.metrics["cross_fitted"]
    assert card["mean_cost"] is None
    assert card["aiq"] is None
    assert card["budget_acc"] is None
    with pytest.raises(TrainingError, match="budgets need the cost of every outcome"):
        train(outcomes, "category", ENCODE, stamp(), budgets=[0.5])


def test_missing_outcomes_and_repeated_questions() -> None:
    outcomes = table(200, missing=0.4)
    twice = replace(
        outcomes,
        text=outcomes.text[:100] * 2,
        group=np.concatenate([outcomes.group[:100]] * 2),
    )
    for some in (outcomes, twice):
        model = train(some, "category", ENCODE, stamp())
        assert np.isfinite(model.score(some.text, ENCODE).quality).all()


@pytest.mark.parametrize("router", ["neighbours", "blend"])
def test_a_log_of_single_outcomes_is_fitted_on_and_judges_no_decision(router: str) -> None:
    log = logged(table(300))
    model = train(log, router, ENCODE, stamp(), dev=logged(table(90, seed=3)))
    metrics = model.manifest.metrics
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics["settings_tried"] == []
    assert "no decision can be judged" in metrics["note"]
    assert model.manifest.curve is None
    for card in (metrics["cross_fitted"], metrics["dev"]):
        assert card["avg_acc"] is None
        assert card["budget_acc"] is None
        assert card["brier"] < card["brier_base_rate"]
    held_out = table(600, seed=5)
    chosen = model.score(held_out.text, ENCODE).quality.argmax(axis=1)
    assert earned(held_out.quality, chosen).mean() > held_out.quality.mean(axis=0).max() + 0.05
    if router == "neighbours":
        default = FAMILIES[router].grid()[0].model_dump(mode="json")
        assert model.manifest.settings == default


def test_single_outcomes_decide_nothing_beside_whole_ones() -> None:
    whole, log = table(150), logged(table(150, seed=7))
    both = replace(
        whole,
        text=whole.text + log.text,
        quality=np.vstack([whole.quality, log.quality]),
        cost=np.vstack([whole.cost, log.cost]),
        category=whole.category + log.category,
        benchmark=whole.benchmark + log.benchmark,
        group=np.arange(300),
    )
    model = train(both, "neighbours", ENCODE, stamp())
    assert "note" not in model.manifest.metrics
    reached = model.manifest.metrics["cross_fitted"]["avg_acc"]
    assert reached * 150 == pytest.approx(round(reached * 150), abs=1e-6)  # 150 whole answers
    assert model.manifest.curve is not None
    assert model.manifest.curve.best_single == pytest.approx(whole.quality.mean(axis=0).max())


def test_what_needs_decisions_refuses_a_log_of_single_outcomes() -> None:
    log = logged(table(60))
    for router, budgets, said in (("best", (), "'best'"), ("neighbours", (0.5,), "budgets")):
        with pytest.raises(TrainingError, match=f"{said}: none of the 60 .*training collect"):
            train(log, router, ENCODE, stamp(), budgets=budgets)


def test_best_is_the_one_that_cross_validation_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: FAMILIES[name] for name in ("neighbours", "category")}
    monkeypatch.setattr("router_training.train.FAMILIES", few)
    model = trained("best")
    choice = model.manifest.metrics["choice"]
    rows = choice["families"]
    assert rows.keys() == few.keys()
    values = [row["value"] for row in rows.values()]
    assert values == sorted(values, reverse=True)
    assert next(iter(rows.values()))["behind"] == 0
    near = {name for name, row in rows.items() if row["behind"] <= row["standard_error"]}
    assert model.manifest.family == min(near, key=lambda name: rows[name]["brier"])
    assert choice["why"].startswith(f"{model.manifest.family}: the ")
    assert "cross-fitted mean quality of its decisions" in choice["why"]


def test_budgets_decide_if_asked() -> None:
    model = trained("neighbours", budgets=(0.2, 0.5))
    assert model.manifest.metrics["budgets"] == [0.2, 0.5]
    tried = model.manifest.metrics["settings_tried"]
    # Within half of the best single's cost nobody reaches what quality alone would.
    assert max(t["value"] for t in tried) < model.manifest.metrics["cross_fitted"]["avg_acc"]
    with pytest.raises(TrainingError, match="no budget can be kept"):
        trained("neighbours", budgets=(0.001,))


def test_what_cannot_be_trained_on_says_why() -> None:
    with pytest.raises(TrainingError, match="there is no router 'foo'; choose from neighbours"):
        trained("foo")
    outcomes = table(40)
    silent = outcomes.quality.copy()
    silent[:, 1] = np.nan
    with pytest.raises(TrainingError, match="no outcome is known of poems; collect some"):
        train(replace(outcomes, quality=silent), "category", ENCODE, stamp())
    with pytest.raises(TrainingError, match="there is 1 expert and nothing to choose from"):
        train(outcomes.of(["poems"]), "category", ENCODE, stamp())
    with pytest.raises(TrainingError, match="to judge on have no outcomes of algebra"):
        trained(dev=outcomes.of(["poems", "cheap"]))
    same = replace(outcomes, group=np.zeros(40, np.int64))
    with pytest.raises(TrainingError, match="1 different questions cannot be cross-validated"):
        train(same, "category", ENCODE, stamp())


def test_another_embedder_is_refused(tmp_path: Path) -> None:
    trained().artefact().save(tmp_path / "router")
    other = WordEmbedder()
    other.digest = "other"
    with pytest.raises(ArtefactError, match="was trained on vectors of words"):
        load_router(tmp_path / "router", other)


def test_the_same_seed_makes_the_same_artefact() -> None:
    one, other = (trained("clusters").artefact() for _ in range(2))
    assert one.manifest == other.manifest
    for part, state in one.states.items():
        for name, array in state.arrays.items():
            np.testing.assert_array_equal(array, other.states[part].arrays[name])


def test_what_is_no_list_of_texts_is_refused(tmp_path: Path) -> None:
    trained("category", 60).artefact().save(tmp_path / "router")
    loaded = load_router(tmp_path / "router", WordEmbedder())
    nothing = loaded.score([])
    assert nothing.cost is not None
    for part in (nothing.quality, nothing.uncertainty, nothing.cost):
        assert part.shape == (0, len(loaded.experts))
    with pytest.raises(TypeError, match="one bare str; give a list of texts"):
        loaded.score("single string")
    with pytest.raises(TypeError, match="got NoneType at 1; give a list of texts"):
        loaded.score(["a", None])  # type: ignore[list-item]
