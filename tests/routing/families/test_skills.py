"""The formulas of Symbolic-MoE by hand, and what is ours around them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from composer.routing.calibrate import by_rank
from composer.routing.families.skills import (
    Skills,
    SkillsSettings,
    assigned_often,
    nearest_weights,
    overall_scores,
    shifted,
    skills_of,
)
from composer.routing.outcomes import Outcomes
from composer.types import FloatArray
from tests.routing.families.world import world

PUBLISHED = SkillsSettings(nearest=1, sharpness=None, prior=0, overall=True, trim=0, least=1)
ALGEBRA, POETRY = np.eye(2, dtype=np.float32)


def of(*right: tuple[float, ...], skills: list[tuple[str, ...]]) -> Outcomes:
    """A row of outcomes for each question, and the skills it asks for."""
    quality = np.array(right, np.float32)
    n = len(quality)
    return Outcomes(
        experts=tuple("abc"[: quality.shape[1]]),
        text=tuple(f"question {i}" for i in range(n)),
        quality=quality,
        cost=np.full_like(quality, np.nan),
        category=("",) * n,
        benchmark=("",) * n,
        group=np.arange(n),
        skills=tuple(skills),
    )


SMALL = of(
    (1, 1, 0), (1, 0, 0), (0, 1, 0), skills=[("algebra",), ("algebra",), ("poetry", "algebra")]
)
"""P: algebra (1, 1, −3), poetry (−1, 1, −1); S = (0, 2, −4)."""

ROWS = {"embedding": np.stack([ALGEBRA, ALGEBRA, POETRY])}


def fit(settings: SkillsSettings, outcomes: Outcomes = SMALL) -> Skills:
    return Skills.fit(ROWS, outcomes, settings, 0)


def test_a_profile_is_what_was_right_less_what_was_wrong() -> None:
    fitted = fit(PUBLISHED)
    assert fitted.names == ("algebra", "poetry")
    np.testing.assert_array_equal(fitted.profile, [[1, -1], [1, 1], [-3, -1]])
    np.testing.assert_array_equal(fitted.count, [[3, 1]] * 3)
    np.testing.assert_allclose(fitted.centres, [np.array([2, 1]) / np.sqrt(5), POETRY], atol=1e-6)


def test_what_is_missing_is_neither_right_nor_wrong() -> None:
    gone = replace(SMALL, quality=np.array([[1, np.nan, 0], [1, 0, 0], [0, 1, 0]], np.float32))
    fitted = fit(PUBLISHED, gone)
    np.testing.assert_array_equal(fitted.profile[1], [0, 1])
    np.testing.assert_array_equal(fitted.count[1], [2, 1])


def test_global_scores_by_hand() -> None:
    total = shifted(np.array([0.0, 2.0, -4.0]))
    np.testing.assert_array_equal(total, [5, 7, 1])
    np.testing.assert_allclose(overall_scores(total), np.array([25, 49, 1]) / 75)
    np.testing.assert_array_equal(shifted(np.array([2.0, 3.0])), [2, 3])  # already positive


def test_the_order_is_that_of_local_times_global_scores() -> None:
    made = replace(
        fit(PUBLISHED),
        profile=np.array([[2, -4], [1, 5], [-1, -1]], np.float32),
        count=np.full((3, 2), 5, np.float32),
        mean=np.full(3, 0.5, np.float32),
    )
    asked = np.array([[1, 0]], np.float32)
    # l = (.4, .2, −.2), S = (−2, 6, −2), shifted (1, 9, 1), so that b is chosen, then a; c, which
    # is not positive, comes last. The qualities are those of l.
    np.testing.assert_allclose(made.predict_skills(asked), [[0.6, 0.7, 0.4]], atol=1e-6)
    alone = replace(made, chosen=PUBLISHED.model_copy(update={"overall": False}))
    np.testing.assert_allclose(alone.predict_skills(asked), [[0.7, 0.6, 0.4]], atol=1e-6)


def test_chances_are_local_times_global_scores_of_the_positive() -> None:
    made = replace(
        fit(PUBLISHED),
        profile=np.array([[2, -4], [1, 5], [-1, -1]], np.float32),
        count=np.full((3, 2), 5, np.float32),
    )
    asked = np.array([[1, 0], [0, 1]], np.float32)
    # S shifted = (1, 9, 1); L = (2, 1, −1) at the first skill, (−4, 5, −1) at the second.
    np.testing.assert_allclose(made.chances(asked), [[2 / 83, 81 / 83, 0], [0, 1, 0]], rtol=1e-5)
    local = replace(made, chosen=PUBLISHED.model_copy(update={"overall": False}))
    np.testing.assert_allclose(local.chances(asked), [[2 / 3, 1 / 3, 0], [0, 1, 0]], rtol=1e-5)
    trimmed = replace(local, kept=np.array([True, False, True]))
    np.testing.assert_allclose(trimmed.chances(asked[:1]), [[1, 0, 0]])
    # At the second skill nobody who is kept is positive: a and c are as good overall, a is first.
    np.testing.assert_allclose(trimmed.chances(asked[1:]).sum(), 1)


def test_where_nobody_is_positive_the_best_overall_is_certain() -> None:
    made = replace(
        fit(PUBLISHED),
        profile=np.array([[-1, 4], [-2, 5], [-3, 1]], np.float32),
        count=np.full((3, 2), 5, np.float32),
    )
    np.testing.assert_array_equal(made.chances(np.array([[1, 0]], np.float32)), [[1, 0, 0]])


def test_skills_that_somebody_else_inferred_count_the_same() -> None:
    np.testing.assert_array_equal(fit(PUBLISHED).weights_of([1]), [[0, 1]])
    np.testing.assert_array_equal(fit(PUBLISHED).weights_of([0, 1]), [[1, 1]])
    soft = fit(SkillsSettings(least=1)).weights_of([0, 1])
    np.testing.assert_array_equal(soft, [[0.5, 0.5]])


def test_made_up_skills_have_no_names() -> None:
    assert Skills.named(("cluster analysis", "cluster 3"))
    assert not Skills.named(("cluster 3", "cluster 14"))
    assert not Skills.named(("any",))


def test_several_skills_add_up() -> None:
    both = fit(PUBLISHED).predict_skills(np.array([[1, 1]], np.float32))
    # L = (0, 2, −4) of 4 outcomes each.
    np.testing.assert_allclose(both, [[0.5, 0.75, 0]], atol=1e-6)


def test_where_nobody_has_a_positive_score_the_best_overall_is_first() -> None:
    outcomes = of(
        (1, 0), (1, 0), (1, 0), (0, 0), (0, 0), (0, 1), (0, 0),
        skills=[("easy",)] * 3 + [("hard",)] * 4,
    )  # fmt: skip
    rows = {"embedding": np.stack([ALGEBRA] * 3 + [POETRY] * 4)}
    for overall in (True, False):
        settings = PUBLISHED.model_copy(update={"overall": overall})
        fitted = Skills.fit(rows, outcomes, settings, 0)
        # hard: L = (−4, −2), none positive; S = (−1, −5): a is the best overall.
        np.testing.assert_allclose(fitted.predict_skills(np.array([[0, 1.0]])), [[0.25, 0.0]])


def test_a_prior_draws_to_the_mean() -> None:
    asked = np.array([[1, 0], [0, 1]], np.float32)
    rates = fit(SkillsSettings(prior=1e6, trim=0, least=1)).predict_skills(asked)
    np.testing.assert_allclose(rates, [[2 / 3, 2 / 3, 0]] * 2, atol=1e-4)
    one = fit(SkillsSettings(prior=1, trim=0, least=1)).predict_skills(asked)
    # poetry, a: one wrong, and its mean once: (−1 + 1/3)/2 → 1/3.
    np.testing.assert_allclose(one[1], [1 / 3, 5 / 6, 0], atol=1e-6)


def test_who_is_assigned_seldom_stands_behind_the_others() -> None:
    quality = np.tile(np.array([[0.9, 0.8, 0.7, 0.1]], np.float32), (100, 1))
    quality[:2, 3] = 1.0
    assert assigned_often(quality, 0.05).tolist() == [True, True, True, False]
    assert assigned_often(quality, 0.0).all()
    assert assigned_often(quality, 0.9).all()  # nobody can have so much: nobody is trimmed
    fitted = replace(fit(PUBLISHED), kept=np.array([True, False, True]))
    asked = np.array([[0, 1]], np.float32)  # alone b is right at poetry
    ranked = fitted.predict_skills(asked)
    assert ranked[0].argmin() == 1
    # What is promised is as much as before, in another order.
    before = fit(PUBLISHED).predict_skills(asked)
    np.testing.assert_array_equal(np.sort(ranked), np.sort(before))


def test_skills_are_those_annotated_else_category_and_benchmark_else_clusters() -> None:
    rows = ROWS["embedding"]
    assert skills_of(rows, SMALL, 2, 0)[0] == ("algebra",)  # poetry is asked for once
    plain = replace(SMALL, skills=(), category=("x", "y", "y"), benchmark=("exam", "exam", "quiz"))
    names, asks = skills_of(rows, plain, 1, 0)
    assert names == ("exam", "quiz", "x", "y")
    np.testing.assert_array_equal(asks, [[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1]])
    names, _ = skills_of(rows, replace(plain, benchmark=("exam",) * 3), 1, 0)
    assert names == ("x", "y")  # one benchmark of all tells nothing apart
    bare = replace(SMALL, skills=())
    names, asks = skills_of(rows, bare, 1, 0)
    assert len(names) == 2
    assert (asks.sum(axis=1) == 1).all()
    names, asks = skills_of(rows, SMALL, 10, 0)
    assert names == ("any",)
    assert asks.all()


def test_a_chosen_part_keeps_its_skills() -> None:
    assert SMALL.rows(np.array([2, 0])).skills == (("poetry", "algebra"), ("algebra",))
    assert replace(SMALL, skills=()).rows(np.array([2])).skills == ()


def test_the_nearest_skills_count() -> None:
    cosine = np.array([[0.9, 0.1, 0.5]], np.float32)
    two = SkillsSettings(nearest=2, sharpness=None)
    np.testing.assert_array_equal(nearest_weights(cosine, two), [[1, 0, 1]])
    soft = nearest_weights(cosine, SkillsSettings(nearest=2, sharpness=10))
    np.testing.assert_allclose(soft, [[1 / (1 + np.exp(-4)), 0, 1 / (1 + np.exp(4))]], atol=1e-5)


def test_questions_without_a_skill_teach_the_means_alone() -> None:
    at = world(200)
    none = replace(at.outcomes, skills=((),) * 100 + (("known",),) * 100)
    fitted = Skills.fit(at.features, none, SkillsSettings(), 0)
    assert fitted.names == ("known",)
    np.testing.assert_allclose(fitted.mean, at.outcomes.quality.mean(axis=0), atol=1e-6)
    assert fitted.count.max() == 100


tables = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.sampled_from([0, 1])
)


@given(tables, st.integers(0, 2**32 - 1))
def test_without_a_prior_the_order_is_that_of_the_local_scores(
    quality: FloatArray, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n, e = quality.shape
    asks = rng.random((n, 3)) < 0.5
    skills = [tuple(f"s{k}" for k in np.flatnonzero(row)) for row in asks]
    outcomes = replace(
        of(*map(tuple, np.zeros((n, 1))), skills=skills),
        experts=tuple(map(str, range(e))),
        quality=quality,
        cost=quality,
    )
    settings = PUBLISHED.model_copy(update={"overall": False})
    rows = {"embedding": np.eye(n, 8, dtype=np.float32)}
    fitted = Skills.fit(rows, outcomes, settings, 0)
    weight = (rng.random((4, len(fitted.names))) < 0.6).astype(np.float32)
    local = weight @ fitted.profile.T
    predicted = fitted.predict_skills(weight)
    assert ((predicted >= 0) & (predicted <= 1)).all()
    asked = (weight @ fitted.count.T).max(axis=1) > 0
    some = asked & (local > 0).any(axis=1)
    expected = np.sort((1 + local / np.maximum(weight @ fitted.count.T, 1)) / 2)[some]
    np.testing.assert_allclose(np.sort(predicted[some]), expected, atol=1e-6)
    for p, own in zip(predicted[some], local[some], strict=True):
        assert (np.diff(p[np.argsort(own, kind="stable")]) >= -1e-6).all()


@given(
    hnp.arrays(np.float32, (3, 5), elements=st.floats(0, 1, width=32)),
    hnp.arrays(np.float32, (3, 5), elements=st.floats(-5, 5, width=32), unique=True),
)
def test_by_rank_hands_out_the_same_in_the_order_given(
    quality: FloatArray, order: FloatArray
) -> None:
    handed = by_rank(quality, order)
    np.testing.assert_array_equal(np.sort(handed), np.sort(quality))
    for h, o in zip(handed, order, strict=True):
        assert (np.diff(h[np.argsort(o)]) >= 0).all()
    np.testing.assert_array_equal(by_rank(quality, quality), quality)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="trim"):
        SkillsSettings(trim=1.0)
