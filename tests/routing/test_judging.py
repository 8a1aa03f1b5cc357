"""From records to a verdict: what counts, what is left out, and whose choice was never tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from composer.routing import judging
from composer.routing.explore import propensities
from composer.routing.offpolicy import Comparison
from composer.types import Choice, Plan


@dataclass(frozen=True)
class Row:
    plan: Plan
    expert: str
    score: float
    choice: str = "b"
    scores: Mapping[str, float] = field(default_factory=dict)


def judged(rows: Sequence[Row], min_quality: float = 0.0, seed: int = 0) -> Comparison:
    found = judging.judged(rows, min_quality, seed)
    assert found is not None
    return found


def row(expert: str, score: float, propensity: float, *, greedy: str = "a") -> Row:
    plan = Plan(
        policy="auto",
        strategy="single",
        choices=(Choice(expert, 1.0),),
        calls=(expert,),
        scores={"a": 0.6, "b": 0.5},
        reasons={"exploration": {"greedy": greedy, "propensity": propensity}},
    )
    return Row(plan, expert, score)


def explored(n: int, *, good: str, floor: float = 0.5, seed: int = 0) -> list[Row]:
    """a is the best of the one that serves, b of the shadow."""
    rng = np.random.default_rng(seed)
    tried = rng.random(n) < floor / 2
    rate = {True: 0.8, False: 0.3}
    return [
        row(e, float(rng.random() < rate[e == good]), floor / 2 if e == "b" else 1 - floor / 2)
        for e in np.where(tried, "b", "a").tolist()
    ]


def test_the_better_shadow_is_seen_and_the_worse_one_too() -> None:
    better, worse = judged(explored(400, good="b")), judged(explored(400, good="a"))
    assert better.better
    assert better.low < 0.5 < better.high
    assert worse.high < 0


def world(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, 3) true success rates, and what the one that serves and the shadow make of them: each
    expert is good at some questions, and the shadow knows better at which."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0.25, 0.55, 0.85], (n, 3))
    return truth, truth + rng.normal(0, 0.6, (n, 3)), truth + rng.normal(0, 0.3, (n, 3))


def simulated(n: int, seed: int, *, floor: float = 0.15) -> list[Row]:
    """A log as a service keeps it."""
    rng, ids = np.random.default_rng(seed), ("a", "b", "c")
    truth, serving, shadow = world(n, seed)
    rows = []
    for i, (greedy, choice) in enumerate(zip(serving.argmax(1), shadow.argmax(1), strict=True)):
        chances = propensities(serving[i], None, int(greedy), floor)
        drawn = int(rng.choice(3, p=chances))
        made = row(ids[drawn], 0.0, float(chances[drawn]), greedy=ids[greedy])
        scores = dict(zip(ids, np.clip(serving[i], 0, 1).tolist(), strict=True))
        score = float(rng.random() < truth[i, drawn])
        plan = replace(made.plan, scores=scores)
        rows.append(replace(made, plan=plan, score=score, choice=ids[choice]))
    return rows


@pytest.mark.slow
def test_the_interval_holds_the_truth_in_95_of_100_logs() -> None:
    truth, serving, shadow = world(1_000_000, 1001)
    each = np.arange(len(truth))
    gain = float((truth[each, shadow.argmax(1)] - truth[each, serving.argmax(1)]).mean())
    found = [judged(simulated(800, seed), seed=seed) for seed in range(150)]
    assert gain > 0.04
    assert all(one.unsupported == 0 for one in found)
    assert np.median([one.effective for one in found]) > 50
    differences = np.array([one.difference for one in found])
    error = differences.std() / np.sqrt(len(found))
    assert abs(differences.mean() - gain) < 3 * error
    assert 0.89 <= np.mean([one.low <= gain <= one.high for one in found]) <= 0.99
    assert np.mean([one.low > gain for one in found]) <= 0.07


def test_without_exploring_a_shadow_cannot_win() -> None:
    rows = [row("a", 0.1, 1.0) for _ in range(100)]
    found = judged([replace(one, scores={"b": 1.0}) for one in rows])
    assert found.unsupported == 1.0
    assert not found.better


def test_an_expert_kept_out_by_a_rule_was_not_tried() -> None:
    found = judged(explored(100, good="b"), min_quality=0.55)
    tried = sum(one.expert == "b" for one in explored(100, good="b"))
    assert found.unsupported == pytest.approx(1 - tried / 100)


def test_what_says_nothing_of_the_choice_is_left_out() -> None:
    kept = explored(20, good="b")
    unlogged = replace(kept[0], plan=replace(kept[0].plan, reasons={}))
    another = replace(kept[0], expert="c")
    several = replace(
        kept[0], plan=replace(kept[0].plan, choices=(Choice("a", 0.5), Choice("b", 0.5)))
    )
    assert judged([*kept, unlogged, another, several]) == judged(kept)
    assert judging.judged([unlogged]) is None


def test_a_record_that_cannot_be_is_not_taken_for_none() -> None:
    kept = explored(20, good="b")
    with pytest.raises(ValueError, match=r"a reward lies outside \[0, 1\]"):
        judged([*kept, replace(kept[0], score=2.0)])


@pytest.mark.parametrize("rule", ["resident_within_tolerance", "session_stay", "explored"])
def test_where_an_expert_gave_way_the_shadow_is_not_credited(rule: str) -> None:
    kept = explored(20, good="b")
    reasons = {**kept[0].plan.reasons, "rule": rule, "instead_of": ["b"], "gave_up": 0.05}
    gave_way = replace(kept[0], plan=replace(kept[0].plan, reasons=reasons))
    assert judged([*kept, gave_way]) == judged(kept)
