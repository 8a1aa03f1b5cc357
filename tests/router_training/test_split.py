"""Folds keep groups whole and every stratum spread."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_training.split import folds, parts
from tests.router_training.helpers import outcomes

rows_of = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from("abc"), st.sampled_from("xy")),
    min_size=14,
    max_size=60,
)


@settings(deadline=None)
@given(rows=rows_of, k=st.integers(2, 5), seed=st.integers(0, 3))
def test_a_group_is_never_parted(rows: list[tuple[int, str, str]], k: int, seed: int) -> None:
    group = [r[0] for r in rows] + list(range(100, 100 + k))
    data = outcomes(
        np.zeros((len(group), 1)),
        group=group,
        category=[r[1] for r in rows] + ["d"] * k,
        benchmark=[r[2] for r in rows] + ["z"] * k,
    )
    fold = folds(data, k, seed)
    assert set(fold.tolist()) == set(range(k))
    for g in set(group):
        assert len(set(fold[np.array(group) == g].tolist())) == 1
    assert np.array_equal(fold, folds(data, k, seed))
    covered = np.concatenate([judged for _, judged in parts(fold)])
    assert sorted(covered.tolist()) == list(range(len(group)))
    assert all(not set(fit.tolist()) & set(judged.tolist()) for fit, judged in parts(fold))


@settings(deadline=None)
@given(categories=st.lists(st.sampled_from("abcd"), min_size=5, max_size=60), k=st.integers(2, 5))
def test_single_questions_spread_to_within_one(categories: list[str], k: int) -> None:
    data = outcomes(np.zeros((len(categories), 1)), category=categories)
    fold = folds(data, k, 0)
    for name in set(categories):
        counts = np.bincount(fold[np.array(categories) == name], minlength=k)
        assert counts.max() - counts.min() <= 1
    counts = np.bincount(fold, minlength=k)
    assert counts.max() - counts.min() <= len(set(categories))


def test_other_strata_and_seeds() -> None:
    data = outcomes(np.zeros((40, 1)))
    kinds = [i % 2 for i in range(40)]
    fold = folds(data, 4, 0, strata=kinds)
    assert np.bincount(fold[np.array(kinds) == 1]).tolist() == [5] * 4
    assert not np.array_equal(fold, folds(data, 4, 1, strata=kinds))


def test_too_few_questions() -> None:
    data = outcomes(np.zeros((4, 1)), group=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="2 different questions cannot be parted into 3 folds"):
        folds(data, 3, 0)
    with pytest.raises(ValueError, match="1 folds"):
        folds(data, 1, 0)
