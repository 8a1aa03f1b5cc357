"""Raw predictions to calibrated quality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from composer.routing.outcome_calibration import OutcomeCalibration
from composer.routing.outcomes import Outcomes
from composer.types import FloatArray
from tests.routing.families.world import outcomes_of


def drawn(
    n: int, *, seed: int = 0, missing: float = 0.0
) -> tuple[FloatArray, FloatArray, Outcomes]:
    """Raw predictions that are too sure for all and too high for expert 1; the true chances."""
    rng = np.random.default_rng(seed)
    logit = rng.standard_normal((n, 3))
    chance = (1 / (1 + np.exp(-logit))).astype(np.float32)
    raw = 1 / (1 + np.exp(-2 * logit - np.array([0.0, 1.5, 0.0])))
    return raw.astype(np.float32), chance, outcomes_of(["q"] * n, chance, seed=99, missing=missing)


def brier(quality: FloatArray, chance: FloatArray) -> float:
    return float(((quality - chance) ** 2).mean())


@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_finds_the_true_chances(missing: float) -> None:
    raw, chance, outcomes = drawn(3000, missing=missing)
    quality, uncertainty = OutcomeCalibration.fit(raw, outcomes).quality(raw)
    assert quality.dtype == uncertainty.dtype == np.float32
    assert brier(quality, chance) < 0.1 * brier(raw, chance)
    # The deviation says how far off it is: within three of them nearly always.
    assert (np.abs(quality - chance) < 3 * uncertainty + 0.02).mean() > 0.9


def test_few_outcomes_follow_all_experts_together() -> None:
    raw, chance, outcomes = drawn(2000, seed=1)
    quality = outcomes.quality.copy()
    quality[5:, 2] = np.nan  # five outcomes of this expert
    few = OutcomeCalibration.fit(raw, replace(outcomes, quality=quality))
    calibrated, uncertainty = few.quality(raw)
    assert brier(calibrated[:, 2], chance[:, 2]) < brier(raw[:, 2], chance[:, 2])
    assert uncertainty[:, 2].mean() > 2 * uncertainty[:, 0].mean()


def test_order_within_an_expert_is_kept() -> None:
    raw, _, outcomes = drawn(500)
    backwards = OutcomeCalibration.fit(1 - raw, outcomes)
    quality, _ = backwards.quality(np.linspace(0, 1, 50, dtype=np.float32)[:, None].repeat(3, 1))
    assert (np.diff(quality, axis=0) >= 0).all()


def test_restores_to_the_last_bit() -> None:
    raw, _, outcomes = drawn(200)
    fitted = OutcomeCalibration.fit(raw, outcomes)
    restored = OutcomeCalibration.restore(fitted.state())
    for before, after in zip(fitted.quality(raw), restored.quality(raw), strict=True):
        np.testing.assert_array_equal(before, after)


def test_predictions_outside_0_and_1_and_none_at_all() -> None:
    raw, _, outcomes = drawn(200)
    raw[:20] = np.nan
    raw[20], raw[21] = -3, 4
    quality, uncertainty = OutcomeCalibration.fit(raw, outcomes).quality(raw[20:])
    assert np.isfinite(quality).all()
    assert np.isfinite(uncertainty).all()
    assert ((quality > 0) & (quality < 1)).all()
    with pytest.raises(ValueError, match="no outcome with a prediction to calibrate on; give some"):
        OutcomeCalibration.fit(np.full_like(raw, np.nan), outcomes)
    with pytest.raises(ValueError, match=r"shape \(200, 2\) for outcomes of shape \(200, 3\)"):
        OutcomeCalibration.fit(raw[:, :2], outcomes)
