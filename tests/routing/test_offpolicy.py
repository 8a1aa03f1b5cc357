"""Off-policy estimates on logs whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.routing.offpolicy import (
    Log,
    compare,
    doubly_robust_terms,
    effective_size,
    interval,
    ips,
    snips,
    weights,
)

E = 4


def world(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, E) true success rates, logging probabilities, and those of a target policy."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.1, 0.9, (n, E))
    logging = rng.dirichlet(np.ones(E), n) * 0.8 + 0.2 / E
    target = np.eye(E)[rng.integers(0, E, n)]
    return truth, logging, target


def drawn(truth: np.ndarray, logging: np.ndarray, seed: int) -> Log:
    rng = np.random.default_rng(seed)
    action = (rng.random((len(truth), 1)) > logging.cumsum(axis=1)).sum(axis=1).clip(max=E - 1)
    rows = np.arange(len(truth))
    reward = (rng.random(len(truth)) < truth[rows, action]).astype(float)
    return Log(action, logging[rows, action], reward)


@pytest.mark.parametrize("model", ["right", "wrong", "none"])
def test_ips_and_doubly_robust_are_unbiased_whatever_the_model(model: str) -> None:
    truth, logging, target = world(400, 0)
    expected = {"right": truth, "wrong": 1 - truth, "none": np.zeros_like(truth)}[model]
    value = float((target * truth).sum(axis=1).mean())
    logs = [drawn(truth, logging, seed) for seed in range(400)]
    for estimates in (
        np.array([ips(log, target) for log in logs]),
        np.array([doubly_robust_terms(log, target, expected).mean() for log in logs]),
    ):
        error = estimates.std() / np.sqrt(len(logs))
        assert abs(estimates.mean() - value) < 4 * error


def test_a_good_model_makes_the_estimate_steadier() -> None:
    truth, logging, target = world(400, 1)
    logs = [drawn(truth, logging, seed) for seed in range(200)]
    plain = np.std([ips(log, target) for log in logs])
    assert np.std([doubly_robust_terms(log, target, truth).mean() for log in logs]) < 0.8 * plain


def test_the_interval_of_the_difference_covers_the_truth_about_95_times_in_100() -> None:
    truth, logging, new = world(300, 2)
    old = np.eye(E)[logging.argmax(axis=1)]
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(300):
        # The population is resampled too: the interval is one of the mean over requests.
        rows = rng.integers(0, 300, 300)
        log = drawn(truth[rows], logging[rows], seed)
        found = compare(log, new[rows], old[rows], truth[rows] * 0.5, draws=400, seed=seed)
        value = float(((new - old) * truth).sum(axis=1).mean())
        hits += found.low <= value <= found.high
    assert 0.91 <= hits / 300 <= 0.98


def test_the_logging_policy_itself_is_worth_its_rewards() -> None:
    truth, logging, _ = world(50, 4)
    log = drawn(truth, logging, 0)
    assert weights(log, logging) == pytest.approx(np.ones(50))
    assert ips(log, logging) == pytest.approx(log.reward.mean())
    assert snips(log, logging) == pytest.approx(log.reward.mean())
    assert effective_size(weights(log, logging)) == pytest.approx(50)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_bounds(seed: int, n: int) -> None:
    truth, logging, target = world(n, seed)
    log = drawn(truth, logging, seed)
    w = weights(log, target)
    assert 0 <= effective_size(w) <= n + 1e-9
    assert np.isnan(snips(log, target)) or 0 <= snips(log, target) <= 1
    same = compare(log, target, target, truth, draws=50)
    assert same.difference == same.low == same.high == 0
    assert not same.better


def test_what_was_never_tried_counts_as_worth_nothing() -> None:
    n = 200
    log = Log(np.zeros(n, np.intp), np.ones(n), np.full(n, 0.5))
    old, new = np.tile([1.0, 0.0], (n, 1)), np.tile([0.0, 1.0], (n, 1))
    hopeful = np.tile([0.5, 1.0], (n, 1))
    assert compare(log, new, old, hopeful).better  # only by believing the model
    tried = np.tile([True, False], (n, 1))
    found = compare(log, new, old, hopeful, tried)
    assert found.unsupported == 1.0
    assert found.difference == -0.5
    assert not found.better


def test_a_log_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="propensity lies outside"):
        Log(np.array([0]), np.array([0.0]), np.array([1.0]))
    with pytest.raises(ValueError, match="reward lies outside"):
        Log(np.array([0]), np.array([0.5]), np.array([2.0]))
    empty, none = np.zeros((0, 2)), Log(np.zeros(0, np.intp), np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="no judged decision"):
        compare(none, empty, empty, empty)


def test_the_interval_is_the_same_for_the_same_seed() -> None:
    terms = np.random.default_rng(0).normal(size=100)
    assert interval(terms, draws=300) == interval(terms, draws=300)
