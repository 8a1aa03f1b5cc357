"""The bound that holds at every look: how often it errs where one looks until it says yes."""

from __future__ import annotations

import numpy as np
import pytest

from composer.routing.anytime import lower_bound
from composer.routing.offpolicy import Comparison, Log, compare, interval

LOOKS = np.unique(np.geomspace(20, 2000, 25).astype(int))


def compared(
    n: int, seed: int, *, new: float, old: float, explore: float = 0.2, draws: int = 1
) -> list[Comparison]:
    """At each look, of two experts that earn this much, one served and one in shadow; what the
    model expects of both is the same and wrong."""
    rng = np.random.default_rng(seed)
    tried = rng.random(n) < explore / 2
    action = tried.astype(np.intp)
    propensity = np.where(tried, explore / 2, 1 - explore / 2)
    reward = (rng.random(n) < np.where(tried, new, old)).astype(float)
    model = np.full((n, 2), 0.6)
    both = np.tile([0.0, 1.0], (n, 1)), np.tile([1.0, 0.0], (n, 1))
    return [
        compare(
            Log(action[:t], propensity[:t], reward[:t]),
            both[0][:t],
            both[1][:t],
            model[:t],
            draws=draws,
        )
        for t in LOOKS
        if t <= n
    ]


def test_looking_again_and_again_errs_no_more_than_it_says() -> None:
    """Two that are as good as each other, 25 looks: the interval of one look calls the shadow
    better far too often, the bound for all looks in at most one of twenty."""
    once = always = 0
    for seed in range(100):
        found = compared(2000, seed, new=0.6, old=0.6, draws=60)
        once += any(one.better for one in found)
        always += any(one.always_better for one in found)
    assert once > 15
    assert always <= 5


def test_what_is_better_is_found_with_more_requests() -> None:
    found = compared(2000, 0, new=0.9, old=0.4)
    assert found[-1].always_better
    assert found[-1].always_low < found[-1].difference
    assert not found[0].always_better
    assert all(-1 <= one.always_low <= 1 for one in found)


def test_luck_that_has_not_varied_yet_is_no_proof() -> None:
    """No try of the new one yet, and a model that promises much of it."""
    n = 30
    log = Log(np.zeros(n, np.intp), np.full(n, 0.9), np.zeros(n))
    hopes = np.tile([0.1, 0.9], (n, 1))
    new, old = np.tile([0.0, 1.0], (n, 1)), np.tile([1.0, 0.0], (n, 1))
    found = compare(log, new, old, hopes, draws=50)
    assert found.better  # which is why one look alone is not to be had by choosing when
    assert not found.always_better


@pytest.mark.parametrize("mean", [0.0, 0.3])
def test_the_bound_of_skewed_terms_covers(mean: float) -> None:
    """Rare great rewards, as importance weights make them: −0.5 mostly."""
    chance = 0.05
    great = (mean + 0.5) / chance - 0.5
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        terms = np.where(rng.random(1000) < chance, great, -0.5)
        missed += any(lower_bound([(terms[:t], 0.5)]) > mean for t in (50, 200, 1000))
    assert missed <= 10


def test_bounds_of_little() -> None:
    assert lower_bound([(np.zeros(0), 1.0)]) == -1.0
    assert lower_bound([(np.ones(3), 1.0)]) < 0
    assert 0.9 < lower_bound([(np.ones(5000), 1.0)]) <= 1
    # A sanity check beside the one-look interval.
    terms = np.random.default_rng(1).normal(0.4, 0.3, 3000).clip(-1, 1)
    assert 0.3 < lower_bound([(terms, 1.0)]) < interval(terms, draws=200)[0]
