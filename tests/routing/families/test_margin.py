"""What the margins do on tables of intents, beyond what all families do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import orjson
import pytest

from composer.routing.families.margin import FEWEST, Margin, MarginSettings
from composer.routing.family import predicted
from composer.routing.outcome_calibration import OutcomeCalibration
from composer.routing.outcomes import Outcomes
from composer.routing.scope import Scope
from composer.routing.state import State
from composer.routing.views import Features, Views, rows_of
from tests.router_training.intent_tables import intents
from tests.routing.helpers import WordEmbedder

ENCODE = WordEmbedder().encode


def ready(outcomes: Outcomes, views: Views | None = None) -> tuple[Views, Features]:
    views = views or Views.fit(outcomes.text, ("embedding", "words", "chars"))
    return views, views.transform(outcomes.text, ENCODE)


def fitted(outcomes: Outcomes) -> tuple[Margin, Views]:
    views, features = ready(outcomes)
    return Margin.fit(features, outcomes, MarginSettings(), 0), views


def test_signs_tell_strangers_apart() -> None:
    margin, views = fitted(intents())
    dev = intents(200, 60, seed=5)
    said = predicted(margin, ready(dev, views)[1])
    assert said.signs is not None
    assert said.signs.shape == (260, 7)
    assert np.isfinite(said.signs).all()
    inside = dev.in_scope
    right = said.quality.argmax(axis=1) == dev.quality.argmax(axis=1)
    assert right[inside].mean() > 0.9
    for sign in said.signs.T:  # each is larger where a question is somebody's
        assert np.median(sign[inside]) > np.median(sign[~inside])


def test_signs_restore_to_the_last_bit() -> None:
    margin, views = fitted(intents())
    state = margin.state()
    values = orjson.loads(orjson.dumps(state.values))
    restored = Margin.restore(State(state.arrays, values), MarginSettings())
    features = ready(intents(40, 10, seed=6), views)[1]
    before, after = predicted(margin, features), predicted(restored, features)
    np.testing.assert_array_equal(before.quality, after.quality)
    assert before.signs is not None
    np.testing.assert_array_equal(before.signs, after.signs)
    np.testing.assert_array_equal(before.quality, restored.predict(features))


def test_hardly_any_stranger_is_left_out() -> None:
    few, none = intents(160, FEWEST - 1), intents(160, 0)
    _, features = ready(few)
    margin = Margin.fit(features, few, MarginSettings(), 0)
    assert predicted(margin, features).signs is None
    alone = Margin.fit(rows_of(features, few.in_scope), none, MarginSettings(), 0)
    np.testing.assert_array_equal(margin.predict(features), alone.predict(features))


def test_an_intent_without_a_query_is_never_the_best() -> None:
    outcomes = intents()
    quality = outcomes.quality.copy()
    quality[quality[:, 1] == 1] = 0
    margin, views = fitted(replace(outcomes, quality=quality))
    best = margin.predict(ready(intents(100, 0, seed=7), views)[1]).argmax(axis=1)
    assert not (best == 1).any()


@pytest.mark.parametrize("experts", [1, 2])
def test_strangers_to_few_intents(experts: int) -> None:
    outcomes = intents()
    some = outcomes.of(outcomes.experts[:experts])
    margin, views = fitted(some)
    said = predicted(margin, ready(some, views)[1])
    assert np.isfinite(said.quality).all()
    assert said.quality.shape == (200, experts)


def test_calibrated_quality_is_that_of_being_anybodys_times_ones_own() -> None:
    outcomes = intents(400, 100)
    margin, views = fitted(outcomes)
    apart = intents(400, 100, seed=8)
    said = predicted(margin, ready(apart, views)[1])
    assert said.signs is not None
    fit = OutcomeCalibration.fit(said.quality, apart, shared=True, signs=said.signs)
    assert fit.scope is not None
    quality, deviation = fit.quality(said.quality, said.signs)
    best, inside = quality.max(axis=1), apart.in_scope
    assert best[~inside].mean() < 0.3 < 0.7 < best[inside].mean()
    own = replace(fit, scope=None).quality(said.quality)[0]
    np.testing.assert_array_equal(quality, fit.scope.probability(said.signs)[:, None] * own)
    assert (deviation >= 0).all()
    values = orjson.loads(orjson.dumps(fit.state().values))
    restored = OutcomeCalibration.restore(State(fit.state().arrays, values))
    np.testing.assert_array_equal(quality, restored.quality(said.quality, said.signs)[0])


def test_a_scope_needs_both_kinds() -> None:
    with pytest.raises(ValueError, match="all questions are in scope, or none is"):
        Scope.fit(np.ones((3, 2), np.float32), np.ones(3, np.bool_))
