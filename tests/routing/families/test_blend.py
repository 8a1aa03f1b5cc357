"""What the blend does beyond what all families do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from composer.routing.families.blend import Blend, BlendSettings, Member
from composer.routing.families.category import Category
from composer.routing.families.neighbours import Neighbours
from composer.types import FloatArray
from tests.routing.families.world import outcomes_of, world

TWO = BlendSettings(members=(Member(family="neighbours"), Member(family="category")))


def stacked(apart: FloatArray, chance: FloatArray, settings: BlendSettings, **kw: float) -> Blend:
    outcomes = outcomes_of(["q"] * len(chance), chance, seed=99, **kw)  # type: ignore[arg-type]
    return Blend.of([], apart, outcomes, settings)


def test_a_member_that_knows_is_followed_and_one_that_guesses_is_not() -> None:
    rng = np.random.default_rng(0)
    chance = rng.random((3000, 4)).astype(np.float32)
    apart = np.stack([chance, rng.random((3000, 4)).astype(np.float32)])
    for missing in (0.0, 0.5):
        blend = stacked(apart, chance, TWO, missing=missing)
        np.testing.assert_allclose(blend.level, [1, 0], atol=0.15)
        np.testing.assert_allclose(blend.choice, [1, 0], atol=0.15)


def test_members_complete_one_another_in_level_and_choice() -> None:
    rng = np.random.default_rng(0)
    level = rng.uniform(-0.2, 0.2, (3000, 1))
    rest = rng.uniform(-0.25, 0.25, (3000, 4))
    rest -= rest.mean(axis=1, keepdims=True)
    chance = (0.5 + level + rest).astype(np.float32)
    apart = np.stack([0.5 + level + 0 * rest, 0.5 + 2 * rest]).astype(np.float32)
    blend = stacked(apart, chance, TWO)
    np.testing.assert_allclose(blend.level, [1, 0], atol=0.15)
    np.testing.assert_allclose(blend.choice[1], 0.5, atol=0.1)


def test_who_tells_the_best_apart_is_followed_and_not_who_knows_the_weak() -> None:
    rng = np.random.default_rng(0)
    chance = rng.uniform(-0.1, 0.1, (6000, 4)) + np.array([0.8, 0.8, 0.2, 0.2])
    strong, weak = np.array([[1, 1, 0, 0]]), np.array([[0, 0, 1, 1]])
    middle = chance.mean(axis=0)
    apart = np.stack([middle + (chance - middle) * side for side in (strong, weak)])
    near, all_alike = (
        stacked(apart.astype(np.float32), chance.astype(np.float32), closeness)
        for closeness in (TWO, TWO.model_copy(update={"closeness": None}))
    )
    assert near.choice[0] > 0.7
    assert near.choice[1] < 0.3
    assert all_alike.choice.min() > 0.7


def test_where_no_question_was_asked_of_two_all_members_count_the_same() -> None:
    at = world(100)
    only = np.eye(len(at.outcomes.experts), dtype=bool)[np.arange(100) % len(at.outcomes.experts)]
    quality = np.where(only, at.outcomes.quality, np.nan)
    apart = np.stack([at.outcomes.quality, at.outcomes.quality / 2])
    blend = Blend.of([], apart, replace(at.outcomes, quality=quality), TWO)
    np.testing.assert_array_equal(blend.choice, [0.5, 0.5])


def test_predictions_made_elsewhere_serve_as_well() -> None:
    at = world(200)
    fitted = Blend.fit(at.features, at.outcomes, TWO, 0)
    members = [
        Neighbours.fit(at.features, at.outcomes, Neighbours.grid()[0], 0),
        Category.fit(at.features, at.outcomes, Category.grid()[0], 0),
    ]
    apart = np.stack([m.predict(at.features) for m in members])
    blend = Blend.of(members, apart, at.outcomes, TWO)
    assert blend.predict(at.new).shape == fitted.predict(at.new).shape
    restored = Blend.restore(blend.state(), TWO)
    np.testing.assert_array_equal(restored.predict(at.new), blend.predict(at.new))


def test_an_expert_whose_outcomes_lie_in_one_fold() -> None:
    at = world(100)
    quality = at.outcomes.quality.copy()
    quality[1:, 3] = np.nan
    blend = Blend.fit(at.features, replace(at.outcomes, quality=quality), TWO, 0)
    assert np.isfinite(blend.predict(at.new)).all()


def test_bad_members_are_refused() -> None:
    at = world(20)
    with pytest.raises(ValueError, match="no family 'oracle' to blend; choose from category"):
        Blend.fit(at.features, at.outcomes, BlendSettings(members=(Member(family="oracle"),)), 0)
    with pytest.raises(ValidationError, match="a blend has no member; name at least one family"):
        BlendSettings(members=())
    with pytest.raises(ValidationError, match="cannot be a member of a blend"):
        BlendSettings(members=(Member(family="blend"),))
