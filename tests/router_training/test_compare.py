"""Comparison: the same questions for all, ours against the bar, Markdown that says it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from composer.routing.curve import Curve
from router_training.compare import SHARES, compare
from router_training.compared import COMPARISONS, Comparison, over_budgets, over_pools
from router_training.comparison import markdown
from router_training.errors import TrainingError
from router_training.knob import CurveTrial
from router_training.pairing import pair_measures
from router_training.published import BAR, PUBLISHED
from tests.router_training.helpers import logged, outcomes
from tests.router_training.synthetic import stamp, table
from tests.routing.helpers import WordEmbedder

FEW = ("category", "clusters")
REBUILT = ("Composition of Experts", BAR)


@cache
def compared(name: str = "all", *, priced: bool = True, experts: int = 3) -> Comparison:
    train, dev = table(priced=priced), table(250, seed=2, priced=priced)
    some = train.experts[:experts]
    encode = WordEmbedder().encode
    short = {name: replace(one, grid=list(one.grid)[:3]) for name, one in PUBLISHED.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router_training.compare.PUBLISHED", short)
        return compare(
            "t",
            name,
            train.of(some),
            dev.of(some),
            encode,
            stamp(),
            families=FEW,
            published=REBUILT,
            encode_anew=encode if priced else None,
        )


def test_every_method_is_judged_on_the_same_questions() -> None:
    c = compared()
    assert [m.name for m in c.methods] == [*FEW, *REBUILT]
    for m in c.methods:
        assert len(m.values) == len(c.group) == 250
        assert m.card["avg_acc"] == np.mean(m.values)
        assert len(m.apart) == len(c.trained) == len(c.apart) == 300
        np.testing.assert_allclose(m.apart.mean(), m.cv)
        assert (m.cross_fitted is None) == (m.name in REBUILT)
    assert c.best in FEW
    assert c.why.startswith(c.best)
    ahead = c.ahead("category")
    assert ahead is not None
    expected = c.of("category").values.mean() - c.of(BAR).values.mean()
    np.testing.assert_allclose(ahead.mean, expected, atol=1e-12)


def test_single_outcomes_judge_no_decision() -> None:
    train, dev, encode = table(120), table(80, seed=2), WordEmbedder().encode
    for whole, kept in ((train, 90), (dev, 60)):
        gone = np.ix_(np.arange(kept, len(whole)), [0, 2])
        whole.quality[gone] = whole.cost[gone] = np.nan
    c = compare("t", "some", train, dev, encode, stamp(), families=FEW[:1], published=())
    method = c.of(FEW[0])
    assert len(method.values) == len(c.group) == 60
    assert len(method.apart) == len(c.trained) == len(c.apart) == 90
    assert method.card["avg_acc"] == np.mean(method.values)
    np.testing.assert_allclose(method.apart.mean(), method.cv)
    assert c.within is not None
    assert len(c.within.of(FEW[0]).values) == 60
    assert markdown([c]).startswith("## t, some")
    for one, other, said in ((logged(train), dev, "fitted"), (train, logged(dev), "to judge")):
        with pytest.raises(TrainingError, match=f"the questions {said} on: none of the"):
            compare("t", "some", one, other, encode, stamp(), families=FEW[:1], published=())


def test_the_markdown_has_every_table_that_the_pools_allow() -> None:
    priced, plain, two = compared(), compared("plain", priced=False), compared("two", experts=2)
    text = markdown([priced, plain, two])
    first, second, third, last = text.split("\n## ")
    for name in (
        *FEW,
        *REBUILT,
        "random",
        "best single",
        "best by category, label known",
        "oracle",
    ):
        assert f"| {name} " in first or f"| **{name}** " in first
    assert "| random mix of single experts |" in first
    assert "The knob of" in first
    assert "accuracy there, over it" in first
    assert "US dollars" not in second
    assert "One decision on one core" in first
    assert "One decision on one core" not in second
    assert "synthetic (250): APGR" in third
    assert "## Over" not in first
    assert last.startswith("Over 3 pools")
    assert "on the 2 priced pools" in last
    assert "None" not in text
    assert "nan" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_the_verdict_holds_what_was_chosen_against_the_bar() -> None:
    c = compared()
    v = over_pools([c], None)
    np.testing.assert_allclose(v.overall.mean, c.of(c.best).values.mean() - c.of(BAR).values.mean())
    same = over_pools([c], c.best, c.best)
    assert not same.better
    assert same.overall.mean == 0


def test_budgets_are_chosen_for_and_kept() -> None:
    within = compared().within
    assert within is not None
    assert compared("plain", priced=False).within is None
    assert [m.name for m in within.methods] == [*FEW, *REBUILT]
    for m in within.methods:
        known = [m.budgets[f"{share:.2f}"] for share in SHARES]
        reached = [quality for quality in known if quality is not None]
        assert reached == sorted(reached)
        # A budget below the cheapest expert is nobody's, and counts for nobody.
        np.testing.assert_allclose(m.values.mean(), np.mean(reached))
        if m.at_best is not None:
            assert 0 < m.at_best.share.low <= m.at_best.share.mean <= m.at_best.share.high
    assert within.of("category").at_best is not None
    v = over_budgets([compared(), compared("plain", priced=False)], None, BAR)
    expected = within.of(within.best).values.mean() - within.of(BAR).values.mean()
    np.testing.assert_allclose(v.overall.mean, expected)


def test_what_the_best_singles_quality_costs_is_not_chosen_with_hindsight() -> None:
    """The weight is the curve's, whatever these questions would have allowed."""
    point = {"low": 0.5, "high": 0.9, "cost_low": 1.0, "cost_high": 2.0}
    points = [
        {"weight": 0.0, "quality": 0.8, "cost": 2.0, **point},
        {"weight": 0.1, "quality": 0.7, "cost": 1.0, **point},
    ]
    curve = Curve.model_validate({"best_single": 0.8, "best_single_cost": 2.0, "points": points})
    data = outcomes([[1, 1], [1, 0], [0, 1], [1, 1]], [[2.0, 1.0]] * 4)
    said = np.array([[0.8, 0.6], [0.9, 0.2], [0.3, 0.6], [0.8, 0.6]])
    told = CurveTrial(curve, said, data.cost, data, 0).at_best_single()
    assert told is not None
    assert told.weight == 0.0  # with 0.3, all four would be right at 5 instead of 7 dollars
    assert told.share.mean == pytest.approx(7 / 8)
    assert told.over.mean == pytest.approx(1 / 4)
    assert told.share.low <= told.share.mean <= told.share.high
    worse = curve.model_copy(update={"best_single": 0.9})
    assert CurveTrial(worse, said, data.cost, data, 0).at_best_single() is None
    unpriced = outcomes(data.quality)
    assert CurveTrial(curve, said, data.cost, unpriced, 0).at_best_single() is None


