"""The baselines of the real tables, near what `reference.md` says of the part kept apart."""

from __future__ import annotations

import json

import numpy as np
import pytest

from composer.routing.outcomes import Outcomes
from router_training import baselines as base
from router_training import measures
from router_training.curves import pair
from router_training.data import load
from router_training.intents import read_intents
from tests.router_training.helpers import SHARED

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")

REFERENCE = {
    ("mix10", "all"): (48.9, 69.5, 77.7, 90.1),
    ("zeroeval", "without_o1_mini"): (66.7, 83.8, 84.5, 95.8),
    ("zeroeval", "small"): (55.2, 60.1, 61.6, 77.3),
}
"""Random, best single, best by category and oracle, accuracy in %."""


def pool(table: str, name: str) -> tuple[Outcomes, Outcomes]:
    experts = json.loads((SHARED / "pools.json").read_text())[table][name]
    train, dev = (load(SHARED / f"{table}.{part}.csv.gz").of(experts) for part in ("train", "dev"))
    return train.outcomes, dev.rows(~dev.contaminated).outcomes


@pytest.mark.parametrize(("table", "name"), REFERENCE)
def test_baselines_are_near_the_reference(table: str, name: str) -> None:
    """Dev alone is small (420 questions: ± 4 points), so each figure is of the two parts'
    questions, held to their own sampling error; the category's rates are of train."""
    train, dev = pool(table, name)
    assert len(dev) in (420, 542)
    best = base.best_single(train)
    found = [
        base.random_choice(dev)[0],
        base.single(dev, best)[0],
        base.chosen_by(dev, base.CategoryBest.fit(train).choose(dev))[0],
        base.chosen_by(dev, base.oracle(dev))[0],
    ]
    for values, expected in zip(found, REFERENCE[table, name], strict=True):
        accuracy = measures.avg_acc(values)
        assert accuracy is not None
        # two samples of one population, the other about 1.6 times as large: 3 standard errors
        tolerance = 3 * values.std() * np.sqrt(1.6 / len(values))
        assert 100 * accuracy == pytest.approx(expected, abs=100 * tolerance)


def test_random_and_known_subjects_on_the_pair() -> None:
    train, dev = pool("routellm", "all")
    rows = np.array(dev.benchmark) == "mmlu"
    train, dev = train.rows(np.array(train.benchmark) == "mmlu"), dev.rows(rows)
    weak, strong = dev.quality.T
    rng = np.random.default_rng(0)
    random = [pair(rng.random(len(dev)), weak, strong) for _ in range(20)]
    assert np.mean([p.apgr for p in random if p]) == pytest.approx(0.499, abs=0.02)
    fitted = base.CategoryBest.fit(train)
    keys = zip(dev.benchmark, dev.category, strict=True)
    rates = np.stack([fitted.quality[fitted.row_of[key]] for key in keys])
    known = pair(rates[:, 1] - rates[:, 0], weak, strong)
    assert known is not None
    assert known.apgr == pytest.approx(0.638, abs=0.06)


def test_intents() -> None:
    train = read_intents(SHARED / "clinc150.train.csv.gz")
    dev = read_intents(SHARED / "clinc150.dev.csv.gz", experts=train.experts)
    assert train.quality.shape == (15071, 150)
    assert dev.quality.sum() == 2993
    assert (~dev.quality.any(axis=1)).sum() == 100  # out of scope
