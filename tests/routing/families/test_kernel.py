"""What the kernel family does beyond what all families do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.linalg import solve

from composer.routing.families import points
from composer.routing.families.kernel import Kernel, KernelSettings
from composer.routing.views import rows_of
from tests.routing.families.world import EXPERTS, OTHER, OWN, world

PLAIN = KernelSettings(
    ridges=(2.0,), difficulty_ridge=2.0, gamma=1.0, stem=0, words=0, format=0, category=0
)


def test_with_one_ridge_it_is_kernel_ridge_about_the_means() -> None:
    at = world(120)
    x, z, y = at.features["embedding"], at.new["embedding"], at.outcomes.quality
    gram, cross = (np.exp(-(2 - 2 * a @ x.T).astype(np.float64)) for a in (x, z))
    expected = y.mean(axis=0) + cross @ solve(gram + 2 * np.eye(len(x)), y - y.mean(axis=0))
    fitted = Kernel.fit(at.features, at.outcomes, PLAIN, 0)
    np.testing.assert_allclose(fitted.predict(at.new), expected, atol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_filling_in_settles_on_the_fit_of_the_known_outcomes(share: float) -> None:
    x = world(150).features["embedding"]
    rng = np.random.default_rng(0)
    target = rng.standard_normal((150, 2)).astype(np.float32)
    target[rng.random(150) < share, 0] = np.nan
    distance = np.asarray(2 - 2 * x @ x.T, np.float32)
    alpha = points.solved(points.Table(distance, distance, b""), target, 1.0, [2.0])[0]
    known = ~np.isnan(target[:, 0])
    gram = np.exp(-distance.astype(np.float64))
    only = solve(gram[np.ix_(known, known)] + 2 * np.eye(known.sum()), target[known, 0])
    np.testing.assert_allclose(gram @ alpha[:, 0], gram[:, known] @ only, atol=0.02)
    whole = solve(gram + 2 * np.eye(150), target[:, 1])
    np.testing.assert_allclose(alpha[:, 1], whole, atol=1e-3)


def test_fit_all_is_fit_for_each() -> None:
    at = world(150, missing=0.2)
    grid = [*Kernel.grid(), PLAIN, KernelSettings(sharpness=1.0), Kernel.grid()[0]]
    for together, settings in zip(
        Kernel.fit_all(at.features, at.outcomes, grid, 0), grid, strict=True
    ):
        alone = Kernel.fit(at.features, at.outcomes, settings, 0)
        # Not to the last bit: BLAS adds in another order where there are more columns.
        np.testing.assert_allclose(together.predict(at.new), alone.predict(at.new), atol=1e-4)


def test_landmarks_come_near_to_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    at = world(400, missing=0.2)
    exact = Kernel.fit(at.features, at.outcomes, KernelSettings(), 0)
    monkeypatch.setattr(points, "LANDMARKS", 200)
    some = Kernel.fit(at.features, at.outcomes, KernelSettings(exact=100), 0)
    assert len(some.alpha) == 200
    a, b = exact.predict(at.new), some.predict(at.new)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.97
    monkeypatch.setattr(points, "LANDMARKS", 400)
    every = Kernel.fit(at.features, at.outcomes, KernelSettings(exact=100), 0)
    np.testing.assert_allclose(every.predict(at.new), a, atol=5e-3)


def test_much_ridge_leaves_the_means() -> None:
    at = world(100)
    far = KernelSettings(ridges=(1e6,), difficulty_ridge=1e6, prior=None)
    predicted = Kernel.fit(at.features, at.outcomes, far, 0).predict(at.new)
    mean = np.broadcast_to(at.outcomes.quality.mean(axis=0), predicted.shape)
    np.testing.assert_allclose(predicted, mean, atol=1e-3)


def test_much_ridge_leaves_what_each_expert_is_good_at_by_kind() -> None:
    at = world(300)
    far = KernelSettings(ridges=(1e6,), difficulty_ridge=1e6, prior=1.0)
    predicted = Kernel.fit(at.features, at.outcomes, far, 0).predict(at.new)
    np.testing.assert_array_equal(predicted.argmax(axis=1), at.chance.argmax(axis=1))
    above = predicted - at.outcomes.quality.mean(axis=0)
    own = at.chance.argmax(axis=1)
    speciality = (OWN - OTHER) * (1 - 1 / len(EXPERTS))  # over its mean; the difficulty is none
    assert abs(float(above[np.arange(len(own)), own].mean()) - speciality) < 0.08


def test_of_several_ridges_that_which_decides_is_followed() -> None:
    at = world(300)
    useless = KernelSettings(ridges=(1e-3, 1e6), prior=None)
    fitted = Kernel.fit(at.features, at.outcomes, KernelSettings(), 0)
    little = Kernel.fit(at.features, at.outcomes, useless, 0)
    all_noise = Kernel.fit(at.features, at.outcomes, KernelSettings(ridges=(1e-3,), prior=None), 0)
    right = at.chance.argmax(axis=1)
    assert (fitted.predict(at.new).argmax(axis=1) == right).mean() > 0.95
    off, noisy = (
        float(np.square(m.predict(at.new) - at.chance).mean()) for m in (little, all_noise)
    )
    assert off < 0.7 * noisy  # what learns by heart is followed less than as it is


def test_one_expert_a_question_is_enough() -> None:
    at = world(400)
    only = np.eye(len(EXPERTS), dtype=bool)[np.arange(400) % len(EXPERTS)]
    outcomes = replace(at.outcomes, quality=np.where(only, at.outcomes.quality, np.nan))
    predicted = Kernel.fit(at.features, outcomes, KernelSettings(), 0).predict(at.new)
    assert (predicted.argmax(axis=1) == at.chance.argmax(axis=1)).mean() > 0.8


def test_no_ridge_is_refused() -> None:
    with pytest.raises(ValidationError, match="ridges are positive numbers; give at least one"):
        KernelSettings(ridges=())


def test_a_difficulty_ridge_of_its_own_moves_all_experts_alike() -> None:
    at = world(100)
    a, b = (
        Kernel.fit(at.features, at.outcomes, KernelSettings(difficulty_ridge=d), 0).predict(at.new)
        for d in (1.0, 30.0)
    )
    moved = a - b
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1], moved.shape), atol=1e-5)


def test_stems_that_are_the_questions_are_not_kept() -> None:
    at = world(60)
    alike = {**at.features, "stem": at.features["embedding"]}
    fitted = Kernel.fit(alike, at.outcomes, KernelSettings(), 0)
    assert "stem" not in fitted.weights
    fitted = Kernel.fit(alike, at.outcomes, KernelSettings(category=0), 0)
    without = KernelSettings(stem=0, category=0)
    np.testing.assert_allclose(
        fitted.predict(rows_of(at.new, np.arange(9))),
        Kernel.fit(at.features, at.outcomes, without, 0).predict(rows_of(at.new, np.arange(9))),
        atol=1e-5,
    )


def test_no_view_at_all_is_refused() -> None:
    with pytest.raises(ValidationError, match="every view has weight 0; give at least one"):
        KernelSettings(embedding=0, stem=0, words=0, format=0, category=0)