def test_questions_fitted_on_are_told_and_can_be_left_out() -> None:
    train, dev, encode = table(120), table(80, seed=2), WordEmbedder().encode
    again = tuple(f" {text.upper()}" for text in train.text[:8])
    dev = replace(dev, text=again + dev.text[8:])
    told, without = (
        compare(
            "t",
            "all",
            train,
            dev,
            encode,
            stamp(),
            families=FEW[:1],
            published=(),
            without_trained=left,
        )
        for left in (False, True)
    )
    assert (told.overlap.trained, told.overlap.questions, len(told.group)) == (8, 80, 80)
    page = markdown([told])
    assert (
        "8 of 80 judged questions (10.0 %) were trained on (equal but for case, space and marks)"
        in page
    )
    assert "over-state" in page
    assert len(without.group) == 72
    assert "they are left out" in markdown([without])
    with pytest.raises(TrainingError, match="all questions to judge on were trained on"):
        compare("t", "all", train, train, encode, stamp(), families=FEW[:1], without_trained=True)


def test_a_pair_without_prices_is_judged_by_calls_to_the_stronger_one() -> None:
    c = compared("pair", priced=False, experts=2)
    for m in c.methods:
        two = m.pairs["synthetic"]
        assert two.apgr.low <= two.apgr.mean <= two.apgr.high
        # Over all shares the mean lies between the two experts', by how well the gap is recovered.
        single = c.baselines["best_single"]["avg_acc"]
        weak = 2 * c.baselines["random"]["avg_acc"] - single
        recovered = (m.values.mean() - weak) / (single - weak)
        np.testing.assert_allclose(recovered, two.apgr.mean, atol=0.1)
    assert "over all shares of calls" in c.why or "the highest" in c.why


def test_a_pair_is_drawn_by_groups() -> None:
    """Each question told twice knows no more than told once."""
    rng = np.random.default_rng(1)
    quality = (rng.random((60, 2)) < (0.4, 0.7)).astype(np.float32)
    once = outcomes(quality)
    twice = outcomes(np.repeat(quality, 2, axis=0), group=np.repeat(np.arange(60), 2))
    said = rng.random((60, 2), np.float32)
    one = pair_measures(said, once, 1)
    two = pair_measures(np.repeat(said, 2, axis=0), twice, 1)
    for name in one:
        np.testing.assert_allclose(
            [two[name].apgr.low, two[name].apgr.high], [one[name].apgr.low, one[name].apgr.high]
        )


def test_comparisons_made_apart_are_merged_as_they_were() -> None:
    done = [compared(), compared("two", experts=2)]
    again = COMPARISONS.validate_json(COMPARISONS.dump_json(done))
    assert markdown(again) == markdown(done)


def test_without_a_budget_that_can_be_kept_the_rest_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the best single expert is the cheapest: every choice costs more than the shares."""
    monkeypatch.setattr("router_training.compare.SHARES", (0.001, 0.002))
    c = compared.__wrapped__("thrifty")
    assert c.within is None
    assert [m.name for m in c.methods] == [*FEW, *REBUILT]
    page = markdown([c])
    assert "category" in page
    assert "Accuracy within shares" not in page
    assert COMPARISONS.dump_json([c])
