"""Joining by numbers: what outcomes and claims do to a new expert, and that nobody else moves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.routing.joining import Evidence, Joined, JoinPrior, Newcomers
from composer.routing.outcomes import Outcomes
from composer.types import FloatArray

PRIOR = JoinPrior(offset=0.2, follow=1.0, own=0.2, noise=0.3, best=0.9)
DIM = 8


def unit(rows: FloatArray) -> FloatArray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float32)


def world(n: int = 400, experts: int = 5, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """Vectors (n, d) of queries of two kinds, and what the experts are expected to reach (n, E):
    half of the experts are good at either kind."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(2, size=n)
    vectors = unit(np.eye(DIM)[kind] * 3 + rng.standard_normal((n, DIM)) * 0.4)
    good = np.arange(experts) % 2 == kind[:, None]
    quality = np.where(good, 0.8, 0.3) + rng.uniform(-0.05, 0.05, (n, experts))
    return vectors, np.asarray(quality, np.float32)


def seen(vectors: FloatArray, quality: FloatArray, outcome: FloatArray) -> Evidence:
    nothing = np.empty((0, vectors.shape[1])), np.empty((0, quality.shape[1]))
    return Evidence.of(PRIOR, nothing, (vectors, quality, outcome))


def test_without_anything_it_is_as_good_as_the_others_on_average() -> None:
    vectors, quality = world()
    joined = Joined(seen(vectors[:0], quality[:0], np.empty(0, np.float32)), PRIOR)
    expected, doubt = joined.predict(quality, vectors)
    np.testing.assert_allclose(expected, quality.mean(axis=1), atol=1e-6)
    spread = ((quality - quality.mean(axis=1, keepdims=True)) ** 2).mean(axis=1)
    np.testing.assert_allclose(doubt**2, 0.2**2 + spread + 0.2**2, rtol=1e-4)


def test_with_one_outcome_and_no_structure_it_is_the_shrunk_mean() -> None:
    """offset²/(offset² + noise²) of the way from the others' mean to the outcome."""
    prior = JoinPrior(offset=0.2, follow=1e-9, own=1e-9, noise=0.3, best=0.9)
    vectors, quality = world(10)
    nothing = np.empty((0, DIM)), np.empty((0, 5))
    evidence = Evidence.of(prior, nothing, (vectors[:1], quality[:1], np.ones(1, np.float32)))
    expected, _ = Joined(evidence, prior).predict(quality, vectors)
    share = 0.04 / (0.04 + 0.09)
    moved = share * (1 - quality[0].mean())
    np.testing.assert_allclose(expected, np.clip(quality.mean(axis=1) + moved, 0, 1), atol=1e-5)


def test_outcomes_tell_whom_it_resembles() -> None:
    vectors, quality = world()
    outcome = (quality[:64, 0] > 0.5).astype(np.float32)
    joined = Joined(seen(vectors[:64], quality[:64], outcome), PRIOR)
    expected, doubt = joined.predict(quality[64:], vectors[64:])
    strong = quality[64:, 0] > 0.5
    assert expected[strong].mean() > 0.85
    assert expected[~strong].mean() < 0.2
    assert doubt.max() < 0.2
    shares = joined.resemblance()
    assert shares[[0, 2, 4]].min() > 0 > shares[[1, 3]].max()
    assert joined.level(quality.mean(axis=0)) == pytest.approx(outcome.mean(), abs=0.08)


def test_a_claim_counts_where_it_is_made_and_nowhere_else() -> None:
    """All experts are alike, so that nothing but the claim tells one kind from the other."""
    vectors, _ = world()
    quality = np.full((400, 3), 0.4, np.float32)
    first = vectors[:, 0] > vectors[:, 1]
    own = np.flatnonzero(first)[:4]
    nothing = np.empty((0, DIM)), np.empty((0, 3)), np.empty(0)
    evidence = Evidence.of(PRIOR, (vectors[own], quality[own]), nothing)
    assert evidence.claimed.all()
    expected, _ = Joined(evidence, PRIOR).predict(quality, vectors)
    assert expected[first].mean() > 0.55
    assert abs(expected[~first].mean() - 0.4) < 0.06
    assert expected.max() <= 0.9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), outcomes=st.integers(0, 12), claims=st.integers(0, 4))
