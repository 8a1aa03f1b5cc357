"""Exact choices over kinds of question, held to brute force."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.routing.subsets import ENUMERATED, best_subset, budgeted_map


def mean_of(count: np.ndarray, table: np.ndarray, chosen: np.ndarray) -> float:
    return float((count * table[np.arange(len(count)), chosen]).sum() / count.sum())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_the_budgeted_map_is_the_best_there_is(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    kinds, experts = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    count = rng.integers(1, 100, kinds)
    quality = rng.random((kinds, experts))
    cost = rng.random((kinds, experts)) * 1e-4  # US dollars a call
    least = float((count * cost.min(axis=1)).sum() / count.sum())
    most = float((count * cost.max(axis=1)).sum() / count.sum())
    budget = least + share * (most - least) + 1e-12
    chosen = budgeted_map(count, quality, cost, budget)
    assert mean_of(count, cost, chosen) <= budget * (1 + 1e-6)
    best = max(
        mean_of(count, quality, np.array(every))
        for every in product(range(experts), repeat=kinds)
        if mean_of(count, cost, np.array(every)) <= budget
    )
    assert mean_of(count, quality, chosen) >= best - 1e-9


def test_unknown_pairs_are_not_chosen_and_no_budget_is_refused() -> None:
    count, quality = np.array([1, 1]), np.array([[0.9, 0.5], [0.9, 0.5]])
    cost = np.array([[np.nan, 1.0], [2.0, 1.0]])
    assert budgeted_map(count, quality, cost, 1.5).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"over the budget of 0\.5; raise the budget"):
        budgeted_map(count, quality, cost, 0.5)
    with pytest.raises(ValueError, match="no expert with a quality and a cost; give one"):
        budgeted_map(count, quality, np.full((2, 2), np.nan), 1.0)


def brute(count: np.ndarray, quality: np.ndarray, memory: np.ndarray, limit: float) -> float:
    share = count / count.sum()
    return max(
        float((share * quality[:, list(some)].max(axis=1)).sum())
        for size in range(1, len(memory) + 1)
        for some in combinations(range(len(memory)), size)
        if memory[list(some)].sum() <= limit
    )


def problem(seed: int, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    kinds = int(rng.integers(1, 12))
    memory = rng.integers(1, 40, experts).astype(float)
    limit = float(memory.min() + rng.random() * memory.sum() * 0.6)
    return rng.integers(1, 100, kinds), rng.random((kinds, experts)), memory, limit


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), experts=st.integers(1, 8))
def test_few_experts_are_chosen_exactly(seed: int, experts: int) -> None:
    count, quality, memory, limit = problem(seed, experts)
    subset = best_subset(count, quality, memory, limit)
    assert subset.value == pytest.approx(brute(count, quality, memory, limit), abs=1e-12)
    assert subset.bound == subset.value
    assert memory[list(subset.experts)].sum() <= limit


@pytest.mark.parametrize("seed", range(6))
def test_many_experts_are_chosen_within_the_bound(seed: int) -> None:
    count, quality, memory, limit = problem(seed, ENUMERATED + 2)
    subset = best_subset(count, quality, memory, limit)
    best = brute(count, quality, memory, limit)
    assert memory[list(subset.experts)].sum() <= limit
    assert subset.value <= best + 1e-12 <= subset.bound + 1e-9
    assert subset.value >= 0.95 * best  # the guarantee is (1 − 1/e)/2; this is what is seen


def test_limits_leave_experts_out() -> None:
    count, quality = np.array([1]), np.array([[0.9, 0.8, 0.7]])
    memory, latency = np.array([8.0, 4.0, 2.0]), np.array([0.1, 9.0, 0.2])
    assert best_subset(count, quality, memory, 100).experts == (0,)
    assert best_subset(count, quality, memory, 6).experts == (1,)
    assert best_subset(count, quality, memory, 6, latency, 1.0).experts == (2,)
    with pytest.raises(ValueError, match="no expert is within the limits on its own; raise them"):
        best_subset(count, quality, memory, 1)
