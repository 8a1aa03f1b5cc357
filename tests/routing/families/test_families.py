"""What every family keeps to, whatever its method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import orjson
import pytest
from pydantic import ValidationError

from composer.routing.families import FAMILIES
from composer.routing.family import Family, State
from composer.routing.views import Features, rows_of
from tests.routing.families.world import EXPERTS, OTHER, OWN, World, encode, outcomes_of, world

CASES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("neighbours", {}),
    ("neighbours", {"prior": 5.0, "view": "stem", "temperature": None}),
    ("clusters", {"k": 8}),
    ("predictor", {"penalty": 3.0}),
    ("predictor", {"kind": "mlp", "rank": 8, "penalty": 5.0}),
    ("predictor", {"kind": "mf", "rank": 8, "penalty": 2.0}),
    ("predictor", {"kind": "irt", "rank": 8, "penalty": 2.0}),
    ("kernel", {}),
    ("kernel", {"category": 0.0, "words": 0.0, "difficulty_ridge": 3.0}),
    ("kernel", {"prior": None, "ridges": (3.0,)}),
    ("category", {}),
    ("category", {"classifier": "neighbours", "kinds": "likeliest", "unsure": 0.05}),
    ("skills", {}),
    ("skills", {"overall": True, "prior": 0.0, "sharpness": None, "nearest": 1}),
    ("margin", {}),
    ("margin", {"cost": 0.1, "embedding": 3.0}),
    ("blend", {"folds": 3, "members": [{"family": "neighbours"}, {"family": "category"}]}),
)

families = pytest.mark.parametrize(
    ("name", "changes"), CASES, ids=[f"{n}-{'-'.join(c) or 'default'}" for n, c in CASES]
)


@cache
def known_world(missing: float = 0.0) -> World:
    return world(missing=missing)


def fit(name: str, changes: Mapping[str, Any], at: World, seed: int = 0) -> Family:
    family = FAMILIES[name]
    settings = family.settings.model_validate(changes)
    return family.fit(at.features, at.outcomes, settings, seed)


def chosen_chance(predicted: np.ndarray, chance: np.ndarray) -> float:
    """True mean quality of asking the best predicted expert."""
    return float(chance[np.arange(len(chance)), predicted.argmax(axis=1)].mean())


def test_every_family_is_tested() -> None:
    assert {name for name, _ in CASES} == set(FAMILIES)


@families
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_finds_who_masters_what(name: str, changes: Mapping[str, Any], missing: float) -> None:
    at = known_world(missing)
    predicted = fit(name, changes, at).predict(at.new)
    assert predicted.shape == at.chance.shape
    assert predicted.dtype == np.float32
    assert np.isfinite(predicted).all()
    single = float(at.chance.mean(axis=0).max())
    assert chosen_chance(predicted, at.chance) > single + 0.6 * (OWN - single)
    mean = np.nanmean(at.outcomes.quality, axis=0)
    assert ((predicted - at.chance) ** 2).mean() < 0.8 * ((mean - at.chance) ** 2).mean()


@families
def test_restores_to_the_last_bit(name: str, changes: Mapping[str, Any]) -> None:
    at = known_world(0.4)
    fitted = fit(name, changes, at)
    state = fitted.state()
    # What an artefact keeps: contiguous arrays that safetensors takes, and JSON.
    values = orjson.loads(orjson.dumps(state.values))
    arrays = {n: np.ascontiguousarray(a).copy() for n, a in state.arrays.items()}
    assert {a.dtype for a in arrays.values()} <= {
        np.dtype(t) for t in ("float32", "float16", "int32", "int64", "uint8")
    }
    settings = FAMILIES[name].settings.model_validate(changes)
    restored = FAMILIES[name].restore(State(arrays, values), settings)
    np.testing.assert_array_equal(restored.predict(at.new), fitted.predict(at.new))


@families
def test_same_seed_same_fit(name: str, changes: Mapping[str, Any]) -> None:
    at = known_world()
    once, again = (fit(name, changes, at, seed=7).predict(at.new) for _ in range(2))
    np.testing.assert_array_equal(once, again)


@families
def test_predicts_one_query_as_among_many(name: str, changes: Mapping[str, Any]) -> None:
    at = known_world()
    fitted = fit(name, changes, at)
    alone = np.vstack([fitted.predict(rows_of(at.new, np.array([i]))) for i in range(5)])
    np.testing.assert_allclose(alone, fitted.predict(at.new)[:5], atol=1e-4)


@families
def test_reads_no_more_views_than_it_says(name: str, changes: Mapping[str, Any]) -> None:
    at = known_world()
    settings = FAMILIES[name].settings.model_validate(changes)
    views = FAMILIES[name].views(settings)
    some: Features = {view: rows for view, rows in at.features.items() if view in views}
    fitted = FAMILIES[name].fit(some, at.outcomes, settings, 0)
    new: Features = {view: rows for view, rows in at.new.items() if view in views}
    np.testing.assert_array_equal(fitted.predict(new), fit(name, changes, at).predict(at.new))


@families
def test_rows_without_any_outcome_change_nothing(name: str, changes: Mapping[str, Any]) -> None:
    at = known_world()
    quality = at.outcomes.quality.copy()
    quality[:100] = np.nan
    silent = replace(at, outcomes=replace(at.outcomes, quality=quality))
    later = np.arange(100, len(at.outcomes))
    short = replace(at, features=rows_of(at.features, later), outcomes=at.outcomes.rows(later))
    np.testing.assert_allclose(
        fit(name, changes, silent).predict(at.new),
        fit(name, changes, short).predict(at.new),
        atol=1e-5,
    )


@families
def test_one_expert_is_scored(name: str, changes: Mapping[str, Any]) -> None:
    at = known_world()
    alone = replace(at, outcomes=at.outcomes.of(EXPERTS[:1]))
    predicted = fit(name, changes, alone).predict(at.new)
    own = at.chance[:, 0] == np.float32(OWN)
    assert predicted.shape == (len(at.chance), 1)
    assert predicted[own].mean() > predicted[~own].mean() + 0.4 * (OWN - OTHER)


@families
def test_one_question_teaches_the_mean_or_is_refused(name: str, changes: Mapping[str, Any]) -> None:
    at = known_world()
    one = replace(
        at, features=rows_of(at.features, np.array([3])), outcomes=at.outcomes.rows(np.array([3]))
    )
    if name == "blend":
        with pytest.raises(ValueError, match="at least two different questions; give more"):
            fit(name, changes, one)
        return
    predicted = fit(name, changes, one).predict(at.new)
    np.testing.assert_allclose(
        predicted, np.broadcast_to(one.outcomes.quality, predicted.shape), atol=0.05
    )


@families
def test_an_expert_without_outcomes_is_named(name: str, changes: Mapping[str, Any]) -> None:
    at = known_world()
    quality = at.outcomes.quality.copy()
    quality[:, 2] = np.nan
    with pytest.raises(ValueError, match=r"'expert of engines' has no outcome .*; collect some"):
        fit(name, changes, replace(at, outcomes=replace(at.outcomes, quality=quality)))


@families
def test_features_of_other_questions_are_refused(name: str, changes: Mapping[str, Any]) -> None:
    at = known_world()
    with pytest.raises(ValueError, match="200 rows of features for 300 questions"):
        fit(name, changes, replace(at, features=at.new))


@families
def test_strange_queries_get_sane_numbers(name: str, changes: Mapping[str, Any]) -> None:
    at = known_world()
    strange = at.views.transform(["", "zzz qqq 北京", "A.\nB.", "x" * 50_000], encode)
    predicted = fit(name, changes, at).predict(strange)
    assert np.isfinite(predicted).all()
    assert (np.abs(predicted - 0.5) < 1).all()


@families
def test_the_grid_begins_with_the_default(name: str, changes: Mapping[str, Any]) -> None:
    family = FAMILIES[name]
    grid = family.grid()
    assert grid[0] == family.settings()
    assert len({s.model_dump_json() for s in grid}) == len(grid)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_wrong_setting_is_named(name: str) -> None:
    with pytest.raises(ValidationError, match="nonsense"):
        FAMILIES[name].settings.model_validate({"nonsense": 1})


def test_outcomes_may_be_fractions() -> None:
    at = known_world()
    soft = replace(at.outcomes, quality=at.outcomes.quality * 0.5 + 0.25)
    for name, changes in CASES:
        predicted = fit(name, changes, replace(at, outcomes=soft)).predict(at.new)
        assert chosen_chance(predicted, at.chance) > 0.7, name


def test_where_nobody_names_a_category_clusters_serve() -> None:
    at = world(400)
    nameless = replace(
        at.outcomes, category=("",) * len(at.outcomes), benchmark=("",) * len(at.outcomes)
    )
    for name in ("category", "kernel"):
        predicted = fit(name, {}, replace(at, outcomes=nameless)).predict(at.new)
        assert chosen_chance(predicted, at.chance) > 0.7, name


def test_outcomes_of_the_world_are_as_told() -> None:
    chance = np.full((4000, 2), 0.25, np.float32)
    outcomes = outcomes_of(["q"] * 4000, chance, missing=0.5)
    assert abs(float(np.nanmean(outcomes.quality)) - 0.25) < 0.03
    assert abs(float(outcomes.known.mean()) - 0.5) < 0.03
