"""Probabilities from similarities: margins, monotony, and agreement with what happens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from composer.routing.calibrate import SIBLINGS, Calibration, evidence, margins
from composer.types import FloatArray

similarities = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 8)),
    elements=st.floats(-1, 1, width=32),
)


def world(n: int = 4000, n_experts: int = 6, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """Similarities (n, E) of queries, the right expert's drawn higher, and which is right."""
    rng = np.random.default_rng(seed)
    similarity = rng.normal(0.2, 0.1, (n, n_experts)).astype(np.float32)
    own = rng.integers(n_experts, size=n)
    right = np.zeros((n, n_experts), np.bool_)
    right[np.arange(n), own] = True
    similarity[right] = rng.normal(0.5, 0.15, n)
    return similarity, right


@given(similarity=similarities)
def test_margins_by_definition(similarity: FloatArray) -> None:
    found = margins(similarity)
    for q, e in np.ndindex(similarity.shape):
        others = np.delete(similarity[q], e)
        expected = similarity[q, e] - others.max() if len(others) else np.inf
        assert found[q, e] == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(similarity=similarities, raised=st.integers(0, 7), by=st.floats(0, 1))
def test_quality_is_a_probability_and_never_falls_with_similarity(
    similarity: FloatArray, raised: int, by: float
) -> None:
    for calibration in (Calibration.fit([], unseen_share=0.2), fitted()):
        quality, deviation = calibration.quality(similarity)
        assert quality.shape == deviation.shape == similarity.shape
        assert ((quality >= 0) & (quality <= 1)).all()
        assert (deviation >= 0).all()
        assert np.isfinite(deviation).all()
        order = np.argsort(-similarity, axis=1, kind="stable")
        assert (np.diff(np.take_along_axis(quality, order, axis=1), axis=1) <= 1e-6).all()
        e = raised % similarity.shape[1]
        higher = similarity.copy()
        higher[:, e] += np.float32(by)
        assert (calibration.quality(higher)[0][:, e] >= quality[:, e] - 1e-6).all()


def fitted() -> Calibration:
    return Calibration.fit([evidence(*world(300))], unseen_share=0.2)


def test_quality_is_what_happens() -> None:
    calibration = Calibration.fit([evidence(*world())], unseen_share=0.0)
    similarity, right = world(seed=1)
    quality = calibration.quality(similarity)[0]
    best = quality.argmax(axis=1)[:, None]
    p = np.take_along_axis(quality, best, axis=1)[:, 0]
    hit = np.take_along_axis(right, best, axis=1)[:, 0]
    for part in np.array_split(np.argsort(p), 5):
        assert p[part].mean() == pytest.approx(hit[part].mean(), abs=0.05)


def test_queries_like_no_expert_get_low_quality() -> None:
    similarity, right = world()
    calibration = Calibration.fit([evidence(similarity, right)], unseen_share=0.5)
    unseen = similarity[~right].reshape(len(similarity), -1)
    known = calibration.quality(similarity)[0].max(axis=1)
    assert np.median(calibration.quality(unseen)[0].max(axis=1)) < 0.2 < 0.8 < np.median(known)


def test_a_clear_margin_does_not_make_up_for_a_low_similarity() -> None:
    quality = fitted().quality(np.array([[0.10, -0.9, -0.9, -0.9]], np.float32))[0]
    assert quality.max() < 0.1


def test_evidence_takes_own_experts_and_siblings_away() -> None:
    n_experts = 2 * SIBLINGS
    similarity = np.linspace(1, 0, n_experts, dtype=np.float32)[None]
    right = np.zeros((1, n_experts), np.bool_)
    right[0, [0, 2]] = True
    found = evidence(similarity, right)
    assert found.seen == pytest.approx([1.0])
    # 0 and 2 are its own; of the others 1 and 3 are the nearest, one in SIBLINGS.
    assert found.unseen == pytest.approx([similarity[0, 4]])
    assert found.right.sum() == 2


def test_one_expert_is_no_evidence_of_unseen_queries() -> None:
    found = evidence(np.array([[0.7]], np.float32), np.ones((1, 1), np.bool_))
    assert len(found.unseen) == 0
    prior = Calibration.fit([], unseen_share=0.2)
    assert np.array_equal(Calibration.fit([found], unseen_share=0.2).seen.b, prior.seen.b)


def test_more_rows_leave_less_uncertainty() -> None:
    similarity = np.array([[0.45, 0.3]], np.float32)
    deviations = [
        Calibration.fit([evidence(*world(n))] if n else [], unseen_share=0.2)
        .quality(similarity)[1]
        .max()
        for n in (0, 100, 4000)
    ]
    assert deviations == sorted(deviations, reverse=True)