def test_it_stays_within_bounds_and_knows_more_with_more(
    seed: int, outcomes: int, claims: int
) -> None:
    vectors, quality = world(60, seed=seed)
    outcome = np.random.default_rng(seed).integers(2, size=outcomes).astype(np.float32)
    said = vectors[40 : 40 + claims], quality[40 : 40 + claims]
    few = Evidence.of(PRIOR, said, (vectors[:outcomes], quality[:outcomes], outcome))
    less = Evidence.of(PRIOR, said, (vectors[:0], quality[:0], outcome[:0]))
    expected, doubt = Joined(few, PRIOR).predict(quality, vectors)
    assert np.isfinite(expected).all()
    assert ((expected >= 0) & (expected <= 1)).all()
    assert (doubt <= Joined(less, PRIOR).predict(quality, vectors)[1] + 1e-5).all()


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(["a", "b", "c"]), leaves=st.sampled_from(["a", "b", "c"]))
def test_who_joins_or_leaves_moves_nobody_else(order: list[str], leaves: str) -> None:
    vectors, quality = world(50)
    evidence = {
        name: seen(vectors[i::3][:6], quality[i::3][:6], np.full(6, i / 2, np.float32))
        for i, name in enumerate("abc")
    }
    alone = {
        name: Joined(one, PRIOR).predict(quality, vectors)[0] for name, one in evidence.items()
    }
    all_ = Newcomers(PRIOR, {})
    for name in order:
        all_ = all_.and_(name, evidence[name])
    for some in (all_, all_.without(leaves)):
        said, _ = some.scores(quality, vectors)
        for column, name in enumerate(some.experts):
            np.testing.assert_array_equal(said[:, column], alone[name])
    again = Newcomers.restore(PRIOR, list(all_.experts), all_.state())
    np.testing.assert_array_equal(
        again.scores(quality, vectors)[0], all_.scores(quality, vectors)[0]
    )


def outcomes_of(quality: FloatArray) -> Outcomes:
    n, e = quality.shape
    return Outcomes(
        experts=tuple(f"e{i}" for i in range(e)),
        text=("",) * n,
        quality=quality,
        cost=np.full_like(quality, np.nan),
        category=("",) * n,
        benchmark=("",) * n,
        group=np.arange(n),
    )


@pytest.mark.parametrize("spread", [0.02, 0.25])
def test_how_far_experts_differ_is_learnt_by_leaving_each_out(spread: float) -> None:
    """Experts that are better or worse throughout by so much, and alike otherwise."""
    rng = np.random.default_rng(3)
    vectors, _ = world(300)
    level = np.linspace(-1, 1, 8) * spread * np.sqrt(12 / 4)
    quality = np.tile(0.5 + level, (300, 1)).astype(np.float32)
    y = np.asarray(np.clip(quality + rng.normal(0, 0.2, quality.shape), 0, 1), np.float32)
    prior = JoinPrior.fit(quality, outcomes_of(y), vectors)
    assert prior.noise == pytest.approx(0.2, abs=0.04)
    # Everybody leads by as much anywhere, so what each is best at is as good as the rest.
    assert prior.best == pytest.approx(y.mean(), abs=0.03)
    assert prior.doubt == pytest.approx(y.mean(axis=0).std(), abs=0.03)
    assert prior.own < 0.1
    # What makes an expert better throughout is its offset, or its likeness to such ones.
    total = np.hypot(prior.offset, prior.follow * np.sqrt(np.var(level)))
    assert spread / 2 < total < spread * 3 + 0.05


def test_one_known_expert_says_nothing_of_a_population() -> None:
    vectors, quality = world(30, experts=1)
    prior = JoinPrior.fit(quality, outcomes_of(quality), vectors)
    assert prior == JoinPrior.default(prior.best)
    assert JoinPrior.restore(prior.state()) == prior
