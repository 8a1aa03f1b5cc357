"""The classifiers of kinds, and what is done where they are unsure."""

from __future__ import annotations

import numpy as np
import pytest

from composer.routing.families.category import Category, CategorySettings
from composer.routing.families.near_labels import NearLabels
from composer.routing.state import State, packed
from tests.routing.families.world import world

AT = world()


def test_the_kinds_of_the_nearest_count() -> None:
    angles = np.array([0.0, 0.1, 0.2, 1.4, 1.5])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    near = NearLabels.fit({"embedding": rows}, ["a", "a", "b", "b", ""], 3)
    assert near.names == ("a", "b")
    assert len(near.rows) == 4  # what nobody named teaches nothing
    posterior = near.posterior({"embedding": rows[[0, 4]]})
    np.testing.assert_allclose(posterior, [[2 / 3, 1 / 3], [1 / 3, 2 / 3]], atol=1e-6)
    # Of the first question the nearest three others are one "a" and two "b".
    np.testing.assert_allclose(near.of_others()[0], [1 / 3, 2 / 3], atol=1e-6)
    with pytest.raises(ValueError, match="name some"):
        NearLabels.fit({"embedding": rows}, [""] * 5, 3)


@pytest.mark.parametrize("classifier", ["logistic", "neighbours"])
def test_the_more_are_unsure_the_more_have_the_means(classifier: str) -> None:
    shares = []
    for unsure in (0.0, 0.3, 0.99):
        settings = CategorySettings.model_validate(
            {"classifier": classifier, "k": 150, "kinds": "likeliest", "unsure": unsure}
        )
        fitted = Category.fit(AT.features, AT.outcomes, settings, 0)
        said = fitted.predict(AT.new)
        shares.append(float((said == fitted.mean).all(axis=1).mean()))
    assert shares[0] == 0
    assert shares[0] < shares[2]
    assert shares[1] <= shares[2]


def test_the_likeliest_kind_alone_counts_as_published() -> None:
    fitted = Category.fit(AT.features, AT.outcomes, CategorySettings(kinds="likeliest"), 0)
    best = fitted.labels.posterior(AT.new).argmax(axis=1)
    np.testing.assert_array_equal(fitted.predict(AT.new), fitted.rates[best])


def test_what_was_kept_before_there_was_a_bound_is_restored() -> None:
    fitted = Category.fit(AT.features, AT.outcomes, CategorySettings(), 0)
    old = packed({"labels": fitted.labels.state(), "category": State({"rates": fitted.rates}, {})})
    again = Category.restore(old, CategorySettings())
    np.testing.assert_array_equal(again.predict(AT.new), fitted.predict(AT.new))
