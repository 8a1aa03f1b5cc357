"""The tolerance benchmark on a small made-up table: what its runs choose, count and compare."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.tolerance import TOLERANCES, Outcomes, Setting, arrivals, described, device, run

NAMES = ("gemma-7b", "mathstral-7B", "Yi-6b-Chat")
QUESTIONS = 40


@pytest.fixture(scope="module")
def setting() -> Setting:
    """A different best model every few questions; all are within 0.5 of each other."""
    rng = np.random.default_rng(0)
    quality = (0.4 + 0.5 * rng.random((QUESTIONS, 3))).astype(np.float32)
    score = (rng.random((QUESTIONS, 3)) < quality).astype(np.float64)
    tokens = rng.uniform(50, 150, (QUESTIONS, 3))
    outcomes = Outcomes([f"question {i}" for i in range(QUESTIONS)], score, tokens)
    return arrivals(device(NAMES, tokens), quality, outcomes, room=1, rho=0.3, rounds=3)


def test_without_tolerance_everybody_gets_the_best(setting: Setting) -> None:
    found = run(setting, 0.0)
    assert found.chosen.tolist() == setting.quality.argmax(axis=1)[setting.asked].tolist()
    assert not found.changed.any()
    assert found.result.swaps >= 3


def test_with_all_tolerance_a_resident_keeps_all_that_come(setting: Setting) -> None:
    """Only calls that came while nothing was resident, at the start and during a swap, can ask for
    another model."""
    found, plain = run(setting, 1.0, patience=1.0), run(setting, 0.0, patience=1.0)
    favourite = setting.quality.argmax(axis=1)[setting.asked]
    assert np.diff(found.chosen).astype(bool).sum() < np.diff(plain.chosen).astype(bool).sum() / 2
    assert (found.changed == (found.chosen != favourite)).all()


def test_what_is_given_up_stays_within_the_tolerance(setting: Setting) -> None:
    best = setting.quality.max(axis=1)[setting.asked]
    for tolerance in TOLERANCES:
        got = setting.quality[setting.asked, run(setting, tolerance).chosen]
        assert (best - got).max() <= tolerance + 1e-6


def test_rows_compare_the_same_calls(setting: Setting) -> None:
    runs = [run(setting, tolerance) for tolerance in TOLERANCES]
    rows = described(setting, runs, room=1)
    assert [row["tolerance"] for row in rows] == list(TOLERANCES)
    recorded = setting.outcomes.score[setting.asked, runs[-1].chosen].mean()
    assert rows[-1]["quality"] == pytest.approx(recorded)
    assert rows[-1]["against_0"] == pytest.approx(rows[-1]["quality"] - rows[0]["quality"])
    assert rows[-1]["low"] <= rows[-1]["against_0"] <= rows[-1]["high"]
    assert rows[0]["against_0"] is None
    assert rows[0]["swap_s_share"] == 1
